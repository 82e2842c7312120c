"""Starts the real programs as a user does."""

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from experiment.plan.plan import Plan
from loadtest.records import count

#: The command as anyone has it, also where Headroom was not installed but is only on the path.
HEADROOM = (sys.executable, "-c", "from experiment.cli import main; main()")
#: Bytes of KV cache of the servers that are started once for all: no whole number of blocks.
KV_BUDGET = 100_000_000


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def vllm_knows(option: str) -> bool:
    """Whether the vLLM that is installed has an option, which one that is not the pinned one may lack."""
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    sources = [path for folder in folders or () for path in Path(folder).glob("entrypoints/**/cli_args.py")]
    return any(option in path.read_text() for path in sources)


def make_plan(out: Path, **options: Any) -> Plan:
    hf, vllm, monitor = free_ports(3)
    small: dict[str, Any] = {
        "levels": [1, 3],
        "min_requests": 6,
        "requests_per_user": 2,
        "output_mean": 12,
        "min_seconds": 0,
        "repeats": 1,
    }
    return Plan(hf_port=hf, vllm_port=vllm, monitor_port=monitor, out=str(out), **(small | options))


class Compare:
    """`headroom compare` as a process of its own, as a user runs it; with `resume` it goes on with a run."""

    def __init__(self, out: Path, resume: Path | None = None, **options: Any):
        self.out = out
        # Eager: a start takes half the time, and these tests are not about speed.
        plan = make_plan(out, **({"vllm_args": "-- --enforce-eager"} | options))
        file = out.with_name(f"{out.name}-plan.json")
        file.write_text(json.dumps(plan.model_dump()))
        arguments = ["--resume", str(resume)] if resume else [str(file)]
        # A session of its own, so that a signal to its group is what Ctrl-C sends and does not reach the tests.
        self.process = subprocess.Popen(
            [*HEADROOM, "compare", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.seen: list[psutil.Process] = []

    @property
    def folder(self) -> Path:
        return next(self.out.iterdir())

    def wait_for_records(self, target: str) -> None:
        """Wait until a cell of the target has its first record."""
        deadline = time.monotonic() + 480
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()[0]
            if any(count(path) for path in self.out.glob(f"*/cells/*-{target}-*/records.arrow")):
                self.seen = psutil.Process(self.process.pid).children(recursive=True)
                return
            time.sleep(0.05)
        raise AssertionError(f"no record of {target} within 480 s")

    def find(self, *words: str) -> psutil.Process:
        """The process whose command line holds all the words."""
        return next(p for p in self.seen if all(word in " ".join(p.cmdline()) for word in words))

    def finish(self, seconds: float = 480) -> tuple[int, str]:
        """Wait for the end; returns exit code and output."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def left_behind(self) -> list[str]:
        """Processes that outlived the run by more than 3 seconds."""
        _, alive = psutil.wait_procs(self.seen, timeout=3)
        return [" ".join(process.cmdline()) for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def comparisons(folder: Path) -> Iterator[Callable[..., Compare]]:
    """Start comparisons with the given options of the plan; those that still run at the end are killed."""
    started: list[Compare] = []

    def start(out: str = "results", **options: Any) -> Compare:
        started.append(Compare(folder / out, **options))
        return started[-1]

    try:
        yield start
    finally:
        for run in started:
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
