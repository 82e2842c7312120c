"""What goes wrong behind a request, with every engine: memory, crashes, budgets, queues, clients that leave."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from servers.hf.jobs import EngineDeadError, Job, Sampling
from tests.unit.servers.harness import (
    BLOCK_SIZE,
    CONTEXT,
    ENDLESS,
    JSON,
    PROMPT,
    RUNGS,
    Probe,
    Serve,
    Server,
    each_rung,
    events,
    out_of_memory,
    serving,
)

#: Seconds for what takes milliseconds.
PATIENCE = 20.0


@pytest.fixture
async def serve(weights: Any, tokenizer: Any) -> AsyncIterator[Serve]:
    async with serving(weights, tokenizer) as serve:
        yield serve


@pytest.fixture(params=RUNGS)
async def server(serve: Serve, request: pytest.FixtureRequest) -> Server:
    """Two rows at most, which wait for each other, so that two requests are sure to share a batch."""
    return await serve(request.param, max_batch=2, max_wait=0.4)


@pytest.fixture
def probe(server: Server, weights: Any) -> Iterator[Probe]:
    """Made after the server, whose warm-up it does not see."""
    probe = Probe(weights)
    yield probe
    probe.remove()


def rows(server: Server) -> int:
    return server.engine.limits.max_batch


async def ending(response: aiohttp.ClientResponse) -> JSON:
    """The error event with which a stream ends that had begun."""
    last = events((await response.text()).lstrip("\n"))[-1]
    error: JSON = json.loads(last)["error"]
    return error


async def serves(server: Server) -> None:
    """The server is healthy, empty, and answers as many requests as fit."""
    assert await server.health() == 200
    await server.until_released()
    answers = await asyncio.gather(*[server.whole(max_tokens=3, ignore_eos=True) for _ in range(rows(server))])
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [3] * rows(server)
    await server.until_released()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lack_of_memory_before_the_first_token_is_a_503_and_the_server_goes_on(
    server: Server, probe: Probe, stream: bool
) -> None:
    probe.fail(out_of_memory())
    response = await server.post(stream=stream)
    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    error = (await response.json())["error"]
    assert (error["type"], error["code"]) == ("oom", 503)
    assert "out of memory" in error["message"]
    assert server.outcomes() == {"oom": 1}
    await serves(server)
    held = await server.held()
    assert {name: slots for name, slots in held.items() if slots} == {"capacity": server.engine.capacity}


async def test_a_lack_of_memory_inside_streams_ends_all_that_ran_with_an_error_and_without_done(
    server: Server, probe: Probe
) -> None:
    streams = await server.begin(rows(server))
    probe.fail(out_of_memory(), after=2)
    for response in streams:
        error = await ending(response)
        assert (error["type"], error["code"]) == ("oom", 503)
    assert server.outcomes() == {"oom": rows(server)}
    await serves(server)


async def test_what_waited_during_a_lack_of_memory_is_served_as_if_nothing_had_happened(
    server: Server, probe: Probe
) -> None:
    fields: JSON = {"temperature": 1.0, "max_tokens": 8, "return_token_ids": True, "prompt": "Once upon a time"}
    asked: list[JSON] = [{**fields, "seed": seed} for seed in (1, 2, 3)]
    alone = [await server.choice(**one) for one in asked]
    streams = await server.begin(rows(server))
    hold = await probe.hold()
    waiting = [asyncio.ensure_future(server.choice(**one)) for one in asked]
    await server.until(running=rows(server), waiting=3)
    probe.fail(out_of_memory())
    hold.release()
    assert [await one for one in waiting] == alone
    assert [(await ending(response))["type"] for response in streams] == ["oom"] * rows(server)
    await serves(server)


async def test_a_lack_of_memory_time_and_again_does_not_end_the_server(server: Server, probe: Probe) -> None:
    for _ in range(4):
        probe.fail(out_of_memory())
        assert (await server.error())[0] == 503
    assert server.outcomes() == {"oom": 4}
    await serves(server)


async def test_a_client_may_leave_while_the_engine_gets_over_a_lack_of_memory(server: Server, probe: Probe) -> None:
    streams = await server.begin(rows(server))
    hold = await probe.hold()
    waiting = [asyncio.ensure_future(server.post(**ENDLESS)) for _ in range(2)]
    await server.until(running=rows(server), waiting=2)
    probe.fail(out_of_memory())
    hold.release()
    for response in streams:
        await ending(response)
    for asking in waiting:
        asking.cancel()
    await server.until_ended(oom=rows(server), cancelled=2)
    await serves(server)


async def test_a_crash_ends_what_runs_and_what_waits_at_once_and_says_so_in_health(
    server: Server, probe: Probe
) -> None:
    streams = await server.begin(rows(server))
    hold = await probe.hold()
    waiting = [asyncio.ensure_future(server.post(stream=stream)) for stream in (False, True)]
    await server.until(running=rows(server), waiting=2)
    begun = time.monotonic()
    probe.fail(RuntimeError("device lost"))
    hold.release()
    for response in streams:
        error = await ending(response)
        assert (error["message"], error["code"]) == ("the engine failed: RuntimeError: device lost", 503)
    for asking in waiting:
        response = await asking
        assert response.status == 503
        assert "device lost" in (await response.json())["error"]["message"]
    assert time.monotonic() - begun < 5
    assert await server.health() == 503
    assert (await server.error())[0] == 503
    await server.until_released()


async def test_a_crash_is_an_error_for_those_that_ran_and_leaves_the_server_unavailable_for_others(
    server: Server, probe: Probe
) -> None:
    streams = await server.begin(rows(server))
    hold = await probe.hold()
    waiting = asyncio.ensure_future(server.post())
    await server.until(running=rows(server), waiting=1)
    probe.fail(RuntimeError("device lost"))
    hold.release()
    for response in streams:
        await ending(response)
    assert (await waiting).status == 503
    await server.post()
    assert server.outcomes() == {"error": rows(server), "unavailable": 2}


async def test_a_crash_before_the_first_token_is_a_503_streamed_or_not(server: Server, probe: Probe) -> None:
    probe.fail(RuntimeError("device lost"))
    assert await server.error(stream=True) == (503, None, "the engine failed: RuntimeError: device lost")
    assert (await server.error(stream=False))[0] == 503


async def test_a_request_that_comes_in_the_instant_of_a_crash_is_not_forgotten(
    server: Server, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine fails between the check whether it lives and the queue, where nobody would look any more."""
    engine = server.engine
    slots = engine.slots

    def crash_first(job: Job) -> int:
        monkeypatch.undo()
        probe.fail(RuntimeError("device lost"))
        engine.submit(Job((1, 2, 3), Sampling(max_tokens=4)))
        for thread in engine_threads():
            thread.join(PATIENCE)
        return slots(job)

    monkeypatch.setattr(engine, "slots", crash_first)
    response = await asyncio.wait_for(asyncio.ensure_future(server.post()), PATIENCE)
    assert response.status == 503


def engine_threads() -> list[threading.Thread]:
    """The threads in which engines run the model."""
    names = ("engine", "_run_generation_loop")
    return [thread for thread in threading.enumerate() if any(name in thread.name for name in names)]


@each_rung
@pytest.mark.parametrize("error", [RuntimeError("device lost"), out_of_memory()], ids=["crash", "memory"])
async def test_an_engine_that_fails_in_its_warm_up_says_so_and_leaves_no_thread(
    serve: Serve, rung: str, error: Exception, weights: Any
) -> None:
    before = set(engine_threads())
    probe = Probe(weights)
    probe.fail(error)
    try:
        with pytest.raises(EngineDeadError, match=r"device lost|out of memory"):
            await asyncio.wait_for(serve(rung), PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while left := set(engine_threads()) - before:
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.01)
    finally:
        probe.remove()


@each_rung
async def test_a_request_over_the_budget_of_the_kv_cache_is_a_400_that_names_max_tokens(
    serve: Serve, rung: str
) -> None:
    context = 64
    server = await serve(rung, max_model_len=context, kv_tokens=48 if rung != "batch static" else context)
    fields: JSON = {"prompt": [5] * 30, "ignore_eos": True}
    if rung == "batch static":
        # A row is as long as the context whatever is asked, so the context itself is the budget.
        assert (await server.whole(**fields, max_tokens=34))["usage"]["total_tokens"] == 64
        assert (await server.error(**fields, max_tokens=35))[:2] == (400, "max_tokens")
        return
    # The last token is never fed back: 30 + 19 - 1 = 48.
    assert (await server.whole(**fields, max_tokens=19))["usage"]["completion_tokens"] == 19
    for stream in (False, True):
        status, param, message = await server.error(**fields, max_tokens=20, stream=stream)
        assert (status, param) == (400, "max_tokens")
        assert message.startswith("max_tokens: 20 after 30 prompt tokens: ")
        assert message.endswith("tokens of KV cache are needed, 48 is all there is")
    assert server.outcomes() == {"length": 1, "rejected": 2}
    assert await server.metric("kv_capacity_tokens") == 48


@each_rung
async def test_more_requests_than_the_budget_holds_take_turns(serve: Serve, rung: str) -> None:
    """Each needs 32 slots, or with a static cache 64, and there are 64."""
    server = await serve(rung, max_model_len=64, kv_tokens=64, max_batch=8 if rung != "batch static" else 1)
    fields: JSON = {"prompt": [9] * 12, "max_tokens": 21, "temperature": 0, "ignore_eos": True}
    peak = 0
    asking = [asyncio.ensure_future(server.whole(**fields)) for _ in range(6)]
    while not all(one.done() for one in asking):
        peak = max(peak, server.engine.held.allocated)
        await asyncio.sleep(0.001)
    answers = [await one for one in asking]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert 0 < peak <= 64
    await server.until_released()


@each_rung
async def test_a_full_queue_is_a_429_that_says_when_to_come_again(serve: Serve, rung: str) -> None:
    server = await serve(rung, max_waiting=1, max_batch=2, max_wait=0.4)
    running = await server.begin(rows(server))
    waiting = asyncio.ensure_future(server.post(max_tokens=1))
    await server.until(running=rows(server), waiting=1)
    for stream in (False, True):
        refused = await server.post(max_tokens=1, stream=stream)
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        assert (await refused.json())["error"]["type"] == "rate_limit_error"
    assert server.outcomes() == {"rejected": 2}
    for response in running:
        response.close()
    assert (await waiting).status == 200


@each_rung
async def test_where_none_may_wait_an_idle_engine_still_serves(serve: Serve, rung: str) -> None:
    server = await serve(rung, max_waiting=0, max_batch=1)
    await server.begin()
    await server.until(running=1)
    assert (await server.post(max_tokens=1)).status == 429


@each_rung
async def test_the_row_of_a_client_that_leaves_is_free_within_a_step_or_stays_until_its_batch_ends(
    serve: Serve, rung: str, weights: Any
) -> None:
    server = await serve(rung, max_batch=2, max_wait=0.4)
    (leaves, *stay) = await server.begin(rows(server))
    probe = Probe(weights)
    leaves.close()
    await server.until_ended(cancelled=1)
    known = probe.passes
    await server.until(running=len(stay))
    if stay:
        await probe.hold()
    # The pass that ran when the engine was told, and the one that was then made ready.
    assert probe.passes - known <= 3
    held = await server.held()
    if rung == "sequential":
        assert held["allocated"] == 0
    elif rung == "continuous":
        assert held["finished"] == 0
        assert held["allocated"] == -(-held["live"] // BLOCK_SIZE) * BLOCK_SIZE
    else:
        assert held["finished"] == (CONTEXT if rung == "batch static" else held["live"])
        assert len(PROMPT) < held["live"] < held["allocated"]
    probe.remove()
    for response in stay:
        response.close()
    await server.until_released()


@each_rung
@pytest.mark.parametrize("rows", [1, 2])
async def test_the_shortest_context_there_may_be_is_served(serve: Serve, rung: str, rows: int) -> None:
    server = await serve(rung, max_model_len=2, max_batch=rows)
    assert (await server.whole(prompt=[5], max_tokens=1))["usage"]["total_tokens"] == 2
    assert (await server.error(prompt=[5], max_tokens=2))[0] == 400
