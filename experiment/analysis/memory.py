"""The layers of a run's memory on one time axis (CLOCK_MONOTONIC): device, process, host, allocator and KV cache.

Device and process come from the monitor's timeline, the allocator and the KV cache from the samples of /metrics.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from experiment.analysis.live import Cache, Moments, caches, numbers
from experiment.analysis.requests import Flags, Floats, Requests
from experiment.run.kv import REASONS

# The finest resolution a chart shows; of each stretch of time it keeps the largest and the smallest value.
MAX_POINTS = 800
# Nothing is sampled more seldom than once a second: after a longer silence it is not known what was there.
GAP_NS = 3_000_000_000
# Whose memory is that of a GPU's processes that are no server's, and of those that the driver does not tell apart.
UNATTRIBUTED = "unattributed"
Layer = Literal["device", "process", "host", "allocator"]
Window = tuple[int, int]
JSON = dict[str, Any]

# What the monitor's metrics and the servers' are in the layers.
_DEVICE = {"gpu_memory_used_bytes": "used", "gpu_memory_reserved_bytes": "reserved by the driver"}
_SERVERS: dict[Layer, str] = {"process": "gpu_process_memory_bytes", "host": "host_pss_bytes"}
_ALLOCATOR = {"torch_reserved_bytes": "reserved", "torch_allocated_bytes": "allocated"}


@dataclass(frozen=True)
class Series:
    """Bytes over time; `owner` is a server or `unattributed`, "" for a whole GPU, and `gpu` is "" off the GPU."""

    layer: Layer
    owner: str
    gpu: str
    name: str
    time_ns: Moments
    values: Floats


@dataclass(frozen=True)
class Memory:
    """All layers of a run: bytes over time, and the KV caches by server."""

    series: list[Series]
    caches: dict[str, Cache]

    def figures(self, target: str, windows: Sequence[Window]) -> JSON:
        """Mean and maximum of each layer for a server in some windows of time; layers without a sample are left out.

        The device is that of all servers; `unattributed` is what the monitor knows of no server for. Values are bytes,
        or tokens or blocks where `kv.unit` says so.
        """
        found: JSON = {}
        for one in self.series:
            if one.owner in (target, UNATTRIBUTED, "") and (figures := over_time(one, windows)):
                what = UNATTRIBUTED if one.owner == UNATTRIBUTED else one.name
                name = f"GPU {one.gpu} {what}" if one.gpu else what
                found.setdefault(one.layer, {})[name] = figures
        if target in self.caches and (kv := cache_figures(self.caches[target], windows)):
            found["kv"] = kv
        return found

    def gpus(self, target: str, windows: Sequence[Window]) -> list[str]:
        """The GPUs on which a server's processes held memory in some windows; none where the monitor cannot tell."""
        own = (one for one in self.series if (one.layer, one.owner) == ("process", target))
        return [one.gpu for one in own if (held := over_time(one, windows)) and held["max"] > 0]


def gather(
    timeline: pa.Table | None, samples: Mapping[str, pa.Table], requests: Mapping[str, Sequence[Requests]]
) -> Memory:
    """Join what the monitor, the servers and the clients have seen; samples and requests are by server.

    Of the monitor's samples those of the servers that have a place in `requests` are taken.
    """
    series = list(_of_monitor(timeline, requests.keys())) if timeline is not None else []
    for target, table in samples.items():
        for column, name in _ALLOCATOR.items():
            given = table.filter(pc.is_valid(table[column]))
            if given.num_rows:
                times, values = numbers(given, "answered_ns"), numbers(given, column).astype(np.float64)
                series.append(Series("allocator", target, "", name, times, values))
    return Memory(series, caches(samples, requests))


def cache_table(memory: Memory) -> pa.Table:
    """All samples of the KV caches, with the bounds of the live tokens; counts of tokens, or of blocks by `unit`."""
    tables = []
    for target, cache in memory.caches.items():
        columns = {"time_ns": cache.time_ns, "target": [target] * len(cache.time_ns)}
        columns |= {"unit": [cache.unit] * len(cache.time_ns), **cache.counts}
        tables.append(pa.table(columns | {"running": cache.running, "broken": cache.broken}))
    return pa.concat_tables(tables, promote_options="default")


def inside(time_ns: Moments, windows: Sequence[Window]) -> Flags:
    """Which of the moments are inside any of the windows."""
    found = np.zeros(len(time_ns), dtype=np.bool_)
    for start_ns, end_ns in windows:
        found |= (time_ns >= start_ns) & (time_ns < end_ns)
    return found


def cache_figures(cache: Cache, windows: Sequence[Window]) -> JSON | None:
    """Mean over time and maximum of a KV cache in some windows, shares of the mean allocated, quality of the samples.

    Live tokens and waste have a `low` and a `high`, which are equal where the server counts them itself; there are none
    where the counts are of blocks. None without a sample.
    """
    within = inside(cache.time_ns, windows)
    if not within.any():
        return None
    held_ns, size = _held_ns(cache.time_ns, windows), cache.token_bytes or 1
    values = {name: _mean_and_max(counts * size, held_ns) for name, counts in cache.counts.items()}
    parts = (name for name in ("live", *REASONS) if f"{name}_low" in values)
    return {
        "unit": "bytes" if cache.token_bytes else cache.unit,
        "live_source": cache.source,
        "block_size": cache.block_size,
        "samples": int(within.sum()),
        "samples_per_second": float(within.sum() / sum(end - start for start, end in windows) * 1e9),
        "missed": int(cache.missed[inside(cache.missed_ns, windows)].sum()),
        "broken": int(cache.broken[within].sum()),
        "capacity": values["capacity"],
        "allocated": values["allocated"],
        "running": _mean_and_max(cache.running, held_ns),
        "parts": {part: _part(part, values) for part in parts},
    }


def _part(part: str, values: Mapping[str, JSON]) -> JSON:
    allocated = values["allocated"]["mean"]
    found: JSON = {end: values[f"{part}_{end}"] for end in ("low", "high")}
    return found | {"share": [found[end]["mean"] / allocated if allocated else None for end in ("low", "high")]}


def _mean_and_max(values: Floats, held_ns: Floats) -> JSON:
    chosen = held_ns > 0
    return {"mean": float(np.average(values[chosen], weights=held_ns[chosen])), "max": float(values[chosen].max())}


def _held_ns(time_ns: Moments, windows: Sequence[Window]) -> Floats:
    """For how long each sample holds inside some windows: until the next, or a gap."""
    end_ns = np.minimum(np.append(time_ns[1:], time_ns[-1:] + GAP_NS), time_ns + GAP_NS)
    held_ns = np.zeros(len(time_ns))
    for first_ns, last_ns in windows:
        held_ns += np.maximum(0, np.minimum(end_ns, last_ns) - np.maximum(time_ns, first_ns))
    return held_ns


def _of_monitor(timeline: pa.Table, targets: Collection[str]) -> Iterator[Series]:
    for metric, name in _DEVICE.items():
        yield from _series(timeline, metric, "device", name)
    for layer, metric in _SERVERS.items():
        for one in _series(timeline, metric, layer, "held"):
            if one.owner in (*targets, UNATTRIBUTED):
                yield one


def _series(timeline: pa.Table, metric: str, layer: Layer, name: str) -> Iterator[Series]:
    """A metric by GPU and server, each in the order of time."""
    rows = timeline.filter(pc.equal(timeline["metric"], metric)).select(["time_ns", "server", "gpu", "value"])
    for column in ("server", "gpu"):
        texts = pc.fill_null(rows[column].cast(pa.string()), "")
        rows = rows.set_column(rows.schema.get_field_index(column), column, texts)
    owners = rows.group_by(["gpu", "server"]).aggregate([]).to_pylist()
    for owner in sorted(owners, key=lambda owner: (_numbered(owner["gpu"]), owner["server"])):
        same = pc.and_(pc.equal(rows["gpu"], owner["gpu"]), pc.equal(rows["server"], owner["server"]))
        own = rows.filter(same).sort_by("time_ns")
        yield Series(layer, owner["server"], owner["gpu"], name, own["time_ns"].to_numpy(), own["value"].to_numpy())


def _numbered(gpu: str) -> list[tuple[int, str]]:
    """A key that puts GPU 2 before GPU 10; one that took another's place has its UUID after the number (2:GPU-...)."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split("[/:]", gpu)]


def over_time(series: Series, windows: Sequence[Window]) -> JSON | None:
    """Mean over time and maximum of a series inside some windows; None where nothing was sampled.

    A sample holds until the next or a gap, so that the first of a window is the last one before it: some series are
    sampled more often while they change.
    """
    held_ns = _held_ns(series.time_ns, windows)
    return _mean_and_max(series.values, held_ns) if held_ns.any() else None


def runs(time_ns: Moments, gap_ns: int = GAP_NS) -> Moments:
    """The number of the run without a gap that each sample belongs to, from 0; times ascend."""
    return np.cumsum(np.diff(time_ns, prepend=time_ns[:1]) > gap_ns, dtype=np.int64)


def thin(time_ns: Moments, values: Floats, points: int = MAX_POINTS) -> NDArray[np.int64]:
    """Positions of at most `points` values (three at least), ascending: of each stretch of time its extremes and end.

    Stretches are of equal time, as samples are not: what is shown from one sample to the next is never wrong for longer
    than a stretch.
    """
    if len(values) <= points:
        return np.arange(len(values))
    since_ns = time_ns - time_ns[0]
    stretch = since_ns * max(1, points // 3) // (since_ns[-1] + 1)
    ends = np.flatnonzero(np.diff(stretch, append=stretch[-1] + 1)) + 1
    kept = [ends - 1]
    for begin, end in zip(np.append(0, ends[:-1]), ends, strict=True):
        part = values[begin:end]
        kept.append(begin + np.array([np.argmax(part), np.argmin(part)]))
    return np.unique(np.concatenate(kept))
