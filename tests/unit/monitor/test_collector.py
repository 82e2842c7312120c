"""The Prometheus exposition."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from monitor.collector import METRICS, TimelineCollector
from monitor.nvml import Device
from monitor.timeline import Instant, Series, Timeline

DEVICE = Device(1, "GPU-1234", "NVIDIA H200", handle=None, nvml=None)


@pytest.fixture
def registry() -> CollectorRegistry:
    timeline = Timeline(10, clock=lambda: Instant(1, 1_500_000_000))
    timeline.append("host", {Series("host_rss_bytes", "hf"): 100.0, Series("host_cpu_seconds_total", "hf"): 4.5})
    newest = {Series("host_rss_bytes", "hf"): 200.0, Series("host_pss_age_seconds", "hf"): 1.5}
    timeline.append("host", newest | {Series("monitor_sample_lateness_seconds"): 0.25})
    timeline.append("gpu1", {Series("gpu_process_memory_bytes", "hf", 1): 300.0})
    registry = CollectorRegistry()
    TimelineCollector(timeline, [DEVICE], registry)
    return registry


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("headroom_host_rss_bytes", {"server": "hf"}, 200.0),
        ("headroom_host_pss_age_seconds", {"server": "hf"}, 1.5),
        ("headroom_host_cpu_seconds_total", {"server": "hf"}, None),
        ("headroom_gpu_process_memory_bytes", {"server": "hf", "gpu": "1"}, 300.0),
        ("headroom_monitor_sample_lateness_seconds", {"gpu": ""}, 0.25),
        ("headroom_monitor_last_sample_timestamp_seconds", {"sampler": "gpu1"}, 1.5),
        ("headroom_gpu_info", {"gpu": "1", "uuid": "GPU-1234", "name": "NVIDIA H200"}, 1.0),
    ],
)
def test_a_scrape_answers_the_newest_tick(
    registry: CollectorRegistry, name: str, labels: dict[str, str], value: float | None
) -> None:
    assert registry.get_sample_value(name, labels) == value


def test_the_exposition_names_every_metric_with_its_type(registry: CollectorRegistry) -> None:
    families = {
        family.name: family.type for family in text_string_to_metric_families(generate_latest(registry).decode())
    }
    for metric, _, _ in METRICS:
        kind = "counter" if metric.endswith("_total") else "gauge"
        assert families[f"headroom_{metric.removesuffix('_total')}"] == kind
    assert all(name.startswith("headroom_") for name in families)
