"""How busy GPUs (by NVML) and processor were inside some windows of time: it shows what a server had too little of."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from experiment.analysis.memory import Window, inside

JSON = dict[str, Any]
# The driver's own averages of both are over up to so long, so what a sample says of is as old.
AVERAGED_NS = 1_000_000_000
_METRICS = {"gpu_utilization_ratio": "utilization", "gpu_power_watts": "power_watts"}


def gpus(timeline: pa.Table | None, windows: Sequence[Window], only: Collection[str] = ()) -> JSON:
    """Mean and maximum of each GPU's utilization (0 to 1) and power (watts), by GPU; without samples it is left out.

    `only` names the GPUs that are asked for; all are without a name. Utilization is the share of the driver's last
    averaging time, 1/6 s to 1 s, in which some kernel ran. It is that of all processes on the GPU. Samples of the first
    second of a window tell of the time before it too, and are left out.
    """
    found: JSON = {}
    if timeline is None:
        return found
    settled = [(start_ns + AVERAGED_NS, end_ns) for start_ns, end_ns in windows]
    for metric, name in _METRICS.items():
        rows = timeline.filter(pc.equal(timeline["metric"], metric))
        names = rows["gpu"].to_numpy()
        chosen = inside(rows["time_ns"].to_numpy(), settled)
        values = rows["value"].to_numpy()
        for gpu in sorted(gpu for gpu in set(names[chosen]) if not only or gpu in only):
            own = values[chosen & (names == gpu)]
            found.setdefault(gpu, {})[name] = {"mean": float(np.mean(own)), "max": float(np.max(own))}
    return found


def cores(timeline: pa.Table | None, target: str, windows: Sequence[Window]) -> float | None:
    """How many cores the processes of a server used on average; None where no window has two samples of their time."""
    if timeline is None:
        return None
    own = pc.and_(pc.equal(timeline["metric"], "host_cpu_seconds_total"), pc.equal(timeline["server"], target))
    rows = timeline.filter(own).sort_by("time_ns")
    times, used = rows["time_ns"].to_numpy(), rows["value"].to_numpy()
    within = [inside(times, [window]) for window in windows]
    within = [chosen for chosen in within if chosen.sum() > 1]
    seconds = sum(float(np.ptp(times[chosen])) for chosen in within) / 1e9
    return sum(float(np.ptp(used[chosen])) for chosen in within) / seconds if seconds else None
