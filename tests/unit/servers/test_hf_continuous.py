"""Continuous batching: who runs, what is said, who has blocks, memory and faults; around the real tiny model."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from servers.hf.engine import ModelEngine
from servers.hf.jobs import EngineDeadError, EngineFailedError, Job, OutOfMemoryError, TooLargeError
from tests.unit.servers.conftest import (
    Greedy,
    MakeEngine,
    Start,
    idle,
    job,
    outcomes,
    serve,
    tokens,
    until,
    whole,
)
from tests.unit.servers.harness import Hold, Probe, out_of_memory

every_engine = pytest.mark.parametrize("kind", ["sequential", "batch", "static", "continuous"])

# One token and many, blocks that are full, one short of it and one more; more requests than rows.
SIZES = [(1, 20), (3, 5), (16, 17), (15, 1), (40, 12), (17, 16), (33, 30)]


@pytest.fixture
def probe(weights: Any) -> Iterator[Probe]:
    probe = Probe(weights)
    yield probe
    probe.remove()


async def begun(engine: ModelEngine, probe: Probe, jobs: list[Job], passes: int) -> Hold:
    """Submit jobs so that the first is alone in its first pass and the others are there before the next.

    Returns when that many passes are over and the next is kept from beginning.
    """
    first, then = probe.plan_hold(), probe.plan_hold(after=passes)
    engine.submit(jobs[0])
    await first.reached()
    for one in jobs[1:]:
        engine.submit(one)
    first.release()
    await then.reached()
    return then


def solo(weights: Any, one: Job) -> list[int]:
    """What `generate` says to the prompt alone."""
    config = GenerationConfig(max_new_tokens=one.sampling.max_tokens, do_sample=False, pad_token_id=0)
    ids = torch.tensor([one.prompt_ids])
    said = weights.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [int(token) for token in said[0, len(one.prompt_ids) :]]


async def test_requests_that_come_together_get_what_generate_says_to_each_alone(start: Start, weights: Any) -> None:
    jobs = [job(*size) for size in SIZES]
    alone = [(solo(weights, one), "length") for one in jobs]
    engine = await start("continuous")
    assert await serve(engine, jobs) == alone
    assert [(await serve(engine, [job(*size)]))[0] for size in SIZES] == alone
    await until(lambda: idle(engine))


@every_engine
async def test_a_seed_gives_the_same_tokens_alone_in_company_and_in_every_engine(start: Start, kind: str) -> None:
    def jobs() -> list[Job]:
        ways: list[dict[str, Any]] = [{}, {"temperature": 1.7}, {"top_k": 40}, {"top_p": 0.8}]
        drawn = [job(9 + at, 12 + at, **{"temperature": 1.0, "seed": at, **way}) for at, way in enumerate(ways)]
        return [*drawn, job(5, 14)]

    alone = await start("sequential")
    expected = [(await serve(alone, [one]))[0] for one in jobs()]
    assert len({tuple(said) for said, _ in expected}) == 5
    engine = await start(kind)
    unseeded = [job(20, 25, temperature=1.5) for _ in range(2)]
    results = await serve(engine, [unseeded[0], *jobs(), unseeded[1]])
    assert results[1:-1] == expected
    assert results[0] != results[-1]


async def test_prompts_longer_than_a_step_are_taken_in_parts(start: Start, probe: Probe, greedy: Greedy) -> None:
    engine = await start("continuous", max_model_len=1024)
    jobs = [job(900, 3), job(901, 3), job(902, 3), job(4, 3)]
    before = probe.passes
    assert await serve(engine, jobs) == [(greedy(one.prompt_ids, 3), "length") for one in jobs]
    assert probe.passes - before > 3


async def test_a_request_joins_while_others_run_and_its_blocks_leave_with_it(start: Start, probe: Probe) -> None:
    engine = await start("continuous")
    long, short = job(10, 60), job(30, 4)
    both = await begun(engine, probe, [long, short], passes=3)
    assert (engine.running, engine.held.allocated) == (2, 16 + 32)
    # Two of its four tokens are made, the third is in the pass that is held.
    after = probe.plan_hold(after=1)
    both.release()
    await after.reached()
    assert (engine.running, engine.held.allocated) == (1, 16)
    after.release()
    assert (await whole(short))[1] == (await whole(long))[1] == "length"
    assert short.last < long.last


async def test_equal_prompts_share_no_blocks(start: Start, probe: Probe) -> None:
    engine = await start("continuous")
    await begun(engine, probe, [job(40, 20) for _ in range(3)], passes=2)
    assert engine.held.allocated == 3 * 48


async def test_blocks_are_free_one_step_after_their_request_is_cancelled(start: Start, probe: Probe) -> None:
    engine = await start("continuous", kv_tokens=64)
    leaves, stays, waits = job(40, 20), job(3, 12), job(33, 2)
    hold = await begun(engine, probe, [leaves, stays, waits], passes=4)
    assert (engine.running, engine.waiting, engine.held.allocated) == (2, 1, 48 + 16)
    engine.cancel(leaves)
    after = probe.plan_hold()
    hold.release()
    await after.reached()
    # The one that waited has them.
    assert (engine.running, engine.waiting, engine.held.live) == (2, 0, 3 + 4 + 33)
    after.release()
    assert [len((await whole(one))[0]) for one in (stays, waits)] == [12, 2]
    await until(lambda: idle(engine))


async def test_more_than_the_budget_holds_take_turns_in_the_order_they_came(start: Start, weights: Any) -> None:
    engine = await start("continuous", kv_tokens=80)
    seen: list[tuple[int, int]] = []
    hook = weights.register_forward_pre_hook(lambda *_: seen.append((engine.held.allocated, engine.waiting)))
    jobs = [job(17 + at, 30) for at in range(6)]
    try:
        results = await serve(engine, jobs)
    finally:
        hook.remove()
    assert [len(said) for said, _ in results] == [30] * 6
    assert max(allocated for allocated, waiting in seen if waiting) == 80
    started = [one.started for one in jobs]
    assert started == sorted(started)
    assert started[0] < started[-1]


@pytest.mark.parametrize("way", [{}, {"temperature": 1.0, "seed": 4}], ids=["greedy", "drawn"])
async def test_a_request_that_was_pushed_out_goes_on_where_it_was(start: Start, way: dict[str, Any]) -> None:
    alone = await start("sequential")
    expected = [(await serve(alone, [job(20 + at, 40, **way)]))[0] for at in range(2)]
    engine = await start("continuous", kv_tokens=64)
    assert await serve(engine, [job(20 + at, 40, **way) for at in range(2)]) == expected


async def pushed_out(start: Start, probe: Probe) -> tuple[ModelEngine, Job, Job, Hold]:
    """An engine kept in the pass in which its four blocks are no longer enough for two, and both requests."""
    engine = await start("continuous", kv_tokens=64)
    stays, out = job(20, 40), job(21, 40)
    hold = await begun(engine, probe, [stays, out], passes=13)
    # Each had stored 32 tokens.
    assert (engine.running, engine.waiting) == (1, 1)
    return engine, stays, out, hold


async def test_a_request_that_was_pushed_out_goes_on_when_the_other_is_cancelled(
    start: Start, probe: Probe, greedy: Greedy
) -> None:
    engine, stays, out, hold = await pushed_out(start, probe)
    engine.cancel(stays)
    hold.release()
    assert await whole(out) == (greedy(out.prompt_ids, 40), "length")
    assert len((await serve(engine, [job(3, 3)]))[0][0]) == 3


async def test_a_request_that_was_pushed_out_gets_each_token_once_after_a_lack_of_memory(
    start: Start, probe: Probe, greedy: Greedy
) -> None:
    engine, stays, out, hold = await pushed_out(start, probe)
    probe.fail(out_of_memory())
    hold.release()
    (failed,) = await outcomes([stays])
    assert isinstance(failed, OutOfMemoryError)
    assert await whole(out) == (greedy(out.prompt_ids, 40), "length")
    await until(lambda: idle(engine))


async def test_a_request_that_was_pushed_out_counts_as_one_that_ran_when_the_engine_fails(
    start: Start, probe: Probe
) -> None:
    _, stays, out, hold = await pushed_out(start, probe)
    assert len(await tokens(out, 12)) == 12
    probe.fail(RuntimeError("a broken model"))
    hold.release()
    assert [type(end) for end in await outcomes([stays, out])] == [EngineFailedError] * 2


async def test_a_lack_of_memory_fails_what_runs_and_what_had_not_begun_goes_on_in_order(
    start: Start, probe: Probe, greedy: Greedy
) -> None:
    engine = await start("continuous", max_batch=2)
    jobs = [job(3 + at, 20) for at in range(6)]
    hold = await begun(engine, probe, jobs[:5], passes=5)
    probe.fail(out_of_memory())
    # The manager has taken those before into a queue of its own, and not this one.
    engine.submit(jobs[5])
    hold.release()
    results = await outcomes(jobs)
    assert [(type(end), str(end)) for end in results[:2]] == [(OutOfMemoryError, "CUDA out of memory")] * 2
    assert results[2:] == [(greedy(one.prompt_ids, 20), "length") for one in jobs[2:]]
    started = [one.started for one in jobs[2:]]
    assert started == sorted(started)
    assert engine.alive
    await until(lambda: idle(engine))


async def test_a_cache_that_does_not_fit_is_an_error_at_the_start(make_engine: MakeEngine) -> None:
    engine = make_engine("continuous", max_batch=10**15)
    async with asyncio.timeout(10):
        with pytest.raises(EngineDeadError, match="the engine cannot start: Memory footprint"):
            await engine.start()
    assert not engine.alive


async def test_a_crash_fails_what_runs_and_what_waits_at_once_and_leaves_a_dead_engine(
    start: Start, probe: Probe
) -> None:
    engine = await start("continuous", max_batch=2)
    jobs = [job(3 + at, 50) for at in range(4)]
    hold = await begun(engine, probe, jobs, passes=4)
    assert (engine.running, engine.waiting, engine.alive) == (2, 2, True)
    probe.fail(RuntimeError("a broken model"))
    hold.release()
    before = time.monotonic()
    ends = await outcomes(jobs)
    assert time.monotonic() - before < 3
    assert [type(end) for end in ends] == [EngineFailedError] * 2 + [EngineDeadError] * 2
    assert {str(end) for end in ends} == {"the engine failed: RuntimeError: a broken model"}
    await until(lambda: not engine.alive and idle(engine))
    with pytest.raises(EngineDeadError):
        engine.submit(job(3, 3))


async def test_closing_ends_what_runs_and_what_waits_and_the_thread(start: Start, probe: Probe) -> None:
    before = set(threading.enumerate())
    engine = await start("continuous", max_batch=2)
    jobs = [job(3 + at, 50) for at in range(4)]
    (await begun(engine, probe, jobs, passes=2)).release()
    async with asyncio.timeout(10):
        await engine.close()
    assert [(type(end), str(end)) for end in await outcomes(jobs)] == [
        (EngineDeadError, "the server is shutting down")
    ] * 4
    assert not engine.alive
    assert idle(engine)
    # The threads of asyncio.to_thread stay.
    assert all(thread.name.startswith("asyncio") for thread in set(threading.enumerate()) - before)
    await engine.close()


async def test_a_job_larger_than_the_cache_is_refused(start: Start) -> None:
    engine = await start("continuous", kv_tokens=63)
    assert engine.capacity == 48
    with pytest.raises(TooLargeError, match="64 tokens of KV cache are needed, 48 is all there is"):
        engine.submit(job(20, 30))
    # The last token is never stored.
    assert len((await serve(engine, [job(20, 29)]))[0][0]) == 29


@every_engine
async def test_a_job_longer_than_the_context_is_refused(start: Start, kind: str) -> None:
    engine = await start(kind, max_model_len=48)
    engine.submit(running := job(1, 40))
    await tokens(running)
    long = job(20, 30)
    try:
        with pytest.raises(TooLargeError):
            engine.submit(long)
    finally:
        # While another runs, as an engine that took it would now look for its turn forever.
        engine.cancel(long)
