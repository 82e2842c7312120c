"""Engines on `model.generate`: one request at a time, or those that wait padded into one batch."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from servers.hf.engine import Limits, ModelEngine, clear_memory, first_sentence
from servers.hf.jobs import EngineDeadError, EngineFailedError, Job, OutOfMemoryError, Sampling, Step
from servers.hf.kv import Held, Row, held_by_batch
from servers.hf.sampling import Draw, Sampler

FILLER = Sampling(max_tokens=1, temperature=0, ignore_eos=True)
logger = logging.getLogger(__name__)


class PaddedEngine(ModelEngine):
    """Requests that wait become one left-padded batch, which runs to its longest row; a batch of one is `sequential`.

    A static cache sets `max_model_len` slots aside for each row, a dynamic one grows with every token. A compiled
    engine keeps one static cache and runs each batch at the next power of two of rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limits: Limits,
        max_wait_seconds: float = 0.0,
        static: bool = False,
        compiled: bool = False,
    ):
        super().__init__(model, limits)
        self.name = "sequential" if limits.max_batch == 1 else "batch"
        self.cache: DynamicCache | StaticCache | None = None
        self._max_wait = max_wait_seconds
        self._static = static or compiled
        self._compiled = _CompiledCaches(model, limits) if compiled else None
        most = limits.max_batch * limits.max_model_len
        self.capacity = min(most, most if limits.kv_tokens is None else limits.kv_tokens)
        self._waiting: deque[Job] = deque()
        self._batch: _Batch | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._ready = asyncio.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> None:
        """Run batches of four tokens in the engine's thread, one of each compiled size, then take requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        await self._ready.wait()
        if self._error:
            raise self._error

    async def close(self) -> None:
        """End the thread after the token it is working on; what still waits gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, 10)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closed and not self._error

    @property
    def running(self) -> int:
        """Number of rows of the batch that have not ended."""
        batch = self._batch
        return len(batch.running) if batch else 0

    @property
    def waiting(self) -> int:
        """Number of requests that wait for their turn."""
        return len(self._waiting)

    @property
    def held(self) -> Held:
        """What the batch holds, after its last step; between batches only what a compiled engine keeps."""
        batch = self._batch
        if batch is None or not batch.state[1]:
            return Held(reserved=self._compiled.slots if self._compiled else 0)
        rows, length = batch.state
        room = self.limits.max_model_len if self._static else length
        held = held_by_batch(rows, length, room)
        return replace(held, reserved=held.reserved + self._kept_for_others(len(rows)))

    def slots(self, job: Job) -> int:
        """A static row has the maximum length, whatever the job needs."""
        return self.limits.max_model_len if self._static else job.max_slots

    def cancel(self, job: Job) -> None:
        """Drop a job that waits, or end its row; the row's memory stays until its batch ends."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _enqueue(self, job: Job) -> None:
        with self._changed:
            if not self.alive:
                raise EngineDeadError("the engine has just ended")
            self._waiting.append(job)
            self._changed.notify()

    def _kept_for_others(self, rows: int) -> int:
        return self._compiled.slots - rows * self.limits.max_model_len if self._compiled else 0

    def _run(self) -> None:
        try:
            self._warm_up()
            self._loop.call_soon_threadsafe(self._ready.set)  # type: ignore[union-attr]
            while jobs := self._next_batch():
                self._serve(jobs)
            error: Exception = EngineDeadError("the server is shutting down")
        except Exception as failure:
            logger.exception("the engine failed")
            error = EngineFailedError(f"the engine failed: {type(failure).__name__}: {failure}")
        self._end(error)

    def _end(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            ran, waited = list(self._batch.running if self._batch else []), list(self._waiting)
            self._waiting.clear()
        self._batch = None
        self._hand_over([*((job, error) for job in ran), *((job, EngineDeadError(str(error))) for job in waited)])
        self._loop.call_soon_threadsafe(self._ready.set)  # type: ignore[union-attr]

    def _warm_up(self) -> None:
        for rows in self._compiled.sizes if self._compiled else [1]:
            self._generate([self._warm_up_job() for _ in range(rows)])
        self._batch = None

    def _next_batch(self) -> list[Job]:
        """Wait for a batch; an empty one says that the engine was closed."""
        jobs: list[Job] = []
        with self._changed:
            while not jobs and not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._max_wait:
                    self._wait_for_company()
                jobs = self._take()
        return jobs

    def _wait_for_company(self) -> None:
        """Let the batch fill up while requests keep coming in, so that one that comes alone is not held up."""
        deadline = time.monotonic() + self._max_wait
        while 0 < (count := len(self._waiting)) < self.limits.max_batch and not self._closed:
            pause = min(self._max_wait / 4, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: len(self._waiting) > count or self._closed, pause):
                break

    def _take(self) -> list[Job]:
        """Take jobs off the queue, first come first served, but for those that do not fit beside the ones before."""
        jobs: list[Job] = []
        for job in [] if self._closed else list(self._waiting):
            if len(jobs) < self.limits.max_batch and self._fits([*jobs, job]):
                jobs.append(job)
                self._waiting.remove(job)
        return jobs

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether the batch stays within the KV budget and, padding included, the model's positions."""
        length = max(len(job.prompt_ids) for job in jobs) + max(job.sampling.max_tokens for job in jobs) - 1
        room = self.limits.max_model_len if self._static else length
        return length <= self.limits.max_model_len and len(jobs) * room <= self.capacity

    def _serve(self, jobs: Sequence[Job]) -> None:
        try:
            self._generate(jobs)
        except torch.OutOfMemoryError as error:
            clear_memory(error)
            left = self._batch.running if self._batch else jobs
            self._hand_over([(job, OutOfMemoryError(first_sentence(error))) for job in left])
        except Exception:
            if self._batch is None:  # it could not even be made up, and knows nothing of its jobs
                self._waiting.extendleft(reversed(jobs))
            raise
        self._batch = None

    @torch.no_grad()
    def _generate(self, jobs: Sequence[Job]) -> None:
        size = self._compiled.size_for(len(jobs)) if self._compiled else len(jobs)
        batch = _Batch(self, jobs, size)
        self._batch = batch
        self.cache = self._new_cache(size)
        try:
            self.model.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                past_key_values=self.cache,
                generation_config=self._generation_config(max(job.sampling.max_tokens for job in jobs)),
                logits_processor=LogitsProcessorList([] if batch.sampler.idle else [_Choose(batch)]),
                stopping_criteria=StoppingCriteriaList([_AfterStep(batch)]),
            )
        finally:
            self.cache = None

    def _new_cache(self, rows: int) -> DynamicCache | StaticCache:
        if self._compiled:
            return self._compiled.take(rows)
        if self._static:
            return StaticCache(self.model.config, max_cache_len=self.limits.max_model_len)
        return DynamicCache(config=self.model.config)

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, disable_compile=not self._compiled
        )
        if self._compiled:
            config.compile_config = self._compiled.config
        return config


class _Batch:
    """The rows of one call of `generate`; its state changes after every step, in the engine's thread."""

    def __init__(self, engine: PaddedEngine, jobs: Sequence[Job], size: int):
        self._engine = engine
        self._device = engine.model.device
        self._width = max(len(job.prompt_ids) for job in jobs)
        self._made = 0
        self._rows = [Row(self._width - len(job.prompt_ids), self._width + job.sampling.max_tokens - 1) for job in jobs]
        self._rows += [Row(0, self._width, "filler")] * (size - len(jobs))
        #: Jobs that have not ended, each with its row: in order of the rows.
        self.running = dict(zip(jobs, range(len(jobs)), strict=True))
        #: The rows and the number of slots that are written in each, replaced as a whole.
        self.state: tuple[tuple[Row, ...], int] = (tuple(self._rows), 0)
        prompts = [job.prompt_ids for job in jobs] + [jobs[0].prompt_ids] * (size - len(jobs))
        self.input_ids = torch.tensor([[0] * (self._width - len(p)) + list(p) for p in prompts], device=self._device)
        self.attention_mask = torch.tensor(
            [[0] * (self._width - len(p)) + [1] * len(p) for p in prompts], device=self._device
        )
        filler = [Draw(FILLER, None)] * (size - len(jobs))
        draws = [Draw.of(job.sampling, self._device) for job in jobs] + filler
        self.sampler = Sampler(draws, self._device, engine.limits.eos_token_ids)
        self.ended = torch.tensor([row.state == "filler" for row in self._rows], device=self._device)
        started = time.monotonic()
        for job in jobs:
            job.started = started

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        return self.sampler(scores, [self._made] * len(self._rows))

    def after_step(self, token_ids: list[int]) -> None:
        """Take one token per row: hand over those of running rows, end rows, and update the ledger."""
        now = time.monotonic()
        self._made += 1
        steps: list[tuple[Job, Step | Exception]] = []
        ended = []
        for job, row in self.running.items():
            reason = None
            if not job.cancelled:
                reason = self._engine._finish_reason(job, token_ids[row], self._made)
                steps.append((job, Step(token_ids[row], now, reason)))
            if job.cancelled or reason:
                ended.append(job)
        if self._engine._closed:
            steps = [(job, EngineDeadError("the server is shutting down")) for job in self.running]
            ended = list(self.running)
        self._end(ended)
        self.state = (tuple(self._rows) if ended else self.state[0], self._width + self._made - 1)
        self._engine._hand_over(steps)

    def _end(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            row = self.running.pop(job)
            self._rows[row] = replace(self._rows[row], state="finished")
        self.ended = torch.tensor([row.state != "running" for row in self._rows], device=self._device)


class _Choose(LogitsProcessor):
    def __init__(self, batch: _Batch):
        self._batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return self._batch.choose(scores)


class _AfterStep(StoppingCriteria):
    """`generate` asks after every step which rows are done; the answer is also where their tokens leave."""

    def __init__(self, batch: _Batch):
        self._batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        self._batch.after_step(input_ids[:, -1].tolist())
        return self._batch.ended


class _CompiledCaches:
    """Static caches of 1, 2, 4, ... rows over the same memory, at addresses that CUDA graphs may rely on."""

    def __init__(self, model: PreTrainedModel, limits: Limits):
        rows = limits.max_batch
        self.sizes = sorted({min(1 << power, rows) for power in range(rows.bit_length() + 1)})
        self.slots = rows * limits.max_model_len
        # Each size is compiled once; past the limit dynamo would fall back to eager without a word.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(self.sizes))
        self.config = CompileConfig()
        if model.device.type == "cpu":
            # `generate` compiles on a CPU only when it is told so; there are no CUDA graphs there.
            self.config = CompileConfig(mode="default", dynamic=False)
            self.config._compile_all_devices = True
        text = model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._caches = {}
        whole: StaticCache | None = None
        for size in reversed(self.sizes):
            cache = StaticCache(model.config, max_cache_len=limits.max_model_len)
            if whole is None:
                cache.early_initialization(rows, heads, head_size, model.dtype, model.device)
            else:
                for layer, base in zip(cache.layers, whole.layers, strict=True):
                    _share(layer, base, size)
            whole = whole or cache
            self._caches[size] = cache

    def size_for(self, rows: int) -> int:
        return min(size for size in self.sizes if size >= rows)

    def take(self, rows: int) -> StaticCache:
        cache = self._caches[rows]
        cache.reset()
        return cache


def _share(layer: StaticLayer, base: StaticLayer, rows: int) -> None:
    """Make a layer's tensors the first rows of another's."""
    room, layer.max_cache_len = layer.max_cache_len, 0  # so that it allocates nothing of its own
    layer.lazy_initialization(base.keys[:rows], base.values[:rows])
    layer.max_cache_len = room
    layer.keys, layer.values = base.keys[:rows], base.values[:rows]
    torch._dynamo.mark_static_address(layer.keys)
    torch._dynamo.mark_static_address(layer.values)
