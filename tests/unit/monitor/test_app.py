"""The HTTP API, through a real client."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pyarrow as pa
import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from monitor.app import Monitor, make_app
from monitor.collector import TimelineCollector
from monitor.nvml import Devices
from monitor.sampler import Sampler, Task, samples
from monitor.timeline import SCHEMA, Readings, Series, Timeline

LATENESS, CPU = Series("monitor_sample_lateness_seconds"), Series("monitor_cpu_seconds_total")
RSS = Series("host_rss_bytes", "hf")


def make_monitor(read: Callable[[], Readings]) -> Monitor:
    timeline, registry = Timeline(1000), CollectorRegistry()
    TimelineCollector(timeline, [], registry)
    samplers = [Sampler("host", samples(Task("host", read, LATENESS, CPU), timeline, hz=50))]
    return Monitor(timeline, samplers, Devices([], "none here"), registry, hz=50)


@pytest.fixture
def monitor() -> Monitor:
    return make_monitor(lambda: {RSS: 42.0})


@pytest.fixture
async def client(monitor: Monitor) -> AsyncIterator[TestClient[Any, Any]]:
    monitor.timeline.append("host", {RSS: 41.0})
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


@pytest.mark.parametrize(
    ("query", "field", "value", "allowed"),
    [
        ("since_ns=yesterday", "since_ns", "yesterday", "a whole number of ns"),
        ("since_ns=-1", "since_ns", "-1", "a whole number of ns"),
        ("since_ns=", "since_ns", "", "a whole number of ns"),
        ("until_ns=9223372036854775808", "until_ns", "9223372036854775808", "9223372036854775807"),
        (f"until_ns={'9' * 5000}", "until_ns", "9" * 5000, "9223372036854775807"),
        ("until_ns=1&until_ns=2", "until_ns", "1", "one value"),
        ("server=hf", "server", "hf", "since_ns and until_ns"),
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


async def test_health_tells_the_rate_and_why_there_is_no_gpu(client: TestClient[Any, Any]) -> None:
    response = await client.get("/health")
    assert response.status == 200
    assert await response.json() == {"status": "ok", "gpus": 0, "gpu_reason": "none here", "hz": 50}


async def test_health_takes_no_parameters(client: TestClient[Any, Any]) -> None:
    response = await client.get("/health?verbose=1")
    assert response.status == 400


async def test_health_fails_when_sampling_has_ended(client: TestClient[Any, Any], monitor: Monitor) -> None:
    monitor.samplers[0].stop()
    response = await client.get("/health")
    assert response.status == 503


async def test_metrics_are_prometheus_text(client: TestClient[Any, Any]) -> None:
    response = await client.get("/metrics")
    assert response.content_type == "text/plain"
    families = {family.name: family for family in text_string_to_metric_families(await response.text())}
    assert [(sample.labels, sample.value) for sample in families["headroom_host_rss_bytes"].samples] in (
        [({"server": "hf"}, 41.0)],
        [({"server": "hf"}, 42.0)],
    )


async def test_sampling_starts_and_ends_with_the_app(monitor: Monitor) -> None:
    async with TestClient(TestServer(make_app(monitor))):
        assert monitor.samplers[0].alive()
    assert not monitor.samplers[0].alive()
