"""GPUs, through a fake NVML."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

from monitor import nvml
from monitor.timeline import Readings, Series

GIB = 1024**3


@dataclass
class Process:
    pid: int
    usedGpuMemory: int | None  # noqa: N815 - NVML's name


@dataclass
class Memory:
    total: int = 80 * GIB
    reserved: int = 1 * GIB
    used: int = 30 * GIB
    free: int = 49 * GIB


@dataclass
class Utilization:
    gpu: int = 75


@dataclass
class FakeNvml:
    """Answers the calls that the monitor makes; `fails` maps a call's name to the error it raises."""

    gpus: int = 2
    processes: list[Process] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)

    def answer(self, call: str, value: Any, handle: str = "handle 0") -> Any:
        assert handle in ("handle 0", "handle 1")
        if call in self.fails:
            raise pynvml.NVMLError(self.fails[call])
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        self.answer("nvmlInit", None)

    def nvmlDeviceGetCount(self) -> Any:  # noqa: N802
        return self.answer("nvmlDeviceGetCount", self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        return self.answer(f"nvmlDeviceGetHandleByIndex({index})", f"handle {index}")

    def nvmlDeviceGetUUID(self, handle: str) -> Any:  # noqa: N802
        return self.answer("nvmlDeviceGetUUID", f"GPU-{handle}", handle)

    def nvmlDeviceGetName(self, handle: str) -> Any:  # noqa: N802
        return self.answer("nvmlDeviceGetName", "NVIDIA H200", handle)

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int) -> Any:  # noqa: N802
        assert version == pynvml.nvmlMemory_v2
        return self.answer("nvmlDeviceGetMemoryInfo", Memory(), handle)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:  # noqa: N802
        return self.answer("nvmlDeviceGetComputeRunningProcesses", self.processes, handle)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return self.answer("nvmlDeviceGetUtilizationRates", Utilization(), handle)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> Any:  # noqa: N802
        return self.answer("nvmlDeviceGetPowerUsage", 350_500, handle)


def read(fake: FakeNvml, servers: dict[int, str] | None = None) -> tuple[Readings, Counter[str]]:
    errors: Counter[str] = Counter()
    device = nvml.open_devices(FakeNvml()).found[1]
    device = nvml.Device(device.index, device.uuid, device.name, device.handle, fake)
    return nvml.read(device, servers or {}, lambda call: errors.update([call])), errors


def by_server(readings: Readings) -> dict[str | None, float]:
    return {series.server: value for series, value in readings.items() if series.metric == "gpu_process_memory_bytes"}


def test_devices_are_found_with_their_identity() -> None:
    devices = nvml.open_devices(FakeNvml())
    assert [(device.index, device.uuid, device.name) for device in devices.found] == [
        (0, "GPU-handle 0", "NVIDIA H200"),
        (1, "GPU-handle 1", "NVIDIA H200"),
    ]
    assert devices.reason is None


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (FakeNvml(fails={"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}), "libnvidia-ml.so.1 is not installed"),
        (FakeNvml(fails={"nvmlInit": pynvml.NVML_ERROR_DRIVER_NOT_LOADED}), "NVML says: Driver Not Loaded"),
        (FakeNvml(fails={"nvmlDeviceGetCount": pynvml.NVML_ERROR_UNKNOWN}), "NVML says: Unknown Error"),
        (FakeNvml(gpus=0), "the NVIDIA driver lists none"),
    ],
)
def test_no_device_comes_with_a_reason(fake: FakeNvml, reason: str) -> None:
    devices = nvml.open_devices(fake)
    assert devices.found == []
    assert reason in str(devices.reason)


def test_a_lost_device_leaves_the_others_and_is_named() -> None:
    devices = nvml.open_devices(FakeNvml(fails={"nvmlDeviceGetHandleByIndex(0)": pynvml.NVML_ERROR_GPU_IS_LOST}))
    assert [device.index for device in devices.found] == [1]
    assert devices.reason == "GPU 0: NVML says: GPU is lost"


def test_values_are_in_base_units_and_name_the_device() -> None:
    readings, errors = read(FakeNvml())
    assert readings == {
        Series("gpu_memory_used_bytes", gpu=1): 30 * GIB,
        Series("gpu_memory_free_bytes", gpu=1): 49 * GIB,
        Series("gpu_memory_reserved_bytes", gpu=1): 1 * GIB,
        Series("gpu_memory_total_bytes", gpu=1): 80 * GIB,
        Series("gpu_process_memory_bytes", "unattributed", 1): 30 * GIB,
        Series("gpu_utilization_ratio", gpu=1): 0.75,
        Series("gpu_power_watts", gpu=1): 350.5,
    }
    assert not errors


def test_the_parts_of_servers_and_the_rest_add_up_to_what_is_used() -> None:
    running = [Process(1, 5 * GIB), Process(2, 7 * GIB), Process(3, 11 * GIB), Process(99, 2 * GIB)]
    readings, _ = read(FakeNvml(processes=running), {1: "hf", 2: "vllm", 3: "vllm", 4: "idle"})
    assert by_server(readings) == {"hf": 5 * GIB, "vllm": 18 * GIB, "unattributed": 7 * GIB}
    assert sum(by_server(readings).values()) == readings[Series("gpu_memory_used_bytes", gpu=1)]


def test_unknown_memory_of_one_process_makes_its_server_absent() -> None:
    running = [Process(1, 5 * GIB), Process(2, None), Process(3, 11 * GIB), Process(99, None)]
    readings, errors = read(FakeNvml(processes=running), {1: "hf", 2: "vllm", 3: "vllm"})
    assert by_server(readings) == {"hf": 5 * GIB, "unattributed": 25 * GIB}
    assert not errors


def test_the_rest_is_not_negative_when_processes_grew_after_the_device_was_read() -> None:
    readings, _ = read(FakeNvml(processes=[Process(1, 31 * GIB)]), {1: "hf"})
    assert by_server(readings) == {"hf": 31 * GIB, "unattributed": 0}


@pytest.mark.parametrize(
    ("function", "call", "absent"),
    [
        ("nvmlDeviceGetComputeRunningProcesses", "processes", {"gpu_process_memory_bytes"}),
        ("nvmlDeviceGetUtilizationRates", "utilization", {"gpu_utilization_ratio"}),
        ("nvmlDeviceGetPowerUsage", "power", {"gpu_power_watts"}),
        (
            "nvmlDeviceGetMemoryInfo",
            "memory",
            {f"gpu_memory_{part}_bytes" for part in ("used", "free", "reserved", "total")},
        ),
    ],
)
def test_a_failed_call_makes_only_its_series_absent_and_is_counted(function: str, call: str, absent: set[str]) -> None:
    running = [Process(1, 5 * GIB)]
    whole, _ = read(FakeNvml(processes=running), {1: "hf"})
    part, errors = read(FakeNvml(processes=running, fails={function: pynvml.NVML_ERROR_NOT_SUPPORTED}), {1: "hf"})
    assert {series.metric for series in whole} - {series.metric for series in part} == absent
    assert errors == {call: 1}


def test_without_the_memory_call_servers_are_known_and_the_rest_is_not() -> None:
    fails = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}
    readings, _ = read(FakeNvml(processes=[Process(1, 5 * GIB)], fails=fails), {1: "hf"})
    assert by_server(readings) == {"hf": 5 * GIB}
