"""What `headroom classic` sees of memory: the machine, the GPUs, a server's processes and its KV cache."""

import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pynvml

from experiment.run import kv
from experiment.run.stack import get

Window = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """Memory in bytes; None where it is not known.

    `machine` is what all programs use of the host's memory and `gpus` of all GPUs together. Of the server: `held` is
    the largest share of its processes in the window, on the GPUs where there are some, else in the host's memory (PSS).
    The KV cache's `allocated` is the largest of `samples` in the window and `last` the latest, in `unit`.
    """

    machine: int
    gpus: int | None = None
    held: int | None = None
    capacity: int | None = None
    allocated: int | None = None
    last: int | None = None
    unit: str = "bytes"
    samples: int = 0
    block_size: int | None = None
    capacity_tokens: int | None = None


def read(monitor_url: str = "", server: str = "", samples: Path | None = None, window: Window = (0, 0)) -> Reading:
    """Read memory now, and that of a server in a window of CLOCK_MONOTONIC ns."""
    machine = psutil.virtual_memory()
    reading = {"machine": machine.total - machine.available, "gpus": _gpus()}
    if server:
        reading["held"] = _held(monitor_url, server, window)
    cache = _cache(samples, window) if samples else {}
    return Reading(**reading, **cache)  # type: ignore[arg-type]


def _gpus() -> int | None:
    """Bytes in use on all GPUs, without what the driver keeps; None where there is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2) for handle in handles]
        return sum(one.used for one in memory) if memory else None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _held(monitor_url: str, server: str, window: Window) -> int | None:
    """The most that a server's processes held in a window, summed over GPUs, from the monitor."""
    body = get(f"{monitor_url}/timeline?since_ns={window[0]}&until_ns={window[1]}")
    if body is None:
        return None
    with pa.ipc.open_stream(body) as reader:
        rows = reader.read_all()
    rows = rows.filter(pc.equal(rows["server"].cast(pa.string()), server))
    for metric in ("gpu_process_memory_bytes", "host_pss_bytes"):
        own = rows.filter(pc.equal(rows["metric"].cast(pa.string()), metric))
        if own.num_rows:
            each = own.group_by("gpu").aggregate([("value", "max")])
            return int(pc.sum(each["value_max"]).as_py())
    return None


def _cache(path: Path, window: Window) -> dict[str, object]:
    """What the samples of a KV cache show in a window."""
    rows = kv.read(path)
    rows = rows.filter(pc.is_null(rows["error"]))
    inside = pc.and_(pc.greater_equal(rows["asked_ns"], window[0]), pc.less_equal(rows["answered_ns"], window[1]))
    chosen = rows.filter(inside).to_pylist()
    if not chosen:
        return {}
    first = chosen[0]
    size = first["bytes_per_token"] if first["unit"] == "tokens" else None
    allocated = [row["allocated"] * (size or 1) for row in chosen]
    return {
        "capacity": first["capacity"] * (size or 1),
        "allocated": max(allocated),
        "last": allocated[-1],
        "unit": "bytes" if size else first["unit"],
        "samples": len(chosen),
        "block_size": first["block_size"],
        "capacity_tokens": first["capacity"] if first["unit"] == "tokens" else None,
    }


def rest(seconds: float) -> Window:
    """Wait, and return the time in which nothing was asked of any server."""
    begun = time.monotonic_ns()
    time.sleep(seconds)
    return begun, time.monotonic_ns()
