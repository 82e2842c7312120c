"""Drawing tokens: each row of a batch by its own parameters and its own seed, in every engine alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from servers.hf.jobs import Sampling


@dataclass(frozen=True)
class Draw:
    """How one row is drawn; with a seed it has a generator of its own, so that its batch does not matter."""

    sampling: Sampling
    generator: torch.Generator | None

    @classmethod
    def of(cls, sampling: Sampling, device: torch.device) -> "Draw":
        """Begin drawing for one request."""
        seed = sampling.seed
        return cls(sampling, None if seed is None else torch.Generator(device).manual_seed(seed))


class Sampler:
    """Draws for a fixed list of rows.

    Noise is exponential and the token is the argmax of probability / noise, which draws from the probabilities
    (Gumbel's trick, as in vLLM's sampler).
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device, eos_token_ids: frozenset[int]):
        self._rows = [draw.sampling for draw in draws]
        drawn = [index for index, row in enumerate(self._rows) if not row.greedy]
        self.idle = not drawn and not any(row.min_tokens and not row.ignore_eos for row in self._rows)
        if self.idle:
            return
        self._drawn = torch.tensor(drawn, device=device) if drawn else None
        chosen = [self._rows[index] for index in drawn]
        self._temperature = torch.tensor([[row.temperature] for row in chosen], device=device)
        self._top_k = torch.tensor([[row.top_k if row.top_k > 0 else 2**31] for row in chosen], device=device)
        self._top_p = torch.tensor([[row.top_p] for row in chosen], device=device)
        self._cut = any(row.top_k > 0 or row.top_p < 1 for row in chosen)
        self._generators = [(at, draws[index].generator) for at, index in enumerate(drawn) if draws[index].generator]
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)

    def __call__(self, scores: torch.Tensor, made: Sequence[int]) -> torch.Tensor:
        """Change float32 scores [rows, vocabulary] in place so that each row's argmax is its token.

        `made` is the number of tokens that each row has so far.
        """
        if self.idle:
            return scores
        for index, (row, count) in enumerate(zip(self._rows, made, strict=True)):
            if count < row.min_tokens and not row.ignore_eos:
                scores[index, self._eos] = -torch.inf
        if self._drawn is not None:
            tokens = self._draw(scores[self._drawn] / self._temperature)
            scores[self._drawn] = -torch.inf
            scores[self._drawn, tokens] = 0.0
        return scores

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        probabilities = (self._truncate(logits) if self._cut else logits).softmax(dim=-1)
        noise = torch.empty_like(probabilities).exponential_()
        for at, generator in self._generators:
            noise[at].exponential_(generator=generator)
        return (probabilities / noise).argmax(dim=-1)

    def _truncate(self, logits: torch.Tensor) -> torch.Tensor:
        ranked, order = logits.sort(dim=-1, descending=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        ranked = ranked.masked_fill(rank >= self._top_k, -torch.inf)
        before = ranked.softmax(dim=-1).cumsum(dim=-1) - ranked.softmax(dim=-1)
        # The likeliest token always stays, even where top_p is less than the least float32.
        ranked = ranked.masked_fill((rank > 0) & (before >= self._top_p) & (self._top_p < 1), -torch.inf)
        return torch.empty_like(logits).scatter_(-1, order, ranked)
