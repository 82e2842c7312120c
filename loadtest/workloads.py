"""What is sent: seeded lists of requests, the same for every server.

A request depends only on the options, the seed and its index, so that a list can be split and resumed.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from statistics import NormalDist
from typing import Any

from loadtest.options import Options

# Ids that are in every usual vocabulary, above the special and the single-byte tokens.
PROMPT_TOKEN_IDS = range(300, 1300)

# Mean prompt and output lengths in tokens: Kwon et al., SOSP'23, Fig. 11. The paper gives no spread; ours is an option.
PAPER_MEANS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}
PAPER_SIGMA = 1.0

CLASSIC_PROMPTS = (
    "Hello!",
    "How are you doing today? I hope everything is going well.",
    "Tell me a story about artificial intelligence and machine learning. " * 10,
    "Thanks!",
)


@dataclass(frozen=True)
class Request:
    """One request; its output is exactly `max_tokens` long, because the end of text is ignored."""

    index: int
    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int

    def body(self, model: str) -> dict[str, Any]:
        """Body of POST /v1/completions."""
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }


def classic(options: Options) -> Iterator[Request]:
    """The four inputs of the original experiment in turn: 50 new tokens, temperature 0.7."""
    for index in count():
        yield Request(index, CLASSIC_PROMPTS[index % len(CLASSIC_PROMPTS)], 50, 0.7, options.seed + index)


def lognormal(options: Options) -> Iterator[Request]:
    """Prompts of random tokens and outputs of log-normal lengths, cut so that both fit into the context."""
    return _synthetic(options, options.input_mean, options.output_mean, options.sigma)


def paper(options: Options) -> Iterator[Request]:
    """Log-normal lengths with the means of the paper's data sets."""
    return _synthetic(options, *PAPER_MEANS[options.workload], PAPER_SIGMA)


WORKLOADS: dict[str, Callable[[Options], Iterator[Request]]] = {
    "classic": classic,
    "lognormal": lognormal,
    "sharegpt": paper,
    "alpaca": paper,
}


def _synthetic(options: Options, input_mean: float, output_mean: float, sigma: float) -> Iterator[Request]:
    longest = options.max_context // 2
    # Here and not in the generator, so that a mean that does not fit is an error before the run.
    input_mu, output_mu = _mu(input_mean, sigma, longest), _mu(output_mean, sigma, longest)

    def request(index: int) -> Request:
        rng = random.Random(f"{options.seed}:{index}")  # noqa: S311 - load, not secrets
        length = _length(rng, input_mu, sigma, longest)
        prompt = tuple(rng.choices(PROMPT_TOKEN_IDS, k=length))
        return Request(index, prompt, _length(rng, output_mu, sigma, longest), 0.0, options.seed + index)

    return map(request, count())


def _length(rng: random.Random, mu: float, sigma: float, longest: int) -> int:
    return max(1, min(longest, round(rng.lognormvariate(mu, sigma))))


def _mu(mean: float, sigma: float, longest: int) -> float:
    """Find the mu at which log-normal lengths, cut at `longest`, have the given mean; by bisection."""
    if mean >= longest:
        raise ValueError(f"a mean length of {mean:g} tokens does not fit: at most {longest} (half of max_context)")
    low, high = math.log(mean) - 10 * (sigma + 1), math.log(longest) + 10 * (sigma + 1)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _mean_when_cut(middle, sigma, longest) > mean else (middle, high)
    return low


def _mean_when_cut(mu: float, sigma: float, longest: int) -> float:
    """Mean of max(1, min(X, longest)) for a log-normal X (from its partial expectation)."""
    if sigma == 0:
        return max(1, min(math.exp(mu), longest))
    below = NormalDist().cdf
    low, high = -mu / sigma, (math.log(longest) - mu) / sigma
    between = math.exp(mu + sigma**2 / 2) * (below(high - sigma) - below(low - sigma))
    return below(low) + between + longest * (1 - below(high))
