"""The newest readings as Prometheus metrics."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from monitor.gpu import Gpu
from monitor.sampler import SECOND, STALE_NS, Source
from monitor.timeline import Readings, Series, Timeline

PEAK_NS = 60 * SECOND

SERVER, GPU, SOURCE = ("server",), ("gpu",), ("source",)
GPU_DETAIL = ("gpu", "detail")
# Help and labels of each metric; `source` is the detail of a series.
METRICS = {
    "host_rss_bytes": ("Resident memory of the server's processes", SERVER),
    "host_pss_bytes": ("Memory of the server's processes, shared pages divided by their users", SERVER),
    "host_pss_age_seconds": ("Age of the oldest count of shared pages in host_pss_bytes", SERVER),
    "host_cpu_seconds_total": ("CPU time of the server's processes", SERVER),
    "host_processes": ("Processes of the server", SERVER),
    "host_threads": ("Threads of the server's processes", SERVER),
    "host_open_files": ("Open files of the server's processes", SERVER),
    "gpu_memory_used_bytes": ("Device memory in use, without the driver's reserve", GPU),
    "gpu_memory_free_bytes": ("Device memory free", GPU),
    "gpu_memory_reserved_bytes": ("Device memory reserved by the driver", GPU),
    "gpu_memory_total_bytes": ("Device memory", GPU),
    "gpu_process_memory_bytes": ("Device memory in use by the server's processes", ("gpu", "server")),
    "gpu_utilization_ratio": ("Share of time in which a kernel ran", GPU),
    "gpu_power_watts": ("Power drawn", GPU),
    "gpu_temperature_celsius": ("Temperature of the GPU", GPU),
    "gpu_clock_hertz": ("Clock of the multiprocessors (sm) or of the memory", GPU_DETAIL),
    "gpu_throttled": ("Whether the reason holds the clocks down, 0 or 1", GPU_DETAIL),
    "gpu_energy_joules_total": ("Energy used since the driver was loaded", GPU),
    "gpu_pcie_bytes_per_second": ("PCIe throughput, sent (tx) and received (rx)", GPU_DETAIL),
    "gpu_nvlink_bytes_total": ("Data over all NVLinks, sent (tx) and received (rx)", GPU_DETAIL),
    "gpu_ecc_errors_total": ("Memory errors since the driver was loaded", GPU_DETAIL),
    "gpu_xid_errors_total": ("XID errors by code, since the monitor was started", GPU_DETAIL),
    "monitor_cpu_seconds_total": ("CPU time of the monitor, all threads", ()),
}
# What the largest value in the last 60 seconds is told of, from all samples.
PEAKS = {
    "gpu_memory_used_bytes": "gpu_memory_used_max_bytes",
    "gpu_process_memory_bytes": "gpu_process_memory_max_bytes",
    "monitor_sample_lateness_seconds": "monitor_sample_lateness_max_seconds",
}
PEAK_METRICS = {
    "gpu_memory_used_max_bytes": ("Most device memory in use in the last 60 seconds", GPU),
    "gpu_process_memory_max_bytes": ("Most device memory of the server in the last 60 seconds", ("gpu", "server")),
    "monitor_sample_lateness_max_seconds": ("How late a sample began at most in the last 60 seconds", SOURCE),
}
# By source.
STATES: dict[str, tuple[str, Callable[[Source, int], float | None]]] = {
    "monitor_up": ("Whether the source was read well in the last seconds, 0 or 1", lambda s, now: float(s.up(now))),
    "monitor_last_success_timestamp_seconds": (
        "Wall time when the source was last read well",
        lambda s, now: None if s.main.success_ns is None else time.time() - (now - s.main.success_ns) / SECOND,
    ),
    "monitor_sample_rate_hertz": ("Samples a second that are taken now", lambda s, _: s.main.hz),
    "monitor_sample_rate_wanted_hertz": ("Samples a second that were asked for", lambda s, _: s.main.wanted_hz),
    "monitor_sample_lateness_seconds": ("How late the last sample began", lambda s, _: s.main.lateness),
    "monitor_source_cpu_seconds_total": ("CPU time of the source's threads", lambda s, _: s.cpu_seconds),
}


class TimelineCollector(Collector):
    """Answers a scrape from the newest ticks and from what the samplers know of themselves; reads no hardware.

    What is older than 5 seconds is absent.
    """

    def __init__(
        self,
        timeline: Timeline,
        host: Source,
        gpus: Callable[[], Mapping[str, Gpu]],
        registry: CollectorRegistry,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.scrape_seconds: float | None = None
        self._timeline = timeline
        self._host = host
        self._gpus = gpus
        self._clock = clock
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield a family per metric; a metric that nothing was read of has no samples."""
        now_ns, gpus = self._clock(), list(self._gpus().values())
        latest: Readings = {}
        peaks: Readings = {}
        for ring in self._timeline.rings.values():
            latest |= ring.latest(now_ns - STALE_NS)
            # Also when the newest row has no value: a spike just before the end is what is looked for.
            if any(series.metric in PEAKS for series in ring.columns.copy()):
                peaks |= ring.peaks(now_ns - PEAK_NS)
        yield from _families(latest, METRICS)
        largest = {series._replace(metric=PEAKS[series.metric]): peaks[series] for series in peaks if _peaks(series)}
        yield from _families(largest, PEAK_METRICS)
        yield from _states([self._host, *(gpu.source for gpu in gpus)], now_ns)
        yield from self._scrape()
        yield _errors(gpus)
        yield _identities(gpus)

    def _scrape(self) -> Iterator[Metric]:
        family = _family("monitor_scrape_duration_seconds", "How long the last scrape took to answer", ())
        if self.scrape_seconds is not None:
            family.add_metric((), self.scrape_seconds)
        yield family


def _peaks(series: Series) -> bool:
    return series.metric in PEAKS


def _families(readings: Readings, metrics: Mapping[str, tuple[str, tuple[str, ...]]]) -> Iterator[Metric]:
    values: defaultdict[str, list[tuple[Series, float]]] = defaultdict(list)
    for series, value in readings.items():
        values[series.metric].append((series, value))
    for name, (text, labels) in metrics.items():
        family = _family(name, text, labels)
        for series, value in values[name]:
            family.add_metric([_label(series, label) for label in labels], value)
        yield family


def _states(sources: Sequence[Source], now_ns: int) -> Iterator[Metric]:
    for name, (text, state) in STATES.items():
        family = _family(name, text, SOURCE)
        for source in sources:
            value = state(source, now_ns)
            if value is not None:
                family.add_metric((source.name,), value)
        yield family


def _errors(gpus: Sequence[Gpu]) -> Metric:
    family = _family("monitor_nvml_errors_total", "NVML calls that failed", ("gpu", "call"))
    for gpu in gpus:
        for call, count in gpu.errors.copy().items():
            family.add_metric((gpu.gpu, call), count)
    return family


def _identities(gpus: Sequence[Gpu]) -> Metric:
    family = InfoMetricFamily("headroom_gpu", "Identity of the GPU or MIG device", labels=GPU)
    for gpu in gpus:
        identity = gpu.identity
        family.add_metric((gpu.gpu,), {"uuid": identity.uuid, "name": identity.name, "driver": identity.driver})
    return family


def _family(name: str, text: str, labels: Sequence[str]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(f"headroom_{name}", text, labels=labels)


def _label(series: Series, label: str) -> str:
    # The source is the detail of a series of the monitor itself.
    value = getattr(series, "detail" if label == "source" else label)
    return value or ""
