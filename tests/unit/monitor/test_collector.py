"""The Prometheus exposition."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from monitor.collector import METRICS, PEAK_METRICS, STATES, TimelineCollector
from monitor.nvml import Device
from monitor.sampler import SECOND, STALE_NS, Schedule, Source
from monitor.timeline import Instant, Series, Timeline

NOW_NS = 1000 * SECOND
DEVICE = Device("1", "GPU-1234", "NVIDIA H200", "580.00", handle=None, tiers=frozenset())


def schedule(success_ns: int | None) -> Schedule:
    made = Schedule(100, lambda _: True)
    made.success_ns, made.lateness, made.cpu_seconds = success_ns, 0.25, 1.5
    return made


@pytest.fixture
def registry() -> CollectorRegistry:
    time_ns = NOW_NS - 61 * SECOND
    timeline = Timeline(lambda: Instant(time_ns, 0))
    host, gpu, old = (timeline.ring(name, 10, 4) for name in ("host", "gpu1", "old"))
    for seconds_ago, used in ((61, 900.0), (59, 500.0), (1, 300.0)):
        time_ns = NOW_NS - seconds_ago * SECOND
        gpu.append(
            {Series("gpu_process_memory_bytes", "hf", "1"): used, Series("gpu_memory_used_bytes", None, "1"): used}
        )
        host.append({Series("monitor_sample_lateness_seconds", detail="host"): 1 / seconds_ago})
    host.append({Series("host_rss_bytes", "hf"): 200.0, Series("host_threads", "hf"): 3.0})
    host.append({Series("host_rss_bytes", "hf"): 100.0, Series("gpu_throttled", None, "0/1", "hw_slowdown"): 1.0})
    time_ns = NOW_NS - STALE_NS - 1
    old.append({Series("gpu_power_watts", gpu="1"): 300.0})
    one = SimpleNamespace(
        gpu="1", identity=DEVICE, errors=Counter(memory=3), source=Source("gpu1", schedule(None), (schedule(None),))
    )
    registry = CollectorRegistry()
    source = Source("host", schedule(NOW_NS - SECOND))
    TimelineCollector(timeline, source, lambda: {"1": cast(Any, one)}, registry, clock=lambda: NOW_NS)
    return registry


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("host_rss_bytes", {"server": "hf"}, 100.0),
        ("host_threads", {"server": "hf"}, None),
        ("gpu_process_memory_bytes", {"server": "hf", "gpu": "1"}, 300.0),
        ("gpu_process_memory_max_bytes", {"server": "hf", "gpu": "1"}, 500.0),
        ("gpu_memory_used_max_bytes", {"gpu": "1"}, 500.0),
        ("gpu_throttled", {"gpu": "0/1", "detail": "hw_slowdown"}, 1.0),
        ("gpu_power_watts", {"gpu": "1"}, None),
        ("gpu_info", {"gpu": "1", "uuid": "GPU-1234", "name": "NVIDIA H200", "driver": "580.00"}, 1.0),
        ("monitor_nvml_errors_total", {"gpu": "1", "call": "memory"}, 3.0),
        ("monitor_up", {"source": "host"}, 1.0),
        ("monitor_up", {"source": "gpu1"}, 0.0),
        ("monitor_last_success_timestamp_seconds", {"source": "gpu1"}, None),
        ("monitor_sample_lateness_seconds", {"source": "host"}, 0.25),
        ("monitor_sample_rate_hertz", {"source": "host"}, 100.0),
        ("monitor_sample_rate_wanted_hertz", {"source": "gpu1"}, 100.0),
        ("monitor_source_cpu_seconds_total", {"source": "gpu1"}, 3.0),
    ],
)
def test_a_scrape_answers_the_newest_of_each(
    registry: CollectorRegistry, name: str, labels: dict[str, str], value: float | None
) -> None:
    assert registry.get_sample_value(f"headroom_{name}", labels) == value


def test_the_exposition_names_every_metric_with_its_type(registry: CollectorRegistry) -> None:
    families = {
        family.name: family.type for family in text_string_to_metric_families(generate_latest(registry).decode())
    }
    for metric in (*METRICS, *PEAK_METRICS, *STATES, "monitor_nvml_errors_total"):
        kind = "counter" if metric.endswith("_total") else "gauge"
        assert families[f"headroom_{metric.removesuffix('_total')}"] == kind
    assert all(name.startswith("headroom_") for name in families)
