"""What NVML can tell of a device: each call, as values in base units.

Source: https://docs.nvidia.com/deploy/nvml-api/. The calls are in three tiers: memory and processes take microseconds
and change at once; `SLOW` is what the driver itself averages (utilization over 1/6 to 1 s, power over 1 s since Ampere,
GA100 apart), the temperature, and what is cheap beside these; what `DEAR` reads blocks for up to 21 ms.
"""

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import byref, c_char, c_uint, sizeof
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pynvml

# The device or the driver is gone: nothing can be read of it until NVML is opened anew.
LOST = {
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
}
# The device or the driver is of a kind that has no answer, for now: NVLink is supported once its fabric is up.
UNSUPPORTED = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_VGPU_ECC_NOT_SUPPORTED,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_DEPRECATED,
}
# Of the reasons for clocks below their maximum, those that hold up work; to be idle, or set so, does not.
THROTTLING = {
    "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
    "sw_thermal_slowdown": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal_slowdown": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw_power_brake_slowdown": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}

# By metric and detail.
Values = dict[tuple[str, str | None], float]
Memory = tuple[float, float, float, float]


class Reader:
    """The two calls that are made most, into memory that is taken once.

    nvidia-ml-py allocates for each answer, and asks for the list of processes twice.
    """

    # c_nvmlMemory_v2_t: version, then total, reserved, free and used.
    MEMORY = struct.Struct("8x4Q")
    # c_nvmlProcessInfo_v3_t: pid, usedGpuMemory, gpuInstanceId, computeInstanceId.
    PROCESS = struct.Struct("I4xQII")

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        answer = bytearray(sizeof(pynvml.c_nvmlMemory_v2_t))
        struct.pack_into("I", answer, 0, pynvml.nvmlMemory_v2)
        self._memory = memoryview(answer)
        self._memory_at = (c_char * len(answer)).from_buffer(answer)
        self._unpack = self.MEMORY.unpack_from
        self._get_memory = _function("nvmlDeviceGetMemoryInfo_v2")
        self._get_processes = _function("nvmlDeviceGetComputeRunningProcesses_v3")
        self._count = c_uint()
        self._count_at = byref(self._count)
        self._make_room(64)

    def memory(self) -> Memory:
        """Answer total, reserved, free and used bytes, the last without the driver's reserve; raises NVMLError."""
        if error := self._get_memory(self._handle, self._memory_at):
            raise pynvml.NVMLError(error)
        return self._unpack(self._memory)

    def processes(self) -> Iterator[tuple[int, int, int, int]]:
        """Answer the fields of PROCESS for each process that computes on the device; raises NVMLError."""
        while True:
            self._count.value = self._room
            error = self._get_processes(self._handle, self._count_at, self._processes)
            if not error:
                return self.PROCESS.iter_unpack(self._bytes[: self._count.value * self.PROCESS.size])
            if error != pynvml.NVML_ERROR_INSUFFICIENT_SIZE:
                raise pynvml.NVMLError(error)
            self._make_room(2 * max(self._room, self._count.value))

    def _make_room(self, processes: int) -> None:
        self._room = processes
        array = bytearray(processes * sizeof(pynvml.c_nvmlProcessInfo_v3_t))
        self._bytes = memoryview(array)
        self._processes = (c_char * len(array)).from_buffer(array)


def _function(name: str) -> Callable[..., int]:
    if not _has(name):
        return lambda *_: int(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    found: Callable[..., int] = getattr(pynvml.nvmlLib, name)
    return found


@cache
def _has(name: str) -> bool:
    """Tell whether the driver has a function: it is the same as long as the monitor runs, and a miss is dear."""
    return hasattr(pynvml.nvmlLib, name)


@dataclass
class Device:
    """A GPU or a MIG device as NVML was opened; what is known of its calls holds until NVML is opened anew.

    `tiers` names what is sampled of it: the memory of a GPU that is split into MIG devices belongs to those.
    `unsupported` and `failing` say of a call since when (CLOCK_MONOTONIC, ns).
    """

    gpu: str
    uuid: str
    name: str
    driver: str
    handle: Any
    tiers: frozenset[str]
    unsupported: dict[str, int] = field(default_factory=dict)
    failing: dict[str, int] = field(default_factory=dict)
    nvlink_kib: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def card(self) -> bool:
        """Whether this is a whole GPU, MIG devices or not."""
        return "dear" in self.tiers

    @property
    def parent(self) -> str | None:
        """The GPU that a MIG device is a part of."""
        return None if self.card else self.gpu.partition("/")[0]

    @property
    def split(self) -> bool:
        """Whether this is a GPU that is split into MIG devices."""
        return self.card and "fast" not in self.tiers


@dataclass(frozen=True)
class Found:
    """The GPUs found, why there are none or not all, and whether the driver answered and listed all it has.

    `driver` is false on a machine without the driver's library.
    """

    devices: list[Device]
    reason: str | None = None
    complete: bool = False
    driver: bool = True


def open_nvml(errors: Counter[str]) -> Found:
    """Open NVML and find every GPU; on a machine without a GPU or driver there are none, and a reason.

    Errors of `init`, `count` and `handle` are counted.
    """
    call = "init"
    try:
        pynvml.nvmlInit()
        call = "count"
        driver = pynvml.nvmlSystemGetDriverVersion()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError_LibraryNotFound:
        return Found([], "the NVIDIA driver's libnvidia-ml.so.1 is not installed", driver=False)
    except pynvml.NVMLError as error:
        errors[call] += 1
        return Found([], f"NVML says: {error}")
    devices: list[Device] = []
    reasons: list[str] = []
    for index in range(count):
        try:
            devices.append(_open(index, driver))
        except pynvml.NVMLError as error:
            errors["handle"] += 1
            reasons.append(f"GPU {index}: NVML says: {error}")
    complete = not reasons
    if not count:
        reasons = ["the NVIDIA driver lists none"]
    return Found(devices, "; ".join(reasons) or None, complete)


def close_nvml() -> None:
    """Close NVML, open or not; what was found becomes invalid."""
    try:
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        # It was not open, or the driver has gone: all that matters is that it can be opened again.
        return


def mig_devices(card: Device) -> list[Device]:
    """List the MIG devices of a GPU that is split, while NVML is open; raises NVMLError."""
    return [
        _device(f"{card.gpu}/{number}", part, card.driver, frozenset({"fast"}))
        for number, part in _mig_handles(card.handle)
    ]


def _open(index: int, driver: str) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    tiers = frozenset({"slow", "dear"} if _is_split(handle) else {"fast", "slow", "dear"})
    return _device(str(index), handle, driver, tiers)


def _device(gpu: str, handle: Any, driver: str, tiers: frozenset[str]) -> Device:
    return Device(gpu, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), driver, handle, tiers)


def _is_split(handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except pynvml.NVMLError as error:
        if error.value in LOST:
            raise
        return False


def _mig_handles(handle: Any) -> Iterator[tuple[int, Any]]:
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield number, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except pynvml.NVMLError_NotFound:
            continue


def _utilization(device: Device) -> Values:
    return {("gpu_utilization_ratio", None): pynvml.nvmlDeviceGetUtilizationRates(device.handle).gpu / 100}


def _power(device: Device) -> Values:
    return {("gpu_power_watts", None): pynvml.nvmlDeviceGetPowerUsage(device.handle) / 1000}


def _temperature(device: Device) -> Values:
    # Drivers of before 2025 have the second only.
    new = _has("nvmlDeviceGetTemperatureV")
    read = pynvml.nvmlDeviceGetTemperatureV if new else pynvml.nvmlDeviceGetTemperature
    return {("gpu_temperature_celsius", None): read(device.handle, pynvml.NVML_TEMPERATURE_GPU)}


def _clocks(device: Device) -> Values:
    kinds = {"sm": pynvml.NVML_CLOCK_SM, "memory": pynvml.NVML_CLOCK_MEM}
    return {
        ("gpu_clock_hertz", detail): pynvml.nvmlDeviceGetClockInfo(device.handle, kind) * 1e6
        for detail, kind in kinds.items()
    }


def _throttling(device: Device) -> Values:
    # Drivers of before 2023 have the second only.
    new = _has("nvmlDeviceGetCurrentClocksEventReasons")
    reasons = (
        pynvml.nvmlDeviceGetCurrentClocksEventReasons if new else pynvml.nvmlDeviceGetCurrentClocksThrottleReasons
    )(device.handle)
    return {("gpu_throttled", detail): float(bool(reasons & bit)) for detail, bit in THROTTLING.items()}


def _energy(device: Device) -> Values:
    millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(device.handle)
    return {("gpu_energy_joules_total", None): millijoules / 1000}


def _pcie(device: Device) -> Values:
    kinds = {"tx": pynvml.NVML_PCIE_UTIL_TX_BYTES, "rx": pynvml.NVML_PCIE_UTIL_RX_BYTES}
    return {
        # NVML says KB/s, over the 20 ms for which it blocks.
        ("gpu_pcie_bytes_per_second", detail): pynvml.nvmlDeviceGetPcieThroughput(device.handle, kind) * 1000
        for detail, kind in kinds.items()
    }


def _nvlink(device: Device) -> Values:
    kinds = {
        "tx": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
        "rx": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
    }
    (links,) = pynvml.nvmlDeviceGetFieldValues(device.handle, [pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT])
    if links.nvmlReturn or not links.value.uiVal:
        raise pynvml.NVMLError(links.nvmlReturn or pynvml.NVML_ERROR_NOT_SUPPORTED)
    values: Values = {}
    # Link by link, 1 ms of CPU each on an H200. The driver can add them up in a tenth of that (scopeId UINT_MAX), and
    # did so rightly; but two programs that let it (580.159.04) died of memory that something had written over.
    for detail, kind in kinds.items():
        fields = pynvml.nvmlDeviceGetFieldValues(device.handle, [(kind, link) for link in range(links.value.uiVal)])
        kib = {(detail, number): link.value.ullVal for number, link in enumerate(fields) if not link.nvmlReturn}
        if not kib:
            raise pynvml.NVMLError(fields[0].nvmlReturn)
        # A link that fails keeps what it had: a sum that falls would look like a counter that was reset.
        device.nvlink_kib.update(kib)
        total = sum(count for (kind_of, _), count in device.nvlink_kib.items() if kind_of == detail)
        values["gpu_nvlink_bytes_total", detail] = total * 1024
    return values


def _ecc(device: Device) -> Values:
    kinds = {
        "corrected": pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        "uncorrected": pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    }
    return {
        # Since the driver was loaded.
        ("gpu_ecc_errors_total", detail): pynvml.nvmlDeviceGetTotalEccErrors(
            device.handle, kind, pynvml.NVML_VOLATILE_ECC
        )
        for detail, kind in kinds.items()
    }


Call = Callable[[Device], Values]
SLOW: dict[str, Call] = {
    "utilization": _utilization,
    "power": _power,
    "clocks": _clocks,
    "throttling": _throttling,
    "temperature": _temperature,
}
DEAR: dict[str, Call] = {"energy": _energy, "pcie": _pcie, "nvlink": _nvlink, "ecc": _ecc}
FAST = ("memory", "processes")
