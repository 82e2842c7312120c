"""The NVIDIA GPUs of this machine, read through NVML.

Source: https://docs.nvidia.com/deploy/nvml-api/. Only calls that take microseconds are made: total energy (2.6 ms)
and PCIe throughput (21 ms, it blocks) are not.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pynvml

from monitor.timeline import Readings, Series

UNATTRIBUTED = "unattributed"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU; `handle` is NVML's, and `nvml` is pynvml or anything that answers the same calls."""

    index: int
    uuid: str
    name: str
    handle: Any
    nvml: Any


@dataclass(frozen=True, slots=True)
class Devices:
    """The GPUs found, and why there are none or not all."""

    found: list[Device]
    reason: str | None


def open_devices(nvml: Any = pynvml) -> Devices:
    """Find every GPU; on a machine without a GPU or driver there are none, and a reason."""
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except pynvml.NVMLError_LibraryNotFound:
        return Devices([], "the NVIDIA driver's libnvidia-ml.so.1 is not installed")
    except pynvml.NVMLError as error:
        return Devices([], f"NVML says: {error}")
    found: list[Device] = []
    reasons: list[str] = [] if count else ["the NVIDIA driver lists none"]
    for index in range(count):
        try:
            found.append(_open(nvml, index))
        except pynvml.NVMLError as error:
            reasons.append(f"GPU {index}: NVML says: {error}")
    return Devices(found, "; ".join(reasons) or None)


def _open(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return Device(index, nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle), handle, nvml)


def read(device: Device, servers: Mapping[int, str], on_error: Callable[[str], None]) -> Readings:
    """Read one GPU: memory in bytes, utilization 0..1, power in W, and the memory of each server's processes.

    A call that fails makes its series absent and is told to `on_error` by its name in CALLS. Processes are matched
    by pid, so a container must see the host's pids (`pid: host`): otherwise all memory is unattributed.
    """
    answers: dict[str, Any] = {}
    for name, call in CALLS.items():
        try:
            answers[name] = call(device.nvml, device.handle)
        except pynvml.NVMLError:
            on_error(name)
    running = answers.pop("processes", None)
    values: dict[str, float] = {metric: value for answer in answers.values() for metric, value in answer.items()}
    readings = {Series(metric, gpu=device.index): value for metric, value in values.items()}
    if running is not None:
        used = by_server(running, servers, values.get("gpu_memory_used_bytes"))
        readings |= {Series("gpu_process_memory_bytes", server, device.index): used[server] for server in used}
    return readings


def by_server(running: Iterable[Any], servers: Mapping[int, str], device_used: float | None) -> dict[str, float]:
    """Sum the memory of a device's processes (bytes) by server; what no server accounts for is `unattributed`.

    The memory of a process may be unknown (under MIG, in WSL, without permission): then its server's is absent, not
    zero. The rest is at least 0, as the device and its processes are read a moment apart.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    unknown = set()
    for process in running:
        server = servers.get(process.pid)
        if server is None:
            continue
        if process.usedGpuMemory is None:
            unknown.add(server)
        else:
            sums[server] += process.usedGpuMemory
    known = {server: used for server, used in sums.items() if server not in unknown}
    if device_used is not None:
        known[UNATTRIBUTED] = max(0.0, device_used - sum(known.values()))
    return known


def _memory(nvml: Any, handle: Any) -> dict[str, float]:
    # Version 1 counts what the driver reserves as used.
    info = nvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return {
        "gpu_memory_used_bytes": float(info.used),
        "gpu_memory_free_bytes": float(info.free),
        "gpu_memory_reserved_bytes": float(info.reserved),
        "gpu_memory_total_bytes": float(info.total),
    }


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "memory": _memory,
    "processes": lambda nvml, handle: nvml.nvmlDeviceGetComputeRunningProcesses(handle),
    "utilization": lambda nvml, handle: {"gpu_utilization_ratio": nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100},
    "power": lambda nvml, handle: {"gpu_power_watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000},
}
