"""The newest readings as Prometheus metrics."""

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from monitor.nvml import Device
from monitor.timeline import Series, Timeline

# Name, help and labels; a label that a series does not have is empty.
METRICS = [
    ("host_rss_bytes", "Resident memory of the server's processes", ("server",)),
    ("host_pss_bytes", "Memory of the server's processes, shared pages divided by their users", ("server",)),
    ("host_pss_age_seconds", "Age of the oldest count of shared pages in host_pss_bytes", ("server",)),
    ("host_cpu_seconds_total", "CPU time of the server's processes", ("server",)),
    ("host_processes", "Processes of the server", ("server",)),
    ("gpu_memory_used_bytes", "Device memory in use, without the driver's reserve", ("gpu",)),
    ("gpu_memory_free_bytes", "Device memory free", ("gpu",)),
    ("gpu_memory_reserved_bytes", "Device memory reserved by the driver", ("gpu",)),
    ("gpu_memory_total_bytes", "Device memory", ("gpu",)),
    ("gpu_process_memory_bytes", "Device memory in use by the server's processes", ("gpu", "server")),
    ("gpu_utilization_ratio", "Share of time in which a kernel ran", ("gpu",)),
    ("gpu_power_watts", "Power drawn", ("gpu",)),
    ("monitor_cpu_seconds_total", "CPU time of the monitor, all threads", ()),
    ("monitor_gpu_cpu_seconds_total", "CPU time of the thread that samples the GPU", ("gpu",)),
    ("monitor_sample_lateness_seconds", "How late the last sample of the GPU, or of the host, began", ("gpu",)),
]


class TimelineCollector(Collector):
    """Answers a scrape from the newest tick of each sampler; reads no hardware."""

    def __init__(self, timeline: Timeline, devices: Sequence[Device], registry: CollectorRegistry) -> None:
        self._timeline = timeline
        self._devices = devices
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield a family per metric; a metric that nothing was read of has no samples."""
        latest = self._timeline.latest()
        readings = {series: value for _, tick in latest.values() for series, value in tick.items()}
        for name, text, labels in METRICS:
            family = _family(name, text, labels)
            for series, value in readings.items():
                if series.metric == name:
                    family.add_metric([_label(series, label) for label in labels], value)
            yield family
        stamps = _family("monitor_last_sample_timestamp_seconds", "Wall time of the last sample", ("sampler",))
        for sampler, (at, _) in latest.items():
            stamps.add_metric([sampler], at.wall_ns / 1e9)
        yield stamps
        yield self._identities()

    def _identities(self) -> Metric:
        family = InfoMetricFamily("headroom_gpu", "Identity of the GPU", labels=("gpu",))
        for device in self._devices:
            family.add_metric((str(device.index),), {"uuid": device.uuid, "name": device.name})
        return family


def _family(name: str, text: str, labels: Sequence[str]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(f"headroom_{name}", text, labels=labels)


def _label(series: Series, label: str) -> str:
    value = series.server if label == "server" else series.gpu
    return "" if value is None else str(value)
