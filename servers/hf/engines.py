"""Engines: token ids in, token ids out. They know nothing of HTTP, text or JSON.

An engine runs the model in a thread of its own and hands each token to the event loop at once.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

GREEDY_BELOW = 1e-5


class QueueFullError(Exception):
    """The engine holds as many waiting requests as it may."""


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


@dataclass(frozen=True)
class Step:
    """One generated token; `finish_reason` is given with the last."""

    token_id: int
    finish_reason: str | None = None


class Job:
    """One request inside an engine, and the way its tokens take back to the event loop that made it."""

    def __init__(self, prompt_ids: tuple[int, ...], sampling: Sampling):
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step | BaseException] = asyncio.Queue()

    def emit(self, step: Step | BaseException) -> None:
        """Hand over a token, or the error that ended the job; called from the engine's thread."""
        self._loop.call_soon_threadsafe(self._steps.put_nowait, step)

    async def steps(self) -> AsyncIterator[Step]:
        """Yield each token as it is made; raises what the engine failed with."""
        while True:
            step = await self._steps.get()
            if isinstance(step, BaseException):
                raise step
            yield step
            if step.finish_reason:
                return


class SequentialEngine:
    """One request at a time, first come first served: what most first services do."""

    name = "sequential"

    def __init__(self, model: PreTrainedModel, eos_token_ids: frozenset[int], max_waiting: int):
        self.running = 0
        self.model = model
        self._eos = eos_token_ids
        self._max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # What a model folder recommends (top_k, repetition_penalty, ...) must not leak into requests.
        model.generation_config = GenerationConfig()

    def start(self) -> None:
        """Generate two tokens, so that no request pays for the first call, then take requests."""
        config = _generation_config(Sampling(max_tokens=2, temperature=0, ignore_eos=True), self._eos)
        self.model.generate(torch.zeros((1, 4), dtype=torch.long, device=self.model.device), generation_config=config)
        self._thread.start()

    def close(self) -> None:
        """Take no more requests and end the thread after the token it is working on."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for their turn."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job; raises QueueFullError when too many wait already."""
        with self._changed:
            # One of those that wait takes the place of an idle engine.
            if self.running + len(self._waiting) > self._max_waiting:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job that waits, or end one that runs after the token it is working on."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _run(self) -> None:
        while job := self._next():
            try:
                self._generate(job)
            except Exception as error:  # noqa: BLE001 - it belongs to the request, which reports it; the server goes on
                job.emit(error)
            finally:
                self.running = 0

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self.running = 1
            return self._waiting.popleft()

    def _generate(self, job: Job) -> None:
        # The generator of the default device is this thread's alone, so a seed gives the same tokens every time.
        seed = job.sampling.seed
        torch.seed() if seed is None else torch.manual_seed(seed)
        self.model.generate(
            torch.tensor([job.prompt_ids], device=self.model.device),
            generation_config=_generation_config(job.sampling, self._eos),
            streamer=_Emitter(job, self._eos),
            stopping_criteria=StoppingCriteriaList([_Cancelled(self, job)]),
        )


class _Emitter(BaseStreamer):
    """Hands each token to its job; `generate` first puts the prompt, then each token."""

    def __init__(self, job: Job, eos_token_ids: frozenset[int]):
        self._job = job
        self._eos = frozenset() if job.sampling.ignore_eos else eos_token_ids
        self._made = -1

    def put(self, value: torch.Tensor) -> None:
        self._made += 1
        if self._made:
            token_id = int(value)
            ended = (
                "stop" if token_id in self._eos else "length" if self._made == self._job.sampling.max_tokens else None
            )
            self._job.emit(Step(token_id, ended))

    def end(self) -> None:
        pass


class _Cancelled(StoppingCriteria):
    def __init__(self, engine: SequentialEngine, job: Job):
        self._engine = engine
        self._job = job

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        ended = self._job.cancelled or self._engine._closed
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device)


def _generation_config(sampling: Sampling, eos_token_ids: frozenset[int]) -> GenerationConfig:
    eos = None if sampling.ignore_eos or not eos_token_ids else sorted(eos_token_ids)
    common = {
        "max_new_tokens": sampling.max_tokens,
        "min_new_tokens": sampling.min_tokens or None,
        "eos_token_id": eos,
        "pad_token_id": 0,
    }
    # As in vLLM: below this the division of the logits overflows.
    if sampling.temperature < GREEDY_BELOW:
        return GenerationConfig(**common, do_sample=False)
    return GenerationConfig(
        **common,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(0, sampling.top_k),
    )
