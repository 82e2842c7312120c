"""What is sent: seeded lists of requests, the same for every server.

A request depends only on the options and its index, so that a list can be split and resumed: every workload takes the
place to start at and the step, so that worker r of n makes those with `start=r, step=n` and no other. Place i of the
list goes with offset i of the schedule.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Protocol

from loadtest.options import Options
from loadtest.work import datasets, prompts, traces
from loadtest.work.lengths import DISTRIBUTIONS, Length, empirical
from loadtest.work.lines import open_stamp

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
    """One request; its output is exactly `max_tokens` long, because the end of text is ignored.

    `turn` counts from 0 to `turns` - 1 inside a conversation, whose turns have consecutive indexes. `history` holds the
    questions and answers before this one, for chats; a completion has them in its prompt.
    """

    index: int
    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    turn: int = 0
    turns: int = 1
    history: tuple[tuple[str, str], ...] = ()

    @property
    def conversation(self) -> int:
        """Number of the conversation, which is that of the request where each has one turn."""
        return self.index // self.turns

    def body(self, model: str) -> dict[str, Any]:
        """Body of POST /v1/completions; asks for the token ids of an answer that the next turn's prompt holds."""
        ids = {"return_token_ids": True} if self.turn + 1 < self.turns else {}
        return {"model": model, "prompt": self.prompt} | self._sampling() | ids

    def chat_body(self, model: str) -> dict[str, Any]:
        """Body of POST /v1/chat/completions; raises ValueError for a prompt of token ids."""
        if not isinstance(self.prompt, str):
            raise ValueError(f"request {self.index}: a chat needs text, and the prompt is token ids; set endpoint chat")
        messages = [
            {"role": role, "content": text}
            for question, answer in self.history
            for role, text in (("user", question), ("assistant", answer))
        ]
        messages.append({"role": "user", "content": self.prompt})
        return {"model": model, "messages": messages} | self._sampling()

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }


class Workload(Protocol):
    """Makes requests; raises ValueError before the first one for options that cannot be met."""

    def __call__(self, options: Options, start: int = 0, step: int = 1) -> Iterator[Request]:
        """Yield the requests at the places start, start + step, ... of the list."""


def classic(options: Options, start: int = 0, step: int = 1) -> Iterator[Request]:
    """The four inputs of the original experiment in turn: 50 new tokens, temperature 0.7."""
    for index in count(start, step):
        yield Request(index, CLASSIC_PROMPTS[index % len(CLASSIC_PROMPTS)], 50, 0.7, options.seed + index)


def synthetic(options: Options, start: int = 0, step: int = 1) -> Iterator[Request]:
    """Prompts of random tokens and outputs, of lengths from the distributions that the options name.

    A conversation of several turns is in the list with its first one, so that indexes are `turns` apart; when its
    answer is there, `next_turn` makes the next. All turns and their answers together fit into `max_context`.
    """
    made = _synthetic(options)
    return (made.request(place * options.turns) for place in count(start, step))


def paper(options: Options, start: int = 0, step: int = 1) -> Iterator[Request]:
    """ShareGPT or Alpaca: from the file of real ones if `dataset` names it, else lengths with the paper's means."""
    return (from_dataset if options.dataset else synthetic)(options, start, step)


def from_dataset(options: Options, start: int = 0, step: int = 1) -> Iterator[Request]:
    """Real prompts in the order of their file, each once."""
    examples = datasets.read(options).examples

    def request(index: int) -> Request:
        prompt, max_tokens = examples[index]
        ids_or_text = prompt if isinstance(prompt, str) else tuple(prompt)
        return Request(index, ids_or_text, max_tokens, 0.0, options.seed + index)

    return map(request, range(start, len(examples), step))


def from_trace(options: Options, start: int = 0, step: int = 1) -> Iterator[Request]:
    """Prompts and outputs as long as those of a trace; where it has block hashes, equal ones are equal tokens."""
    trace, pool = traces.read(options), _pool(options)

    @lru_cache(maxsize=4096)
    def block(hash_id: int) -> list[Any]:
        return prompts.shared(pool, options.seed, "block", hash_id, traces.BLOCK_TOKENS)

    def request(index: int) -> Request:
        rng, length = _rng(options, index), trace.input_tokens[index]
        if trace.hash_ids:
            units = chain.from_iterable(map(block, trace.hash_ids[index]))
            pieces = [list(islice(units, length)), []]
        else:
            pieces = [prompts.unique(pool, options.seed, index, length, rng)]
        prompt = _prompt(options, pieces, rng)
        return Request(index, prompt, trace.output_tokens[index], 0.0, options.seed + index)

    return map(request, range(start, len(trace.seconds), step))


WORKLOADS: dict[str, Workload] = {
    "classic": classic,
    "lognormal": synthetic,
    "synthetic": synthetic,
    "sharegpt": paper,
    "alpaca": paper,
    "dataset": from_dataset,
    "trace": from_trace,
}


def next_turn(options: Options, request: Request, answer: str | Sequence[int]) -> Request | None:
    """Make the request that follows `request` in its conversation, or None after the last turn.

    Call it when the answer to `request` has ended, with the answer's token ids (`token_ids` of the choices) for
    /v1/completions, its text for a chat; then send what it returns on the same worker. After a failed turn pass what
    came, if only an empty text: the list keeps its number of requests. Raises ValueError for text where ids are needed
    and no tokenizer is given.
    """
    if request.turn + 1 >= request.turns:
        return None
    turn = _synthetic(options).request(request.index + 1)
    before = request.prompt
    if isinstance(before, str) and isinstance(turn.prompt, str):
        if not isinstance(answer, str):
            raise ValueError(f"answer: token ids for request {request.index}: expected the text of the chat's answer")
        history = (*request.history, (before, answer))
        return replace(turn, history=history)
    return replace(turn, prompt=(*before, *_ids(options, answer), *turn.prompt))


def skipped(options: Options) -> Counter[str]:
    """How many lines of the workload's and the schedule's files are not sent, by reason."""
    found: Counter[str] = Counter()
    if "trace" in (options.workload, options.arrival):
        found += traces.read(options).skipped
    if options.dataset:
        found += datasets.read(options).skipped
    if "empirical" in (options.input_lengths, options.output_lengths):
        found += _synthetic(options).skipped
    return found


def listed(options: Options) -> int | None:
    """How many requests the workload's file has for a run; None for one that is made without end."""
    if options.workload == "trace":
        return len(traces.read(options).seconds)
    return len(datasets.read(options).examples) if options.dataset else None


def left_out(options: Options) -> Iterator[str]:
    """Say of each file of requests how many of its lines are not sent, and why; as far as it was read."""
    files: list[tuple[str, int, Counter[str]]] = []
    if "trace" in (options.workload, options.arrival):
        trace = traces.read(options)
        files.append((options.trace, len(trace.seconds), trace.skipped))
    if options.dataset:
        dataset = datasets.read(options)
        files.append((options.dataset, len(dataset.examples), dataset.skipped))
    for path, good, lost in files:
        if lost:
            reasons = "; ".join(f"{number} left out: {reason}" for reason, number in lost.items())
            yield f"{path}: {good} of {good + lost.total()} lines can be sent; {reasons}"


@dataclass(frozen=True)
class _Synthetic:
    """Makes any request of a synthetic workload from its index."""

    options: Options
    input_length: Length
    output_length: Length
    pool: Sequence[Any]
    skipped: Counter[str] = field(default_factory=Counter)

    def request(self, index: int) -> Request:
        options, turn = self.options, index % self.options.turns
        rng = _rng(options, index)
        own = prompts.unique(self.pool, options.seed, index, self.input_length(rng), rng)
        pieces = [own] if turn else [*self._prefix(index // options.turns), own]
        prompt = _prompt(options, pieces, rng)
        length = self.output_length(rng)
        return Request(index, prompt, length, 0.0, options.seed + index, turn=turn, turns=options.turns)

    def _prefix(self, conversation: int) -> list[list[Any]]:
        options = self.options
        if not options.prefix_groups:
            return []
        group = conversation % options.prefix_groups
        return [prompts.shared(self.pool, options.seed, "prefix", group, options.prefix_tokens)]


def _synthetic(options: Options) -> _Synthetic:
    files = [name for name in ("input_histogram", "output_histogram") if getattr(options, name)]
    return _make_synthetic(options, tuple(open_stamp(name, getattr(options, name)) for name in files))


@lru_cache(maxsize=2)
def _make_synthetic(options: Options, _stamps: tuple[tuple[int, int], ...]) -> _Synthetic:
    lost: Counter[str] = Counter()
    means = PAPER_MEANS.get(options.workload, (options.input_mean, options.output_mean))
    sigma = PAPER_SIGMA if options.workload in PAPER_MEANS else options.sigma
    sides = zip(("input", "output"), means, strict=True)
    input_length, output_length = (_length(options, side, mean, sigma, lost) for side, mean in sides)
    return _Synthetic(options, input_length, output_length, _pool(options), lost)


def _length(options: Options, side: str, mean: float, sigma: float, lost: Counter[str]) -> Length:
    longest = (options.max_context - options.prefix_tokens) // (2 * options.turns)
    plain = options.turns == 1 and not options.prefix_tokens
    room = "half of max_context" if plain else "max_context less the prefix, split over all prompts and outputs"
    if longest < 1:
        raise ValueError(f"max_context: {options.max_context}: leaves no room for prompts and outputs ({room})")
    kind = getattr(options, f"{side}_lengths")
    if kind == "empirical":
        path = Path(getattr(options, f"{side}_histogram"))
        return empirical(path, longest, options.skip_bad_lines, lost)
    if mean > longest or (mean == longest and kind != "constant"):
        raise ValueError(f"{side}_mean: a mean length of {mean:g} tokens does not fit: at most {longest} ({room})")
    try:
        return DISTRIBUTIONS[kind](mean, sigma, longest)
    except ValueError as error:
        raise ValueError(f"{side}_mean: {error}") from None


def _rng(options: Options, index: int) -> random.Random:
    return random.Random(f"{options.seed}:{index}")  # noqa: S311 - load, not secrets


def _pool(options: Options) -> Sequence[Any]:
    return prompts.words(options.tokenizer) if options.endpoint == "chat" else prompts.TOKEN_IDS


def _prompt(options: Options, pieces: list[list[Any]], rng: random.Random) -> str | tuple[int, ...]:
    if options.endpoint == "chat":
        return prompts.exact_text(options.tokenizer, pieces, rng)
    return tuple(chain.from_iterable(pieces))


def _ids(options: Options, answer: str | Sequence[int]) -> Sequence[int]:
    if not isinstance(answer, str) or not answer:
        return [] if isinstance(answer, str) else answer
    if not options.tokenizer:
        raise ValueError("tokenizer: '': needed to put an answer's text into the next prompt; or pass its token ids")
    return prompts.load_tokenizer(options.tokenizer).encode(answer, add_special_tokens=False)
