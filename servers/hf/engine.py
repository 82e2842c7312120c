"""What all engines share: the queue in front of them, and the way of tokens back to the event loop."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, PreTrainedModel

from servers.hf.jobs import EngineDeadError, Job, QueueFullError, Sampling, Step, TooLargeError
from servers.hf.kv import Held

#: What a step gives: a token or an error for each of some jobs.
Outputs = Sequence[tuple[Job, Step | Exception]]


@dataclass(frozen=True)
class Limits:
    """What an engine may take; lengths and the size of the KV cache (None: the engine's own choice) are in tokens."""

    max_model_len: int
    max_batch: int = 1
    max_waiting: int = 512
    kv_tokens: int | None = None
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class State:
    """What an engine holds at one moment: requests, slots of its KV cache, and on a GPU the bytes of torch's allocator.

    `running`: in the batch and not ended. `waiting`: not yet. `allocator`: bytes held by tensors, bytes reserved.
    """

    running: int = 0
    waiting: int = 0
    held: Held = field(default_factory=Held)
    allocator: tuple[int, int] | None = None


class Engine(ABC):
    """Generates tokens for jobs; all methods are called in the event loop that `start` ran in."""

    name: str
    limits: Limits
    #: Slots of the KV cache that may be set aside at most.
    capacity: int

    @abstractmethod
    async def start(self) -> None:
        """Warm up, so that no request pays for the first call, and take requests."""

    @abstractmethod
    async def close(self) -> None:
        """Take no more requests and end those that run after the token they are working on."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether requests are taken."""

    @abstractmethod
    async def state(self) -> State:
        """What is held now."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Queue a job; EngineDeadError, TooLargeError or QueueFullError is raised, or is what the job ends with."""

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Drop a job that waits, or end one that runs after the token it is working on; harmless when it has ended."""


class ModelEngine(Engine):
    """An engine that runs the model in a thread of this process."""

    def __init__(self, model: PreTrainedModel, limits: Limits):
        self.model = model
        self.limits = limits
        self._loop: asyncio.AbstractEventLoop | None = None
        #: Where tokens and errors go, in the engine's thread: to the jobs in the event loop, unless replaced.
        self.deliver: Callable[[Outputs], None] = self._to_jobs
        # What a model folder recommends (top_k, repetition_penalty, ...) must not leak into requests.
        model.generation_config = GenerationConfig()

    @property
    @abstractmethod
    def running(self) -> int:
        """Number of requests that are in the batch and not ended."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Number of requests that wait for their turn."""

    @property
    @abstractmethod
    def held(self) -> Held:
        """Slots of the KV cache that are set aside now."""

    @abstractmethod
    def slots(self, job: Job) -> int:
        """Slots that the job takes when it runs alone."""

    async def state(self) -> State:
        """What is held now."""
        allocator = None
        if self.model.device.type == "cuda":
            # All of a device at once, and as it comes: memory_allocated and memory_reserved each sort all there is.
            stats = [torch.cuda.memory_stats_as_nested_dict(device) for device in range(torch.cuda.device_count())]
            parts = ("allocated_bytes", "reserved_bytes")
            allocated, reserved = (sum(device[part]["all"]["current"] for device in stats) for part in parts)
            allocator = allocated, reserved
        return State(self.running, self.waiting, self.held, allocator)

    def submit(self, job: Job) -> None:
        """Queue a job; raises EngineDeadError, TooLargeError or QueueFullError."""
        if not self.alive:
            raise EngineDeadError("the engine is not running")
        if job.max_slots > self.limits.max_model_len:
            raise TooLargeError(f"{job.max_slots} tokens are more than the context of {self.limits.max_model_len}")
        if self.slots(job) > self.capacity:
            raise TooLargeError(f"{self.slots(job)} tokens of KV cache are needed, {self.capacity} is all there is")
        if self.running + self.waiting >= self.limits.max_batch + self.limits.max_waiting:
            raise QueueFullError
        self._enqueue(job)

    def _warm_up_job(self) -> Job:
        """A short request that any engine can take."""
        count = min(4, self.limits.max_model_len, self.capacity)
        return Job((1,), Sampling(max_tokens=count, temperature=0, ignore_eos=True))

    @abstractmethod
    def _enqueue(self, job: Job) -> None:
        """Take a job that has passed all checks."""

    def _hand_over(self, outputs: Outputs) -> None:
        """Give each job its token or its error."""
        if outputs:
            self.deliver(outputs)

    def _to_jobs(self, outputs: Outputs) -> None:
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, outputs)  # one wake-up of the loop for all

    def _finish_reason(self, job: Job, token_id: int, made: int) -> str | None:
        """Why the token ends the output, `made` being the number of tokens with it."""
        if token_id in self.limits.eos_token_ids and not job.sampling.ignore_eos:
            return "stop"
        return "length" if made == job.sampling.max_tokens else None


def _deliver(outputs: Outputs) -> None:
    for job, output in outputs:
        job.put(output)


def clear_memory(error: BaseException) -> None:
    """Free what a failed call holds: the frames of its traceback keep its tensors alive."""
    error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_sentence(error: BaseException) -> str:
    """What happened, without torch's advice about its allocator."""
    return str(error).partition(". ")[0]
