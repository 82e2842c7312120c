"""The HTTP API, through a real client."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pyarrow as pa
import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from monitor import app
from monitor.app import Monitor, make_app
from monitor.gpu import Rates
from monitor.gpus import Gpus
from monitor.host import make_host
from monitor.processes import Processes
from monitor.timeline import Series, Timeline
from monitor.window import SCHEMA


@pytest.fixture
def monitor() -> Monitor:
    timeline, processes = Timeline(), Processes()
    rates = Rates(hz=50, max_cpu=0.5, seconds=60)
    timeline.ring("gpu7-memory", 100, 1).append({Series("gpu_memory_used_bytes", gpu="7"): 42.0})
    return Monitor(
        timeline, make_host(timeline, processes, rates, beside_gpus=False), Gpus(timeline, processes, rates), hz=50
    )


@pytest.fixture
async def client(monitor: Monitor) -> AsyncIterator[TestClient[Any, Any]]:
    async with TestClient(TestServer(make_app(monitor))) as client:
        yield client


async def timeline(client: TestClient[Any, Any], **query: int) -> pa.Table:
    response = await client.get("/timeline", params=query)
    assert response.status == 200
    assert response.content_type == "application/vnd.apache.arrow.stream"
    return pa.ipc.open_stream(await response.read()).read_all()


async def test_the_timeline_is_an_arrow_stream_of_the_window_asked_for(client: TestClient[Any, Any]) -> None:
    whole = await timeline(client)
    assert whole.schema == SCHEMA
    first = whole["time_ns"][0].as_py()
    assert (await timeline(client, since_ns=first, until_ns=first + 1)).to_pylist() == whole.slice(0, 1).to_pylist()
    assert (await timeline(client, until_ns=first)).num_rows == 0


async def test_a_step_thins_the_timeline(client: TestClient[Any, Any], monitor: Monitor) -> None:
    used = Series("gpu_memory_used_bytes", gpu="7")
    for value in (1.0, 99.0, 5.0, 42.0):
        monitor.timeline.rings["gpu7-memory"].append({used: value})
    rows = (await timeline(client, step_ns=10**18)).to_pylist()
    assert [row["value"] for row in rows if row["gpu"] == "7"] == [1.0, 99.0]


async def test_a_reader_that_goes_away_is_no_error_and_nothing_more_is_made_for_it(
    client: TestClient[Any, Any], monitor: Monitor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = 0

    def endless(*_: object) -> Iterator[bytes]:
        nonlocal made
        while True:
            made += 1
            yield bytes(100_000)

    monkeypatch.setattr(app, "stream", endless)
    response = await client.get("/timeline")
    await response.content.read(1)
    response.close()
    before = -1
    while made != before:
        before = made
        await asyncio.sleep(0.1)
    assert caplog.records == []


async def test_a_timeline_is_not_made_for_its_headers_alone(client: TestClient[Any, Any]) -> None:
    assert (await client.head("/timeline")).status == 405


@pytest.mark.parametrize(
    ("query", "field", "value", "allowed"),
    [
        ("since_ns=yesterday", "since_ns", "yesterday", "a whole number of ns"),
        ("since_ns=-1", "since_ns", "-1", "a whole number of ns"),
        ("since_ns=", "since_ns", "", "a whole number of ns"),
        ("until_ns=9223372036854775808", "until_ns", "9223372036854775808", "9223372036854775807"),
        (f"until_ns={'9' * 5000}", "until_ns", "9" * 5000, "9223372036854775807"),
        ("until_ns=1&until_ns=2", "until_ns", "1", "one value"),
        ("step_ns=0", "step_ns", "0", "from 1 to"),
        ("server=hf", "server", "hf", "since_ns, until_ns and step_ns"),
    ],
)
async def test_a_bad_query_is_refused_with_field_value_and_what_is_allowed(
    client: TestClient[Any, Any], query: str, field: str, value: str, allowed: str
) -> None:
    response = await client.get(f"/timeline?{query}")
    assert response.status == 400
    error = (await response.json())["error"]
    assert (error["field"], error["value"]) == (field, value)
    assert allowed in error["allowed"]


async def test_health_tells_the_rate_why_there_is_no_gpu_whose_processes_are_seen_and_what_is_left_out(
    client: TestClient[Any, Any], monitor: Monitor
) -> None:
    monitor.timeline.rings["gpu7-memory"].append({Series("no room"): 1.0})
    monitor.host.source.lost = True
    response = await client.get("/health")
    assert response.status == 200
    gpus, health = monitor.gpus, await response.json()
    assert "host" in health.pop("sources_down")
    assert health == {
        "status": "ok",
        "gpus": len(gpus.found),
        "gpu_reason": gpus.reason,
        "hz": 50,
        "pid_namespace": "host" if monitor.host.processes.of_host else "own",
        "series_left_out": 1,
    }


@pytest.mark.parametrize("of_host", [True, False])
async def test_that_only_a_namespace_of_its_own_is_seen_is_said_once_at_the_start(
    monitor: Monitor, caplog: pytest.LogCaptureFixture, of_host: bool
) -> None:
    monitor.host.processes.of_host = of_host
    async with TestClient(TestServer(make_app(monitor))) as client:
        assert (await (await client.get("/health")).json())["pid_namespace"] == ("host" if of_host else "own")
    said = [record.message for record in caplog.records if "PID namespace of its own" in record.message]
    assert len(said) == (0 if of_host else 1)


@pytest.mark.parametrize("path", ["/health", "/metrics"])
async def test_what_takes_no_parameters_refuses_them(client: TestClient[Any, Any], path: str) -> None:
    response = await client.get(f"{path}?verbose=1")
    assert response.status == 400
    assert (await response.json())["error"] == {"field": "verbose", "value": "1", "allowed": "no parameter"}


async def test_health_fails_when_sampling_has_ended(client: TestClient[Any, Any], monitor: Monitor) -> None:
    monitor.samplers()[0].stop()
    response = await client.get("/health")
    assert response.status == 503


async def test_metrics_are_prometheus_text_with_how_long_the_last_scrape_took(client: TestClient[Any, Any]) -> None:
    for scrapes in (0, 1):
        response = await client.get("/metrics")
        assert response.content_type == "text/plain"
        families = {family.name: family for family in text_string_to_metric_families(await response.text())}
        assert [(sample.labels, sample.value) for sample in families["headroom_gpu_memory_used_bytes"].samples] == [
            ({"gpu": "7"}, 42.0)
        ]
        took = [sample.value for sample in families["headroom_monitor_scrape_duration_seconds"].samples]
        assert len(took) == scrapes
        assert all(0 < seconds < 60 for seconds in took)


async def test_a_scrape_does_not_hold_up_other_requests(
    client: TestClient[Any, Any], monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape that waits until another request was answered comes to its end."""
    answered = threading.Event()
    monkeypatch.setattr(monitor.timeline, "left_out", lambda _: not answered.wait(10))
    scrape = asyncio.ensure_future(client.get("/metrics"))
    await asyncio.sleep(0)
    assert (await timeline(client, until_ns=0)).num_rows == 0
    answered.set()
    assert "headroom_monitor_series_left_out 0.0" in await (await scrape).text()


async def test_sampling_starts_and_ends_with_the_app(monitor: Monitor) -> None:
    async with TestClient(TestServer(make_app(monitor))):
        assert all(sampler.alive() for sampler in monitor.samplers())
    assert not any(sampler.alive() for sampler in monitor.samplers())
