"""What the HF server says about itself, in /metrics and in its answers, held against figures worked out by hand."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from servers.hf.metrics import OUTCOMES
from tests.unit.servers.harness import (
    BLOCK_SIZE,
    BYTES_PER_TOKEN,
    CONTEXT,
    JSON,
    RUNGS,
    Probe,
    Serve,
    Server,
    each_rung,
    serving,
)


@pytest.fixture
async def serve(weights: Any, tokenizer: Any) -> AsyncIterator[Serve]:
    async with serving(weights, tokenizer) as serve:
        yield serve


@pytest.fixture(params=RUNGS)
async def server(serve: Serve, request: pytest.FixtureRequest) -> Server:
    return await serve(request.param, max_batch=2, max_wait=0.4)


@pytest.fixture
def probe(server: Server, weights: Any) -> Iterator[Probe]:
    """Made after the server, whose warm-up it does not see."""
    probe = Probe(weights)
    yield probe
    probe.remove()


async def test_every_outcome_is_exported_from_the_start(server: Server) -> None:
    counted = {labels["outcome"]: value for name, labels, value in await server.samples() if name == "hf:request_total"}
    assert counted == dict.fromkeys(OUTCOMES, 0.0)


async def test_a_scrape_may_ask_for_some_metrics_by_name(server: Server) -> None:
    answer = await server.client.get("/metrics", params={"name[]": ["hf:kv_live_tokens"]})
    assert [line for line in (await answer.text()).splitlines() if not line.startswith("#")] == [
        f'hf:kv_live_tokens{{engine="{server.engine.name}"}} 0.0'
    ]


async def test_names_are_the_same_for_a_scrape_that_prefers_openmetrics(server: Server) -> None:
    answer = await server.client.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert "\nhf:kv_live_tokens{" in await answer.text()


async def test_every_sample_names_its_engine(server: Server) -> None:
    samples = await server.samples()
    assert {labels["engine"] for _, labels, _ in samples} == {server.engine.name}
    assert len({(name, *sorted(labels.items())) for name, labels, _ in samples}) == len(samples)


async def test_outcomes_tokens_and_latencies_are_counted(server: Server) -> None:
    await server.whole(max_tokens=4, ignore_eos=True)
    await server.stream(max_tokens=6, ignore_eos=True)
    text = (await server.choice(temperature=0, max_tokens=8, ignore_eos=True))["text"]
    stopped = await server.whole(temperature=0, max_tokens=8, ignore_eos=True, stop=text[3:6])
    generated = 4 + 6 + 8 + stopped["usage"]["completion_tokens"]
    assert server.outcomes() == {"length": 3, "stop": 1}
    assert await server.metric("prompt_tokens_total") == 4 * 3
    assert await server.metric("generation_tokens_total") == generated
    assert await server.metric("time_to_first_token_seconds_count") == 4
    assert await server.metric("request_queue_time_seconds_count") == 4
    assert await server.metric("inter_token_latency_seconds_count") == generated - 4
    assert await server.metric("e2e_request_latency_seconds_count") == 4
    queued, first, between, whole = [
        await server.metric(f"{name}_seconds_sum")
        for name in ("request_queue_time", "time_to_first_token", "inter_token_latency", "e2e_request_latency")
    ]
    assert first + between == pytest.approx(whole)
    assert 0 <= queued < first
    await server.until_released()
    assert await server.metric("num_requests_running") == 0


async def test_tokens_of_requests_that_did_not_end_well_count_as_generated(server: Server, probe: Probe) -> None:
    (response,) = await server.begin()
    hold = await probe.hold(after=3)
    response.close()
    hold.release()
    await server.until_ended(cancelled=1)
    assert await server.metric("generation_tokens_total") >= 2
    assert await server.metric("e2e_request_latency_seconds_count") == 0


async def test_a_request_that_waits_is_counted_as_waiting_and_its_wait_as_queue_time(
    server: Server, probe: Probe
) -> None:
    rows = server.engine.limits.max_batch
    running = await server.begin(rows)
    before = await server.metric("request_queue_time_seconds_sum")
    hold = await probe.hold()
    waiting = asyncio.ensure_future(server.whole(max_tokens=1))
    await server.until(running=rows, waiting=1)
    assert await server.metric("num_requests_running") == rows
    assert await server.metric("num_requests_waiting") == 1
    await asyncio.sleep(0.5)
    hold.release()
    for response in running:
        response.close()
    await waiting
    assert await server.metric("request_queue_time_seconds_count") == rows + 1
    assert await server.metric("request_queue_time_seconds_sum") - before > 0.5


@each_rung
async def test_the_ledger_of_one_request_is_exported_in_tokens_and_bytes(serve: Serve, rung: str, weights: Any) -> None:
    """A prompt of 10 tokens that may become 30; read before the fourth pass, when 3 tokens were made."""
    server = await serve(rung)
    probe = Probe(weights)
    hold = probe.plan_hold(after=3)
    asking = asyncio.ensure_future(server.whole(prompt=[7] * 10, max_tokens=20, ignore_eos=True))
    await hold.reached()
    expected: dict[str, JSON] = {
        "sequential": {"live": 12, "allocated": 12},
        "batch": {"live": 12, "allocated": 12},
        # 29 slots at most are ever written, since the last token is not fed back.
        "batch static": {"live": 12, "allocated": CONTEXT, "reserved": 29 - 12, "fragmentation": CONTEXT - 29},
        # The token of the pass that is about to run has its slot.
        "continuous": {"live": 13, "allocated": BLOCK_SIZE, "fragmentation": BLOCK_SIZE - 13},
    }
    for unit, size in (("tokens", 1), ("bytes", BYTES_PER_TOKEN)):
        held = await server.held(unit)
        capacity = server.engine.capacity * size
        slots = {name: count * size for name, count in expected[rung].items()}
        nothing = dict.fromkeys(("reserved", "padding", "finished", "fragmentation"), 0)
        assert held == {**nothing, **slots, "capacity": capacity}
    probe.remove()
    await asking
    await server.until_released()


@pytest.mark.parametrize("rung", ["batch", "batch static"])
async def test_the_ledger_of_a_batch_tells_its_waste_by_reason(serve: Serve, rung: str, weights: Any) -> None:
    """Prompts of 10 and 3 tokens that may become 30 and 5, read after the first pass and after the third."""
    server = await serve(rung, max_batch=2, max_wait=5.0)
    probe = Probe(weights)
    hold = probe.plan_hold(after=1)
    long = asyncio.ensure_future(server.whole(prompt=[7] * 10, max_tokens=20, ignore_eos=True))
    short = asyncio.ensure_future(server.whole(prompt=[8] * 3, max_tokens=2, ignore_eos=True))
    await hold.reached()
    room = CONTEXT if rung == "batch static" else 10
    # One token made: the width of the prompts is written; the second row may grow to 11 slots.
    static = {"reserved": (29 - 10) + (11 - 10), "fragmentation": (CONTEXT - 29) + (CONTEXT - 11)}
    waste = {"padding": 7, "finished": 0, **(static if room == CONTEXT else {"reserved": 0, "fragmentation": 0})}
    assert await server.held() == {
        **waste, "live": 13, "allocated": 2 * room, "capacity": server.engine.capacity
    }  # fmt: skip
    # Two passes later: `passes` counts the one that is held.
    later = probe.plan_hold(after=1)
    hold.release()
    assert (await short)["usage"]["completion_tokens"] == 2
    await later.reached()
    # Three tokens made, 12 slots written in each row, the second row of no use to anyone.
    room = CONTEXT if rung == "batch static" else 12
    static = {"reserved": 29 - 12, "fragmentation": CONTEXT - 29}
    waste = {"padding": 0, "finished": room, **(static if room == CONTEXT else {"reserved": 0, "fragmentation": 0})}
    assert await server.held() == {
        **waste, "live": 12, "allocated": 2 * room, "capacity": server.engine.capacity
    }  # fmt: skip
    probe.remove()
    await long
    await server.until_released()


@each_rung
async def test_an_answer_says_how_long_it_waited_and_ran_when_asked(serve: Serve, rung: str) -> None:
    server = await serve(rung, per_request_metrics=True)
    options: JSON = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = await server.stream(max_tokens=5, ignore_eos=True, **options)
    whole = await server.whole(max_tokens=5, ignore_eos=True)
    for answer in (last, whole):
        metrics = answer["metrics"]
        assert set(metrics) == {
            "time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second"
        }  # fmt: skip
        assert metrics["queue_time_ms"] >= 0
        assert metrics["time_to_first_token_ms"] > 0
        assert metrics["mean_itl_ms"] * 4 == pytest.approx(metrics["generation_time_ms"])
        inference = metrics["time_to_first_token_ms"] + metrics["generation_time_ms"]
        assert metrics["tokens_per_second"] == pytest.approx(5 / inference * 1000)
    assert not any("metrics" in chunk for chunk in chunks)


async def test_an_answer_says_nothing_of_its_times_unasked(server: Server) -> None:
    assert "metrics" not in await server.whole(max_tokens=2)
