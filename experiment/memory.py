"""The monitor's timeline as series for charts: who held how much memory when."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from experiment.plan import TARGETS
from experiment.stats import Floats

# The finest resolution a chart shows; each of its points keeps the largest value of its stretch of time.
MAX_POINTS = 800


@dataclass(frozen=True)
class Series:
    """Memory of one owner over time: seconds since the start of the run, and bytes."""

    owner: str
    seconds: Floats
    values: Floats


def host_series(timeline: pa.Table, start_ns: int) -> list[Series]:
    """Proportional memory (PSS) on the host, by server."""
    return list(_by_server(timeline, "host_pss_bytes", TARGETS, start_ns))


def gpu_series(timeline: pa.Table, start_ns: int) -> list[Series]:
    """Memory on each GPU, by server, with what belongs to no server as `unattributed`; empty without a GPU."""
    return list(_by_server(timeline, "gpu_process_memory_bytes", (*TARGETS, "unattributed"), start_ns))


def _by_server(timeline: pa.Table, metric: str, servers: Sequence[str], start_ns: int) -> Iterator[Series]:
    rows = timeline.filter(pc.equal(timeline["metric"], metric)).select(["time_ns", "server", "gpu", "value"])
    rows = rows.set_column(1, "server", rows["server"].cast(pa.string()))
    rows = rows.filter(pc.is_in(rows["server"], pa.array(servers)))
    owners = rows.group_by(["server", "gpu"]).aggregate([]).to_pylist()
    several = len({owner["gpu"] for owner in owners}) > 1
    for owner in sorted(owners, key=lambda owner: (owner["gpu"] or 0, owner["server"])):
        own = rows.filter(pc.equal(rows["server"], owner["server"]))
        if owner["gpu"] is not None:
            own = own.filter(pc.equal(own["gpu"], owner["gpu"]))
        own = own.sort_by("time_ns")
        seconds = (own["time_ns"].to_numpy() - start_ns) / 1e9
        name = f"{owner['server']}, GPU {owner['gpu']}" if several else owner["server"]
        yield Series(name, *_thin(seconds, own["value"].to_numpy()))


def _thin(seconds: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Keep at most MAX_POINTS points, each the largest of its stretch, so that no spike is lost."""
    stretch = max(1, -(-len(values) // MAX_POINTS))
    starts = np.arange(0, len(values), stretch)
    return seconds[starts], np.maximum.reduceat(values, starts) if len(values) else values
