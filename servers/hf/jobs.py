"""One request inside an engine: token ids in, token ids out. Nothing here knows of HTTP, text or JSON."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

GREEDY_BELOW = 1e-5


class QueueFullError(Exception):
    """The engine holds as many requests as it may."""


class TooLargeError(Exception):
    """The request can never fit into the KV cache; the message says by how much."""


class OutOfMemoryError(Exception):
    """The memory did not suffice for the batch that the request was in; the engine goes on."""


class EngineDeadError(Exception):
    """The engine has failed or was stopped, and takes no more requests."""


class EngineFailedError(EngineDeadError):
    """The engine failed while it worked on the request."""


@dataclass(frozen=True)
class Sampling:
    """How one output is drawn; the meaning of each field is that of the API."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; below the bound the division of the logits overflows, as in vLLM."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Step:
    """One generated token, the time at which the engine had it, and with the last one the reason why it is the last."""

    token_id: int
    at: float
    finish_reason: str | None = None


class Job:
    """One request. Times are CLOCK_MONOTONIC in seconds, all but `arrived` taken by the engine.

    `started`: it left the queue. `first`, `last`: its first token was made, and the last so far. `number` names it
    where it runs in another process than the one that asked for it.
    """

    def __init__(self, prompt_ids: tuple[int, ...], sampling: Sampling):
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.number = -1
        self.arrived = time.monotonic()
        self.started = self.first = self.last = 0.0
        self.cancelled = False
        self._outputs: deque[Step | Exception] = deque()
        self._wanted: asyncio.Future[None] | None = None

    @property
    def max_slots(self) -> int:
        """Tokens whose keys and values it may come to store: all but the last, which is never fed back."""
        return len(self.prompt_ids) + self.sampling.max_tokens - 1

    def put(self, output: Step | Exception) -> None:
        """Hand over a token, or the error that ended the job; to be called in the event loop."""
        self._outputs.append(output)
        if self._wanted and not self._wanted.done():
            self._wanted.set_result(None)

    async def steps(self) -> AsyncIterator[Step]:
        """Yield each token as it is made; raises what the engine failed with."""
        while True:
            while not self._outputs:
                self._wanted = asyncio.get_running_loop().create_future()
                await self._wanted
            step = self._outputs.popleft()
            if isinstance(step, Exception):
                raise step
            self.first = self.first or step.at
            self.last = step.at
            yield step
            if step.finish_reason:
                return
