"""The engine on Transformers' continuous batching: requests join and leave at every step, the KV cache is paged."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)

from servers.hf.engine import Limits, ModelEngine, clear_memory, first_sentence
from servers.hf.jobs import EngineDeadError, EngineFailedError, Job, OutOfMemoryError, Sampling, Step
from servers.hf.kv import Held, held_by_blocks
from servers.hf.sampling import Draw, Sampler

#: Tokens of one step, prompts included; Transformers' own default makes attention masks of gigabytes.
MAX_BATCH_TOKENS = 2048
# Stands for a request that was cancelled after its step was prepared.
GONE = Draw(Sampling(max_tokens=1, temperature=0, ignore_eos=True), None)


class ContinuousEngine(ModelEngine):
    """Gives requests to Transformers' manager, which schedules them, and takes their tokens from it.

    CUDA graphs are off: they would freeze the drawing of the first batch, while each request here has its own seed and
    parameters. Transformers itself leaves them off unless FlashAttention is installed.
    """

    name = "continuous"

    def __init__(self, model: PreTrainedModel, limits: Limits, block_size: int):
        super().__init__(model, limits)
        self.block_size = block_size
        blocks = limits.max_batch * -(-limits.max_model_len // block_size)
        if limits.kv_tokens is not None:
            blocks = min(blocks, limits.kv_tokens // block_size)
        self.capacity = blocks * block_size
        self.manager: ContinuousBatchingManager | None = None
        self.entries: dict[str, Entry] = {}
        self._ids: dict[Job, str] = {}
        self._numbers = itertools.count()
        self._error: Exception | None = None
        self._giving_up: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Allocate the cache and generate four tokens, then take requests."""
        self._loop = asyncio.get_running_loop()
        job = self._warm_up_job()
        try:
            await asyncio.to_thread(self._open)
            self._enqueue(job)
            async for _ in job.steps():
                pass
        except (torch.OutOfMemoryError, OutOfMemoryError, MemoryError, ValueError) as error:
            await self.close()
            raise EngineDeadError(f"the engine cannot start: {first_sentence(error)}") from error
        except EngineDeadError:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop after the step that is being worked on; what runs or waits gets an error."""
        self._error = self._error or EngineDeadError("the server is shutting down")
        if self._giving_up:
            await self._giving_up
        self._fail_all(self._error)
        manager, self.manager = self.manager, None
        if manager:
            await asyncio.to_thread(manager.stop, timeout=10, hard_stop=True)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return not self._error and self.manager is not None and self.manager.is_running()

    @property
    def running(self) -> int:
        """Number of requests that have blocks."""
        return sum(1 for number in list(self.entries) if self._blocks(number))

    @property
    def waiting(self) -> int:
        """Number of requests that have no blocks yet, or had to give them up when the cache was full."""
        return len(self.entries) - self.running

    @property
    def held(self) -> Held:
        """What the blocks in use hold."""
        processor = self.manager.batch_processor if self.manager else None
        active = list(processor.scheduler.active_requests.values()) if processor else []
        # Tokens are read before blocks: the thread that runs the model adds blocks first.
        tokens = [(state.request_id, state.current_len()) for state in active]
        sequences = [(stored, self._blocks(number)) for number, stored in tokens]
        return held_by_blocks([sequence for sequence in sequences if sequence[1]], self.block_size)

    def slots(self, job: Job) -> int:
        """Whole blocks."""
        return -(-job.max_slots // self.block_size) * self.block_size

    def cancel(self, job: Job) -> None:
        """Drop a job; its blocks are free before the next step."""
        job.cancelled = True
        # The manager says nothing more of a request that was cancelled, so it is forgotten here.
        if (number := self._ids.pop(job, None)) and self.entries.pop(number, None) and self.manager:
            self.manager.cancel_request(number)

    def _enqueue(self, job: Job) -> None:
        number = self._ids[job] = str(next(self._numbers))
        self.entries[number] = Entry(job, Draw.of(job.sampling, self.model.device))
        eos = -1 if job.sampling.ignore_eos else sorted(self.limits.eos_token_ids) or -1
        self.manager.add_request(  # type: ignore[union-attr]
            list(job.prompt_ids), number, max_new_tokens=job.sampling.max_tokens, streaming=True, eos_token_id=eos
        )

    def _blocks(self, number: str) -> int:
        processor = self.manager.batch_processor if self.manager else None
        allocators = processor.cache.cache_allocators.values() if processor else ()
        return sum(len(allocator.block_table.get(number, ())) for allocator in allocators)

    def _open(self) -> None:
        config = ContinuousBatchingConfig(
            page_size=self.block_size,
            num_blocks=self.capacity // self.block_size,
            max_batch_tokens=max(MAX_BATCH_TOKENS, self.limits.max_batch),
            max_requests_per_batch=self.limits.max_batch,
            allow_block_sharing=False,  # a prompt must not profit from one before it
            use_cuda_graph=False,
            use_async_batching=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        self.manager = _Manager(self, greedy, config)
        self.manager.output_router = _Router(self)
        choosers = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Choose(self)]))
        choosers.tensors_required = 1
        self.manager.logit_processor = choosers
        self.manager.warmup()  # makes the cache, so that a lack of memory is an error here
        self.manager.start()

    def take(self, outputs: Sequence[GenerationOutput]) -> None:
        """Hand over the tokens that a step has added; called in the manager's thread."""
        now = time.monotonic()
        steps: list[tuple[Job, Step | Exception]] = []
        for output in outputs:
            if (entry := self.entries.get(output.request_id)) is None:
                continue
            # perf_counter, which the manager stamps with, is the same clock.
            entry.job.started = entry.job.started or output.lifespan[0]
            for token_id in output.generated_tokens[entry.made :]:
                entry.made += 1
                steps.append((entry.job, Step(token_id, now, self._finish_reason(entry.job, token_id, entry.made))))
            if output.is_finished():
                self.entries.pop(output.request_id, None)
                self._ids.pop(entry.job, None)
        self._hand_over(steps)

    def out_of_memory(self, numbers: Sequence[str], reason: str) -> None:
        """Fail the requests of a step that lacked memory; called in the manager's thread."""
        entries = [entry for number in numbers if (entry := self.entries.pop(number, None))]
        for entry in entries:
            self._ids.pop(entry.job, None)
        self._hand_over([(entry.job, OutOfMemoryError(reason)) for entry in entries])

    def failed(self, number: str, error: Exception, ran: bool) -> None:
        """Fail a request after the manager has ended; called in the loop."""
        if entry := self.entries.pop(number, None):
            self._ids.pop(entry.job, None)
            kind = EngineFailedError if ran or entry.made else EngineDeadError
            self._hand_over([(entry.job, kind(_reason(error)))])
        if self.manager and not self._error:
            self._error = EngineDeadError(_reason(error))
            self._giving_up = asyncio.create_task(self._give_up(self.manager))

    async def _give_up(self, manager: ContinuousBatchingManager) -> None:
        """Fail what the manager knew nothing of, after it has said which requests it failed."""
        await asyncio.to_thread(manager.join, time.perf_counter(), 10)
        self._giving_up = None
        self._fail_all(self._error or EngineDeadError("the engine failed"))

    def _fail_all(self, error: Exception) -> None:
        jobs = [entry.job for entry in list(self.entries.values())]  # a step may end in the meantime
        self.entries.clear()
        self._ids.clear()
        self._hand_over([(job, error) for job in jobs])


@dataclass(eq=False)
class Entry:
    """A request that the manager has, how it is drawn, and the number of tokens that were handed over."""

    job: Job
    draw: Draw
    made: int = 0


def _reason(error: Exception) -> str:
    return f"the engine failed: {type(error).__name__}: {error}"


class _Manager(ContinuousBatchingManager):
    """Transformers' manager, except that a lack of memory ends the requests of the step and not the manager itself."""

    def __init__(self, engine: ContinuousEngine, generation: GenerationConfig, config: ContinuousBatchingConfig):
        super().__init__(engine.model, generation, config)
        self._engine = engine

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        scheduler = batch_processor.scheduler
        if not scheduler.active_requests:
            # A full cache keeps new requests out until one ends, which one that is cancelled does not do.
            scheduler.block_new_requests = False
        try:
            return bool(super()._generation_loop_body(batch_processor, bootstrapping))
        except torch.OutOfMemoryError as error:
            clear_memory(error)
            reason = first_sentence(error)
        numbers = list(scheduler.active_requests)
        for number in numbers:
            scheduler.finish_request(number)
        self._engine.out_of_memory(numbers, reason)
        return True


class _Router(OutputRouter):
    """Where the manager's thread leaves tokens and failures; one wake-up of the event loop for each step."""

    def __init__(self, engine: ContinuousEngine):
        super().__init__()
        self._engine = engine

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._engine.take(outputs)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        loop = self._engine._loop
        if loop and not loop.is_closed():
            ran = state.status != RequestStatus.PENDING
            loop.call_soon_threadsafe(self._engine.failed, state.request_id, error, ran)


class _Choose(ContinuousBatchingLogitsProcessor):
    """Draws each request's token by its own parameters; the manager then takes the argmax."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs = ()

    def __init__(self, engine: ContinuousEngine):
        self._engine = engine
        self._entries: list[Entry | None] = []
        self._sampler: Sampler | None = None

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        entries = [self._engine.entries.get(request.state.request_id) for request in requests_with_new_token]
        if self._sampler is None or entries != self._entries:
            draws = [entry.draw if entry else GONE for entry in entries]
            self._sampler = Sampler(draws, self._engine.model.device, self._engine.limits.eos_token_ids)
            self._entries = entries
        return torch.zeros(len(entries), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        if self._sampler is None or self._sampler.idle:
            return scores
        return self._sampler(scores, [entry.made if entry else 0 for entry in self._entries])
