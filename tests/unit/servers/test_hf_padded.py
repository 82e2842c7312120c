"""Padded batches: who shares one, what a lack of memory and a fault do to it; around the real tiny model."""

import asyncio
import itertools
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from servers.hf.engine import Engine
from servers.hf.jobs import EngineDeadError, Job, OutOfMemoryError
from servers.hf.padded import PaddedEngine
from tests.unit.servers.conftest import (
    NO_MEMORY,
    FailForward,
    Greedy,
    Start,
    idle,
    job,
    outcomes,
    serve,
    tokens,
    until,
    whole,
)

padded = pytest.mark.parametrize("kind", ["batch", "static"])


async def after_another(engine: Engine, jobs: Sequence[Job]) -> None:
    """Submit jobs while another runs, so that all wait when the next batch is made up, and end that one."""
    engine.submit(other := job(2, 60, first=100))
    await tokens(other)
    for one in jobs:
        engine.submit(one)
    engine.cancel(other)


async def batches(engine: Engine, jobs: Sequence[Job]) -> list[list[int]]:
    """Which jobs shared a batch, by their places, in the order of the batches; all jobs run to their length."""
    await after_another(engine, jobs)
    for one in jobs:
        assert len((await whole(one))[0]) == one.sampling.max_tokens
    order = sorted(range(len(jobs)), key=lambda at: (jobs[at].started, at))
    return [list(group) for _, group in itertools.groupby(order, key=lambda at: jobs[at].started)]


@padded
async def test_those_that_wait_share_a_batch_in_the_order_they_came(start: Start, kind: str) -> None:
    engine = await start(kind, max_batch=2)
    assert await batches(engine, [job(3 + at, 4) for at in range(5)]) == [[0, 1], [2, 3], [4]]


async def test_a_sequential_engine_serves_one_after_the_other(start: Start) -> None:
    engine = await start("sequential")
    assert engine.name == "sequential"
    jobs = [job(3, 4) for _ in range(3)]
    assert await batches(engine, jobs) == [[0], [1], [2]]
    assert all(before.last <= after.started for before, after in itertools.pairwise(jobs))


async def test_one_that_comes_alone_is_held_up_for_a_quarter_of_the_time(start: Start) -> None:
    engine = await start("batch", max_wait_seconds=2)
    await serve(engine, [one := job(3, 3)])
    assert 0.5 <= one.started - one.arrived < 1.5


async def test_a_batch_stays_open_while_requests_come_in(start: Start) -> None:
    engine = await start("batch", max_wait_seconds=4, max_batch=20)
    jobs: list[Job] = []
    for _ in range(6):
        # Each comes within a quarter of the time after the one before, and the last after more than that.
        jobs.append(job(3, 3))
        engine.submit(jobs[-1])
        await asyncio.sleep(0.25)
    for one in jobs:
        await whole(one)
    assert len({one.started for one in jobs}) == 1
    assert jobs[0].started > jobs[-1].arrived > jobs[0].arrived + 1


async def test_a_batch_stays_open_no_longer_than_it_may(start: Start) -> None:
    engine = await start("batch", max_wait_seconds=0.4, max_batch=60)
    jobs: list[Job] = []
    while not jobs or jobs[0].started == 0:
        assert len(jobs) < 60
        jobs.append(job(3, 1))
        engine.submit(jobs[-1])
        await asyncio.sleep(0.03)
    assert jobs[0].started - jobs[0].arrived < 1.5
    for one in jobs:
        await whole(one)


async def test_a_full_batch_does_not_wait(start: Start) -> None:
    engine = await start("batch", max_batch=2, max_wait_seconds=600)
    jobs = [job(3, 3), job(4, 3)]
    await serve(engine, jobs)
    assert jobs[0].started == jobs[1].started


async def test_a_job_dropped_while_a_batch_waits_for_company_leaves_nothing_behind(start: Start) -> None:
    engine = await start("batch", max_wait_seconds=0.1)
    engine.submit(dropped := job(3, 3))
    engine.cancel(dropped)
    await asyncio.sleep(0.15)
    assert len((await serve(engine, [job(4, 3)]))[0][0]) == 3
    assert dropped.started == 0


async def test_closing_does_not_wait_for_company(start: Start) -> None:
    engine = await start("batch", max_wait_seconds=600)
    engine.submit(one := job(3, 3))
    async with asyncio.timeout(5):
        await engine.close()
    with pytest.raises(EngineDeadError):
        await whole(one)


async def test_a_dynamic_batch_may_come_to_hold_no_more_than_the_budget(start: Start) -> None:
    engine = await start("batch", kv_tokens=100)
    # Two rows of 10 + 40 - 1 slots fit and three do not; so do two of 8 + 40 - 1, and two of 30 + 10 - 1.
    jobs = [job(10, 40), job(9, 40), job(8, 40), job(1, 33), job(1, 10), job(30, 2)]
    assert await batches(engine, jobs) == [[0, 1], [2, 3], [4, 5]]


async def test_a_short_output_beside_a_long_prompt_is_counted_at_the_width_of_the_batch(start: Start) -> None:
    engine = await start("batch", kv_tokens=100)
    # Alone 41 and 40 slots, together 2 x (40 + 40 - 1).
    assert await batches(engine, [job(40, 2), job(1, 40)]) == [[0], [1]]


async def test_static_rows_hold_the_whole_context_each(start: Start) -> None:
    engine = await start("static", kv_tokens=200)
    assert engine.capacity == 200
    assert await batches(engine, [job(3, 4) for _ in range(4)]) == [[0, 1], [2, 3]]


@padded
async def test_a_prompt_and_an_output_that_pass_the_context_together_do_not_share_a_batch(
    start: Start, greedy: Greedy, kind: str
) -> None:
    engine = await start(kind, max_model_len=96)
    # The model's learned positions end at 2048, those of the cache at 96.
    jobs = [job(80, 10), job(5, 60), job(20, 70)]
    assert await batches(engine, jobs) == [[0], [1, 2]]
    wide = await start(kind, max_model_len=2048)
    jobs = [job(2040, 3), job(3, 20)]
    assert await serve(wide, jobs) == [(greedy(one.prompt_ids, one.sampling.max_tokens), "length") for one in jobs]


async def test_a_job_that_does_not_fit_beside_others_is_next_whoever_comes(start: Start) -> None:
    engine = await start("batch", kv_tokens=100, max_model_len=128)
    small = [job(2, 40) for _ in range(6)]
    large = job(60, 31)
    await after_another(engine, [small[0], large, small[1]])
    await until(lambda: small[0].started > 0)
    for one in small[2:]:
        engine.submit(one)
    for one in [*small, large]:
        await whole(one)
    assert small[0].started == small[1].started < large.started
    # 60 + 40 - 1 slots would be within the budget for one row, but there are two.
    assert all(one.started > large.started for one in small[2:])


@padded
async def test_a_row_that_ends_gives_nothing_back_before_its_batch_does(start: Start, kind: str) -> None:
    engine = await start(kind)
    short, long = job(10, 2), job(4, 60)
    await after_another(engine, [short, long])
    await whole(short)
    await tokens(long, 4)
    assert engine.running == 1
    held = engine.held
    assert held.finished == (96 if kind == "static" else held.allocated / 2)
    assert held.padding == 6
    await whole(long)
    await until(lambda: idle(engine))


@padded
async def test_a_batch_ends_when_its_last_row_is_cancelled(start: Start, kind: str) -> None:
    engine = await start(kind, max_model_len=600)
    short, long, late = job(3, 2), job(3, 500), job(3, 2)
    await after_another(engine, [short, long])
    await whole(short)
    engine.cancel(long)
    engine.submit(late)
    await whole(late)
    assert late.started - short.last < 5
    await until(lambda: idle(engine))


@padded
@pytest.mark.parametrize("passes", [0, 3], ids=["in the prompt", "in the output"])
async def test_a_lack_of_memory_fails_its_batch_and_no_other(
    start: Start, greedy: Greedy, fail_forward: FailForward, kind: str, passes: int
) -> None:
    engine = await start(kind, max_batch=2, max_wait_seconds=600)
    jobs = [job(3 + at, 20) for at in range(4)]
    fail_forward(torch.OutOfMemoryError(NO_MEMORY), passes=passes)
    for one in jobs:
        engine.submit(one)
    results = await outcomes(jobs)
    assert [(type(error), str(error)) for error in results[:2]] == [(OutOfMemoryError, "CUDA out of memory")] * 2
    assert results[2:] == [(greedy(one.prompt_ids, 20), "length") for one in jobs[2:]]
    assert engine.alive
    await until(lambda: idle(engine))


async def test_what_ended_before_the_lack_of_memory_has_ended_well(
    start: Start, greedy: Greedy, fail_forward: FailForward
) -> None:
    engine = await start("batch", max_batch=2, max_wait_seconds=600)
    short, long = job(3, 2), job(4, 20)
    fail_forward(torch.OutOfMemoryError(NO_MEMORY), passes=5)
    engine.submit(short)
    engine.submit(long)
    results = await outcomes([short, long])
    assert results[0] == (greedy(short.prompt_ids, 2), "length")
    assert isinstance(results[1], OutOfMemoryError)


@padded
async def test_a_lack_of_memory_leaves_no_tensors_behind(start: Start, weights: Any, kind: str) -> None:
    engine = await start(kind)
    assert isinstance(engine, PaddedEngine)
    caches: list[weakref.ref[torch.Tensor]] = []

    def hook(*_: object) -> None:
        assert engine.cache
        if engine.cache.get_seq_length() >= 5:
            caches.extend(weakref.ref(layer.keys) for layer in engine.cache.layers)
            fault.remove()
            raise torch.OutOfMemoryError(NO_MEMORY)

    fault = weights.register_forward_pre_hook(hook)
    engine.submit(one := job(3, 20))
    with pytest.raises(OutOfMemoryError):
        await whole(one)
    await until(lambda: idle(engine))
    assert len(caches) == 4
    # No garbage collection is needed for it.
    assert [cache() for cache in caches] == [None] * 4


@padded
async def test_a_batch_that_cannot_be_made_up_fails_its_jobs_too(start: Start, kind: str) -> None:
    engine = await start(kind)
    # No generator takes such a seed; on a GPU, a fault of an earlier kernel surfaces at the same place.
    jobs = [job(3, 5), job(3, 5, temperature=1.0, seed=2**80), job(3, 5)]
    await after_another(engine, jobs)
    assert all(isinstance(end, EngineDeadError) for end in await outcomes(jobs))
    assert not engine.alive


@padded
async def test_padding_is_not_attended_to(start: Start, greedy: Greedy, kind: str) -> None:
    engine = await start(kind)
    jobs = [job(1, 30), job(60, 30)]
    assert await batches(engine, jobs) == [[0, 1]]
    ends = await serve(engine, [job(1, 30), job(60, 30)])
    assert ends == [(greedy(one.prompt_ids, 30), "length") for one in jobs]


async def test_times_of_a_batch_are_those_of_its_steps(start: Start) -> None:
    engine = await start("batch", max_batch=2, max_wait_seconds=600)
    jobs = [job(3, 5), job(9, 5)]
    before = time.monotonic()
    await serve(engine, jobs)
    assert jobs[0].first == jobs[1].first > before
    assert jobs[0].last == jobs[1].last <= time.monotonic()
