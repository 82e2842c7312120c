"""The Prometheus exposition."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from monitor.collector import METRICS, PEAK_NS, PEAKS, STATES, TimelineCollector
from monitor.events import Xid
from monitor.nvml import Device
from monitor.sampler import SECOND, Source
from monitor.timeline import STALE_NS, Clocks, Series, Timeline

NOW_NS = 1000 * SECOND
DEVICE = Device("1", "GPU-1234", "NVIDIA H200", "580.00", handle=None, tiers=frozenset())


def source(name: str, *, up: bool, success_wall_ns: int | None = None) -> Source:
    known = SimpleNamespace(name=name, up=lambda now_ns: up and now_ns == NOW_NS, success_wall_ns=success_wall_ns)
    known.wanted_hz, known.hz, known.samples, known.missed, known.lateness = 100, 97, 9, 3, 0.25
    known.samplers = [SimpleNamespace(name=f"{name}-{tier}", cpu_seconds=1.5) for tier in ("fast", "slow")]
    return cast(Source, known)


class Gpus:
    """GPU 1, which is there, and GPU 2, which is lost."""

    def sources(self) -> list[Source]:
        return [source("nvml", up=False), source("gpu1", up=True), source("gpu2", up=False)]

    def errors(self) -> dict[tuple[str, str], int]:
        return {("", "init"): 1, ("1", "memory"): 3}

    def refused(self) -> int:
        return 6

    def identities(self) -> list[Device]:
        return [DEVICE]

    def xids(self) -> dict[tuple[str, int], Xid]:
        return {("2", 79): Xid(2, 1_700_000_000_500_000_000)}

    def throttled(self) -> dict[tuple[str, str], float]:
        return {("1", "hw_slowdown"): 12.5}


@pytest.fixture
def registry() -> CollectorRegistry:
    time_ns = 0
    timeline = Timeline(Clocks(lambda: time_ns, lambda: 0))
    host, gpu, lost, old = (timeline.ring(name, 10, 4) for name in ("host", "gpu1", "gpu2", "old"))
    for seconds_ago, used in ((121, 900.0), (119, 500.0), (1, 300.0)):
        time_ns = NOW_NS - seconds_ago * SECOND
        gpu.append(
            {Series("gpu_process_memory_bytes", "hf", "1"): used, Series("gpu_memory_used_bytes", None, "1"): used}
        )
        lost.append({Series("gpu_memory_used_bytes", None, "2"): used, Series("gpu_power_watts", gpu="2"): 700.0})
        host.append({Series("monitor_sample_lateness_seconds", detail="host"): 1 / seconds_ago})
    lost.clear()
    host.append({Series("host_rss_bytes", "hf"): 200.0, Series("host_threads", "hf"): 3.0})
    host.append({Series("host_rss_bytes", "hf"): 100.0, Series("gpu_clock_hertz", None, "0/1", "sm"): 1e9})
    gpu.append(
        {Series("gpu_process_memory_bytes", "hf", "1"): 300.0, Series("gpu_memory_used_bytes", None, "1"): 300.0}
        | dict.fromkeys((Series("gpu_ecc_errors_total", None, "1", kind) for kind in ("corrected", "uncorrected")), 4.0)
        | {Series("gpu_process_memory_bytes", "one too many", "1"): 7.0, Series("gpu_throttled", None, "1", "x"): 1.0}
    )
    time_ns = NOW_NS - STALE_NS - 1
    old.append({Series("gpu_power_watts", gpu="1"): 300.0})
    timeline.ring("dear", 10, 1, 2 * STALE_NS).append({Series("gpu_energy_joules_total", gpu="1"): 8.0})
    timeline.ring("too dear", 10, 1, STALE_NS).append({Series("gpu_energy_joules_total", gpu="2"): 8.0})
    for name in "abcd":
        old.append({Series("host_rss_bytes", name): 1.0})
    registry = CollectorRegistry()
    host_source = source("host", up=True, success_wall_ns=1_600_000_000_250_000_000)
    TimelineCollector(timeline, host_source, cast(Any, Gpus()), registry, clock=lambda: NOW_NS)
    return registry


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("host_rss_bytes", {"server": "hf"}, 100.0),
        ("host_threads", {"server": "hf"}, None),
        ("gpu_process_memory_bytes", {"server": "hf", "gpu": "1"}, 300.0),
        ("gpu_process_memory_max_bytes", {"server": "hf", "gpu": "1"}, 500.0),
        ("gpu_memory_used_max_bytes", {"gpu": "1"}, 500.0),
        # The maximum of a GPU that is lost is still told, its values of now are not.
        ("gpu_memory_used_max_bytes", {"gpu": "2"}, 500.0),
        ("gpu_memory_used_bytes", {"gpu": "2"}, None),
        ("gpu_power_watts", {"gpu": "2"}, None),
        ("gpu_power_watts", {"gpu": "1"}, None),
        ("gpu_clock_hertz", {"gpu": "0/1", "clock": "sm"}, 1e9),
        ("gpu_ecc_errors_total", {"gpu": "1", "type": "corrected"}, 4.0),
        ("gpu_energy_joules_total", {"gpu": "1"}, 8.0),
        ("gpu_energy_joules_total", {"gpu": "2"}, None),
        ("gpu_throttled_seconds_total", {"gpu": "1", "reason": "hw_slowdown"}, 12.5),
        ("gpu_xid_errors_total", {"gpu": "2", "xid": "79"}, 2.0),
        ("gpu_xid_last_timestamp_seconds", {"gpu": "2", "xid": "79"}, 1_700_000_000.5),
        ("gpu_info", {"gpu": "1", "uuid": "GPU-1234", "name": "NVIDIA H200", "driver": "580.00"}, 1.0),
        ("monitor_nvml_errors_total", {"gpu": "1", "call": "memory"}, 3.0),
        ("monitor_nvml_errors_total", {"gpu": "", "call": "init"}, 1.0),
        ("monitor_up", {"source": "host"}, 1.0),
        ("monitor_up", {"source": "nvml"}, 0.0),
        ("monitor_up", {"source": "gpu2"}, 0.0),
        ("monitor_last_success_timestamp_seconds", {"source": "host"}, 1_600_000_000.25),
        ("monitor_last_success_timestamp_seconds", {"source": "gpu1"}, None),
        ("monitor_samples_total", {"source": "gpu1"}, 9.0),
        ("monitor_samples_missed_total", {"source": "gpu1"}, 3.0),
        ("monitor_sample_lateness_seconds", {"source": "host"}, 0.25),
        ("monitor_sample_lateness_max_seconds", {"source": "host"}, 1.0),
        ("monitor_sample_rate_hertz", {"source": "host"}, 97.0),
        ("monitor_sample_rate_wanted_hertz", {"source": "gpu1"}, 100.0),
        ("monitor_source_cpu_seconds_total", {"source": "gpu1", "thread": "gpu1-slow"}, 1.5),
        ("monitor_refused_processes_total", {}, 6.0),
        ("monitor_series_left_out", {}, 2.0),
    ],
)
def test_a_scrape_answers_the_newest_of_each(
    registry: CollectorRegistry, name: str, labels: dict[str, str], value: float | None
) -> None:
    assert registry.get_sample_value(f"headroom_{name}", labels) == value


def test_the_exposition_names_every_metric_with_its_type_and_no_other(registry: CollectorRegistry) -> None:
    families = {
        family.name: family.type for family in text_string_to_metric_families(generate_latest(registry).decode())
    }
    expected = {f"headroom_{name}": "counter" if name.endswith("_total") else "gauge" for name in METRICS}
    assert families == {name.removesuffix("_total"): kind for name, kind in expected.items()} | {
        "headroom_gpu_info": "gauge"
    }


def test_what_is_told_of_sources_and_maxima_has_a_help_text() -> None:
    assert {*STATES, *PEAKS.values()} <= set(METRICS)


def test_the_help_of_a_maximum_tells_its_window() -> None:
    assert all(f"{PEAK_NS // SECOND} seconds" in METRICS[name][0] for name in PEAKS.values())
