"""The KV ledger of running engines, held against their tensors after every step, in the thread that runs the model."""

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers.generation.continuous_batching.requests import GenerationOutput

from servers.hf import padded
from servers.hf.continuous import ContinuousEngine
from servers.hf.engine import ModelEngine
from servers.hf.jobs import Job
from servers.hf.kv import Held, bytes_per_token
from servers.hf.padded import PaddedEngine
from tests.unit.servers.conftest import PATIENCE_SECONDS, Greedy, MakeEngine, Start, idle, job, serve, until

CONTEXT = 64
BLOCK_SIZE = 16
#: Less than four rows may use, so that some wait; of blocks so few that some are pushed out.
BUDGETS = {"sequential": 64, "batch": 160, "static": 160, "continuous": 96}
#: Plans that are drawn: fewer of one row at a time, and of a compiled batch, which is a static one but for its rows.
PLANS = {"sequential": 10, "batch": 25, "static": 25, "compiled": 10, "continuous": 25}
# One token in sixteen ends an output.
ENDS = frozenset(range(0, 2048, 16))


@dataclass(frozen=True)
class Seen:
    """What the ledger said after a step, and what was found at the same moment: sizes in slots."""

    held: Held
    #: Counted from prompts, tokens and the tensors' shapes.
    counted: Held
    #: From the bytes of the tensors, or from the pool of blocks.
    allocated: float
    #: From the contents of the tensors, slots that are not zero; and how many should not be.
    written: int
    stored: int
    #: Whether the bookkeeping beside the figures is sound.
    right: bool


@dataclass
class Watch:
    """What was seen of an engine so far, and a count of the slots that its tensors or blocks in use have now."""

    allocated: Callable[[], float]
    seen: list[Seen] = field(default_factory=list)

    def check(self, capacity: int) -> None:
        for seen in self.seen:
            held = seen.held
            assert held.allocated == seen.allocated <= capacity, seen
            assert held.live + sum(held.waste.values()) == held.allocated, seen
            assert held == seen.counted, seen
            assert seen.written == seen.stored, seen
            assert seen.right, seen
        self.seen.clear()


class Batch:
    """The rows of one padded batch, as the test counts them."""

    def __init__(self, running: dict[Job, int]):
        self.jobs = dict(running)
        self.width = max(len(one.prompt_ids) for one in running)
        self.made: dict[Job, int] = dict.fromkeys(running, 0)
        self.steps = 0
        #: Whether those, and only those, have left that ended or were cancelled.
        self.right = True

    def add(self, token_ids: Sequence[int], gone: set[Job], running: dict[Job, int]) -> None:
        """Count a step, before which those were cancelled that are gone, and after which those rows still run."""
        self.steps += 1
        for one, row in self.jobs.items():
            if one in self.made:
                self.made[one] += 1
                stop = token_ids[row] in ENDS and not one.sampling.ignore_eos
                ended = stop or self.made[one] == one.sampling.max_tokens or one in gone
                if one not in running:
                    del self.made[one]
                    ended = ended or one.cancelled
                self.right = self.right and ended is (one not in running)

    def counted(self, rows: int, room: int, allocated: int) -> Held:
        """What tensors of so many rows and slots in each hold, of all that is allocated."""
        may_use = [min(room, self.width + one.sampling.max_tokens - 1) for one in self.made]
        stored = self.width + self.steps - 1
        return Held(
            live=sum(len(one.prompt_ids) + made - 1 for one, made in self.made.items()),
            reserved=sum(slots - stored for slots in may_use) + allocated - rows * room,
            padding=sum(self.width - len(one.prompt_ids) for one in self.made) + (rows - len(self.jobs)) * room,
            finished=(len(self.jobs) - len(self.made)) * room,
            fragmentation=sum(room - slots for slots in may_use),
        )


@contextmanager
def watched_padded(engine: PaddedEngine) -> Iterator[Watch]:
    """Look at the tensors of a padded engine in its thread, after each step."""
    after_step = padded._Batch.after_step
    batches: WeakKeyDictionary[padded._Batch, Batch] = WeakKeyDictionary()
    slot = bytes_per_token(engine.model.config, 4)

    def tensors() -> list[torch.Tensor]:
        cache = engine.cache
        caches = [cache] if cache else engine._compiled._caches.values() if engine._compiled else []
        return [one for cache in caches for layer in cache.layers for one in (layer.keys, layer.values)]

    def allocated() -> float:
        storages = [one.untyped_storage() for one in tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / slot

    def look(batch: padded._Batch, token_ids: list[int]) -> None:
        known = batches.setdefault(batch, Batch(batch.running))
        gone = {one for one in batch.running if one.cancelled}
        after_step(batch, token_ids)
        known.add(token_ids, gone, batch.running)
        written = [one.ne(0).any(dim=3).all(dim=1) for one in tensors()]
        rows, room = written[0].shape
        watch.seen.append(
            Seen(
                engine.held,
                known.counted(rows, room, int(allocated())),
                allocated=allocated(),
                written=int(written[0].sum()),
                stored=len(token_ids) * (known.width + known.steps - 1),
                right=known.right and all(torch.equal(one, written[0]) for one in written),
            )
        )

    watch = Watch(allocated)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padded._Batch, "after_step", look)
        yield watch


@contextmanager
def watched_continuous(engine: ContinuousEngine) -> Iterator[Watch]:
    """Look at the blocks of a continuous engine in the manager's thread, after each step.

    Blocks are blanked when a request gets them, so that what a request has written can be seen.
    """
    assert engine.manager
    cache = engine.manager.batch_processor.cache
    (allocator,) = cache.cache_allocators.values()
    assert allocator.bytes_per_block == BLOCK_SIZE * bytes_per_token(engine.model.config, 4)
    assert cache.cache_tensor.nbytes == (cache.num_blocks + 2) * allocator.bytes_per_block  # two are nobody's
    assert cache.num_blocks * BLOCK_SIZE == engine.capacity
    shape = (allocator.pages_per_block, 2, BLOCK_SIZE, allocator.num_key_value_heads, allocator.head_dim)
    take, allocate = engine.take, allocator.allocate_cache_to_request
    stored: dict[str, int] = {}
    #: In how many steps a request that the engine has forgotten still had blocks.
    forgotten: Counter[str] = Counter()

    def allocated() -> float:
        free = cache.pool.num_free_sectors * allocator.blocks_per_sector + cache.pool.count_free_blocks(allocator.index)
        return float((cache.num_blocks - free) * BLOCK_SIZE)

    def blank_first(number: str, past: int, new: int) -> None:
        had = len(allocator.block_table.get(number, ()))
        allocate(number, past, new)
        allocator._copy_view[allocator.block_table[number][had:]] = 0

    def look(outputs: Sequence[GenerationOutput]) -> None:
        stored.update({one.request_id: len(one.prompt_ids) + len(one.generated_tokens) - 1 for one in outputs})
        tables = {number: table for number, table in allocator.block_table.items() if table}
        blocks = [block for table in tables.values() for block in table]
        forgotten.update(tables.keys() - engine.entries.keys())
        contents = allocator._copy_view[blocks].view(torch.float32).view(-1, *shape)
        filled = contents.ne(0).any(dim=-1).all(dim=-1).flatten(1, 2)  # [blocks, layers x 2, slots]
        live = sum(stored[number] for number in tables)
        watch.seen.append(
            Seen(
                engine.held,
                Held(live, fragmentation=int(allocated()) - live),
                allocated=allocated(),
                written=int(filled[:, 0].sum()),
                stored=live,
                right=len(set(blocks)) == len(blocks)
                and len(tables) <= engine.limits.max_batch
                # One that was cancelled in this step, or so late in the one before that the next was made ready.
                and max(forgotten.values(), default=0) <= 2
                and bool((filled == filled[:, :1]).all()),
            )
        )
        take(outputs)

    watch = Watch(allocated)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocator, "allocate_cache_to_request", blank_first)
        patch.setattr(engine, "take", look)
        yield watch


def watched(engine: ModelEngine) -> AbstractContextManager[Watch]:
    if isinstance(engine, ContinuousEngine):
        return watched_continuous(engine)
    assert isinstance(engine, PaddedEngine)
    return watched_padded(engine)


@dataclass(frozen=True)
class Ask:
    """One request of a drawn plan."""

    prompt: int
    count: int
    delay_ms: int
    cancel_after: int | None
    fields: dict[str, Any]


# A failure is neither made smaller nor followed by others: the engine that it broke would fail whatever comes next.
ONCE: dict[str, Any] = {
    "database": None,
    "phases": [Phase.generate],
    "report_multiple_bugs": False,
    "suppress_health_check": [HealthCheck.too_slow],
}

asks = st.builds(
    Ask,
    prompt=st.integers(1, 32),
    count=st.integers(1, 32),
    delay_ms=st.integers(0, 30),
    cancel_after=st.sampled_from([None, None, None, None, 0, 1, 3, 9]),
    fields=st.sampled_from([{}, {}, {"ignore_eos": False}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}]),
)


async def client(engine: ModelEngine, ask: Ask, number: int) -> tuple[Job, list[int]]:
    """Do what is asked for; returns the tokens."""
    await asyncio.sleep(ask.delay_ms / 1000)
    # Prompts differ from the first token on.
    one = job(ask.prompt, ask.count, first=100 + 50 * number, **ask.fields)
    engine.submit(one)
    said: list[int] = []
    if ask.cancel_after == 0:
        engine.cancel(one)
        return one, said
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for step in one.steps():
            said.append(step.token_id)
            if len(said) == ask.cancel_after:
                engine.cancel(one)
                break
    return one, said


async def follow(engine: ModelEngine, plan: Sequence[Ask]) -> list[tuple[Job, list[int]]]:
    results = await asyncio.gather(*(client(engine, ask, number) for number, ask in enumerate(plan)))
    # All that was cancelled before is over when this is.
    await serve(engine, [job(1, 1)])
    return results


def expected(greedy: Greedy, one: Job) -> list[int]:
    said = greedy(one.prompt_ids, one.sampling.max_tokens)
    ends = [at for at, token in enumerate(said) if token in ENDS and not one.sampling.ignore_eos]
    return said[: ends[0] + 1] if ends else said


@pytest.mark.parametrize("kind", PLANS)
def test_the_ledger_is_what_the_tensors_hold_at_every_step(
    make_engine: MakeEngine, weights: Any, greedy: Greedy, kind: str
) -> None:
    compiled = kind == "compiled"
    # Nothing is compiled here, which takes a minute; one engine is compiled below.
    with asyncio.Runner() as runner, torch.compiler.set_stance("force_eager" if compiled else "default"):
        # The sizes are 1, 2 and 4 rows, so that a row is filled up where 3 come.
        model = copy.deepcopy(weights) if compiled else weights
        engine = make_engine(kind, model=model, max_model_len=CONTEXT, eos_token_ids=ENDS, kv_tokens=BUDGETS.get(kind))
        runner.run(engine.start())
        kept = Held(reserved=4 * CONTEXT if compiled else 0)

        @seed(1)
        @settings(max_examples=PLANS[kind], **ONCE)
        @given(plan=st.lists(asks, min_size=3, max_size=7))
        def check(plan: list[Ask]) -> None:
            with watched(engine) as watch:
                results = runner.run(follow(engine, plan))
                runner.run(until(lambda: (engine.held, watch.allocated()) == (kept, kept.allocated)))
            watch.check(engine.capacity)
            for ask, (one, said) in zip(plan, results, strict=True):
                assert len(said) <= one.sampling.max_tokens
                if one.sampling.greedy and ask.cancel_after != 0:
                    assert said == expected(greedy, one)[: ask.cancel_after]

        try:
            check()
        finally:
            runner.run(engine.close())
        assert engine.held == kept


async def test_a_budget_is_shared_by_blocks_that_grow(start: Start) -> None:
    engine = await start("continuous", kv_tokens=96, max_model_len=CONTEXT)
    with watched(engine) as watch:
        jobs = [job(10 + at, 40) for at in range(4)]
        await serve(engine, jobs)
        most = max(seen.held.allocated for seen in watch.seen)
        watch.check(96)
    assert most == 96
    await until(lambda: idle(engine))


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        # Prompts of 10 tokens, with 2 to make, and of 4 tokens, with 30 to make. After the tenth token 9 are stored
        # behind the prompts, so that the padded batch is 19 wide and may come to be 10 + 30 - 1 wide.
        ("batch", Held(live=4 + 9, padding=6, finished=19)),
        ("static", Held(live=4 + 9, padding=6, finished=64, reserved=39 - 19, fragmentation=64 - 39)),
        ("continuous", Held(live=4 + 9, fragmentation=16 - 13)),
    ],
)
async def test_a_short_request_beside_a_long_one_is_accounted_for_by_hand(start: Start, kind: str, held: Held) -> None:
    engine = await start(kind, max_model_len=CONTEXT, max_batch=2, max_wait_seconds=600)
    with watched(engine) as watch:
        await serve(engine, [job(10, 2), job(4, 30)])
        assert held in [seen.held for seen in watch.seen]
        watch.check(engine.capacity)


async def test_a_compiled_engine_says_and_holds_what_an_eager_one_does(
    start: Start, weights: Any, make_engine: MakeEngine
) -> None:
    # One layer, as compiling takes long.
    model = copy.deepcopy(weights)
    model.transformer.h = model.transformer.h[:1]
    model.config.n_layer = 1
    asked = partial(drawn_and_greedy, [(3, 6), (9, 12), (5, 4)])
    eager = await start("batch", model=model, max_model_len=32)
    said = [(await serve(eager, [one]))[0] for one in asked()]
    engine = make_engine("compiled", model=model, max_model_len=32, max_batch=2)
    async with asyncio.timeout(300):
        await engine.start()
    try:
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert compiled
        with watched(engine) as watch:
            assert await serve(engine, asked()) == said
            watch.check(engine.capacity)
        await until(lambda: engine.held == Held(reserved=2 * 32))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled, "a request paid for compiling"
    finally:
        await engine.close()


def drawn_and_greedy(sizes: Sequence[tuple[int, int]]) -> list[Job]:
    """One job of each size; every other one is drawn."""
    ways: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3, "top_k": 50}]
    return [job(*size, **ways[at % 2]) for at, size in enumerate(sizes)]
