"""The newest readings, and what is known of the GPUs and of the monitor itself, as Prometheus metrics."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from monitor.gpus import Gpus
from monitor.sampler import SECOND, Source
from monitor.timeline import STALE_NS, Readings, Series, Timeline

# Twice the longest interval between two scrapes that makes sense, so that each maximum is seen by one of them.
PEAK_NS = 120 * SECOND

NONE: tuple[str, ...] = ()
SERVER, GPU, SOURCE = ("server",), ("gpu",), ("source",)
# Help and labels of each metric. A label other than server and gpu has the detail of a series.
METRICS = {
    "host_rss_bytes": ("Resident memory of the server's processes", SERVER),
    "host_pss_bytes": ("Memory of the server's processes, shared pages divided by their users", SERVER),
    "host_pss_age_seconds": ("Age of the oldest count of shared pages in host_pss_bytes", SERVER),
    "host_cpu_seconds_total": ("CPU time of the server's processes", SERVER),
    "host_processes": ("Processes of the server", SERVER),
    "host_threads": ("Threads of the server's processes", SERVER),
    "host_open_files": ("Open files of the server's processes", SERVER),
    "gpu_memory_used_bytes": ("Device memory in use, without the driver's reserve", GPU),
    "gpu_memory_used_max_bytes": ("Most device memory in use in the last 120 seconds", GPU),
    "gpu_memory_free_bytes": ("Device memory free", GPU),
    "gpu_memory_reserved_bytes": ("Device memory reserved by the driver", GPU),
    "gpu_memory_total_bytes": ("Device memory", GPU),
    "gpu_process_memory_bytes": ("Device memory in use by the server's processes", ("gpu", "server")),
    "gpu_process_memory_max_bytes": ("Most device memory of the server in the last 120 seconds", ("gpu", "server")),
    "gpu_utilization_ratio": ("Share of time in which a kernel ran", GPU),
    "gpu_power_watts": ("Power drawn", GPU),
    "gpu_temperature_celsius": ("Temperature of the GPU", GPU),
    "gpu_clock_hertz": ("Clock of the multiprocessors (sm) or of the memory", ("gpu", "clock")),
    "gpu_throttled_seconds_total": ("Time in which the reason held the clocks down", ("gpu", "reason")),
    "gpu_energy_joules_total": ("Energy used since the driver was loaded", GPU),
    "gpu_pcie_bytes_per_second": ("PCIe throughput, sent (tx) and received (rx)", ("gpu", "direction")),
    "gpu_nvlink_bytes_total": ("Data over all NVLinks, sent (tx) and received (rx)", ("gpu", "direction")),
    "gpu_ecc_errors_total": ("Memory errors since the driver was loaded", ("gpu", "type")),
    "gpu_xid_errors_total": ("XID errors by code, since the monitor was started", ("gpu", "xid")),
    "gpu_xid_last_timestamp_seconds": ("Wall time of the last XID error of the code", ("gpu", "xid")),
    "monitor_up": ("Whether the source was read well in the last seconds, 0 or 1", SOURCE),
    "monitor_last_success_timestamp_seconds": ("Wall time when the source was last read well", SOURCE),
    "monitor_samples_total": ("Samples taken", SOURCE),
    "monitor_samples_missed_total": ("Samples not taken because one before was late or took too long", SOURCE),
    "monitor_sample_rate_hertz": ("Samples a second that were taken in the last second or two", SOURCE),
    "monitor_sample_rate_wanted_hertz": ("Samples a second that were asked for", SOURCE),
    "monitor_sample_lateness_seconds": ("How late the last sample began", SOURCE),
    "monitor_sample_lateness_max_seconds": ("How late a sample began at most in the last 120 seconds", SOURCE),
    "monitor_source_cpu_seconds_total": ("CPU time of the source's threads", ("source", "thread")),
    "monitor_cpu_seconds_total": ("CPU time of the monitor, all threads", NONE),
    "monitor_refused_processes_total": ("Processes on a GPU whose environment the kernel does not show", ()),
    "monitor_nvml_errors_total": ("NVML calls that failed, those of no GPU under an empty name", ("gpu", "call")),
    "monitor_series_left_out": ("Series that find no room in the timeline, as of too many servers", NONE),
    "monitor_scrape_duration_seconds": ("How long the last scrape took to answer", NONE),
}
# What the largest value in the window is told of, from all samples.
PEAKS = {
    "gpu_memory_used_bytes": "gpu_memory_used_max_bytes",
    "gpu_process_memory_bytes": "gpu_process_memory_max_bytes",
    "monitor_sample_lateness_seconds": "monitor_sample_lateness_max_seconds",
}
# Told by the source, and so not from the timeline.
STATES: dict[str, Callable[[Source, int], float | None]] = {
    "monitor_up": lambda source, now_ns: source.up(now_ns),
    "monitor_last_success_timestamp_seconds": lambda source, _: _seconds(source.success_wall_ns),
    "monitor_samples_total": lambda source, _: source.samples,
    "monitor_samples_missed_total": lambda source, _: source.missed,
    "monitor_sample_rate_hertz": lambda source, _: source.hz,
    "monitor_sample_rate_wanted_hertz": lambda source, _: source.wanted_hz,
    "monitor_sample_lateness_seconds": lambda source, _: source.lateness,
}
# By metric and the values of its labels.
Values = defaultdict[str, dict[tuple[str, ...], float]]


class TimelineCollector(Collector):
    """Answers a scrape from the newest ticks and from what the samplers know of themselves; reads no hardware.

    Values that are older than they hold are absent; window maxima go back 120 seconds, counters to the start.
    """

    def __init__(
        self,
        timeline: Timeline,
        host: Source,
        gpus: Gpus,
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
        values: Values = defaultdict(dict)
        now_ns = self._clock()
        self._add_timeline(values, now_ns)
        self._add_gpus(values)
        self._add_monitor(values, now_ns)
        for name, (text, labels) in METRICS.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"headroom_{name}", text, labels=labels)
            for of, value in values[name].items():
                family.add_metric(of, value)
            yield family
        yield self._identities()

    def _add_timeline(self, values: Values, now_ns: int) -> None:
        latest: Readings = {}
        for ring in self._timeline.rings.values():
            latest |= ring.latest(now_ns - ring.stale_ns)
            # By the columns, because a spike just before the end of a series is what is looked for.
            if any(series.metric in PEAKS for series in ring.columns):
                peaks = ring.peaks(now_ns - PEAK_NS).items()
                latest |= {
                    series._replace(metric=PEAKS[series.metric]): value
                    for series, value in peaks
                    if series.metric in PEAKS
                }
        for series, value in latest.items():
            if series.metric in METRICS:
                values[series.metric][_labels(series)] = value

    def _add_gpus(self, values: Values) -> None:
        # From what was counted, not from the timeline, which forgets: they stay when the GPU is lost.
        for gpu_reason, seconds in self._gpus.throttled().items():
            values["gpu_throttled_seconds_total"][gpu_reason] = seconds
        for (gpu, code), xid in self._gpus.xids().items():
            values["gpu_xid_errors_total"][gpu, str(code)] = xid.count
            values["gpu_xid_last_timestamp_seconds"][gpu, str(code)] = xid.last_wall_ns / SECOND
        for gpu_call, count in self._gpus.errors().items():
            values["monitor_nvml_errors_total"][gpu_call] = count

    def _add_monitor(self, values: Values, now_ns: int) -> None:
        for source in [self._host, *self._gpus.sources()]:
            for name, state in STATES.items():
                value = state(source, now_ns)
                if value is not None:
                    values[name][source.name,] = value
            for sampler in source.samplers:
                values["monitor_source_cpu_seconds_total"][source.name, sampler.name] = sampler.cpu_seconds
        values["monitor_refused_processes_total"][()] = self._gpus.refused()
        values["monitor_series_left_out"][()] = self._timeline.left_out(now_ns - STALE_NS)
        if self.scrape_seconds is not None:
            values["monitor_scrape_duration_seconds"][()] = self.scrape_seconds

    def _identities(self) -> Metric:
        family = InfoMetricFamily("headroom_gpu", "Identity of the GPU or MIG device", labels=GPU)
        for device in self._gpus.identities():
            family.add_metric((device.gpu,), {"uuid": device.uuid, "name": device.name, "driver": device.driver})
        return family


def _labels(series: Series) -> tuple[str, ...]:
    _, labels = METRICS[series.metric]
    return tuple(getattr(series, label if label in ("server", "gpu") else "detail") or "" for label in labels)


def _seconds(wall_ns: int | None) -> float | None:
    return None if wall_ns is None else wall_ns / SECOND
