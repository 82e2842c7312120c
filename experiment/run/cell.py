"""Runs cells: starts a load generator for each, watches it and the servers, and keeps what it leaves."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiment.analysis import requests, stats
from experiment.analysis.requests import Requests
from experiment.environment import boot_id
from experiment.plan.plan import Cell, Plan, Target
from experiment.run.idle import prefix_tokens, settle, since
from experiment.run.stack import Program, RunError, Stack, end, spawn
from loadtest import records

LOCUSTFILE = Path(records.__file__).with_name("locustfile.py")
LOADTEST_STOP_SECONDS = 15
JUDGE_SECONDS = 1.0
# In a cell's folder while it runs: see Work.enough.
ENOUGH = "enough"


@dataclass(frozen=True)
class Bench:
    """What all cells of a run share; `options` are those of the load test that are the same for all of them."""

    plan: Plan
    stack: Stack
    options: Mapping[str, object]


@dataclass(frozen=True)
class Work:
    """A load generator at work on a cell, what cell.json says of it, and the server's `prefix_tokens` before it."""

    cell: Cell
    folder: Path
    program: Program
    state: dict[str, Any]
    prefix_tokens: dict[str, int] | None = None

    @property
    def records(self) -> Path:
        """Where the requests that have ended are."""
        return self.folder / "records.arrow"

    @property
    def enough(self) -> Path:
        """What tells a load generator that all those at work have what they are to measure at least."""
        return self.folder / ENOUGH


def run_cells(bench: Bench, cells: Sequence[Cell], folder: Path, report: Callable[[int], None]) -> None:
    """Run cells at the same time, each into a new folder in `folder`; they are complete when all came to their end.

    Raises RunError, KeyboardInterrupt or OSError with the records of all kept.
    """
    between = settle(bench.plan, bench.stack)
    works: list[Work] = []
    try:
        for cell in cells:
            # One by one, so that those that have begun are ended when another cannot begin.
            works.append(_begin(bench, cell, folder / cell.name, between))  # noqa: PERF401
        stopped_early = _watch(bench, works, report)
        for work in works:
            told = since(work.prefix_tokens, prefix_tokens(bench.stack[work.cell.target]))
            work.state.update(complete=True, stopped_early=stopped_early, prefix_tokens=told)
    finally:
        for work in works:
            if work.program.process.poll() is None:
                work.program.process.terminate()
        for work in works:
            end(work.program.process, LOADTEST_STOP_SECONDS)
            work.state["end_ns"] = time.monotonic_ns()
            work.enough.unlink(missing_ok=True)
            write_json(work.folder / "cell.json", work.state)


def _begin(bench: Bench, cell: Cell, folder: Path, between: Mapping[str, object]) -> Work:
    folder.mkdir(parents=True)
    state: dict[str, Any] = asdict(cell) | {"planned_requests": bench.plan.total(cell.level), "boot_id": boot_id()}
    state |= {**between, "start_ns": time.monotonic_ns(), "end_ns": None, "complete": False, "stopped_early": False}
    write_json(folder / "cell.json", state)
    target = next(target for target in bench.plan.targets if target.name == cell.target)
    before = prefix_tokens(bench.stack[cell.target])
    process = spawn(_command(bench, cell, target, folder), folder / "locust.log", settings_unset())
    program = Program("the load generator", process, folder / "locust.log", "")
    return Work(cell, folder, program, state, before)


def settings_unset() -> dict[str, None]:
    """The variables that a load generator would take settings from, unset: all that it does is in the plan."""
    return dict.fromkeys(name for name in os.environ if name.startswith(("HEADROOM_LOADTEST_", "LOCUST_")))


def workload_options(plan: Plan, stack: Stack) -> dict[str, object]:
    """Options of the load test that are the same for all targets and loads."""
    lengths = {"input-mean": plan.input_mean, "output-mean": plan.output_mean, "sigma": plan.sigma}
    # The others have their own, and the load test refuses options that it would not read.
    read = lengths if plan.workload == "lognormal" else {}
    # A request may wait as long as its cell may take: those at the end of a queue do.
    return {"workload": plan.workload, **read, "max-context": stack.max_model_len(), "timeout": plan.cell_seconds}


def user_of(target: Target) -> str:
    """The load test's name for a target: it knows two, and sends the same to both."""
    return "hf" if target.kind == "hf" else "vllm"


def flags(options: Mapping[str, object]) -> list[str]:
    """Options as arguments of a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def _command(bench: Bench, cell: Cell, target: Target, folder: Path) -> list[str]:
    plan = bench.plan
    options = dict(bench.options) | {
        f"{user_of(target)}-url": bench.stack[target.name].url,
        "model": target.model if target.url else plan.model,
        "requests": plan.measured(cell.level),
        "warmup": plan.warmup(cell.level),
        "drain": plan.drain(cell.level),
        "seed": cell.seed,
        "records": folder / "records.arrow",
        # Failed requests are records; the exit code is for failures of the load generator itself.
        "exit-code-on-error": 0,
    }
    if cell.arrival == "closed":
        options |= {"users": cell.level, "spawn-rate": cell.level, "min-seconds": plan.goes_on_seconds}
        if plan.together and plan.goes_on_seconds:
            options["until-file"] = folder / ENOUGH
    else:
        options |= {"users": 1, "arrival": cell.arrival, "rate": cell.level}
    locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    return [*locust, *flags(options), user_of(target).upper()]


def _watch(bench: Bench, works: Sequence[Work], report: Callable[[int], None]) -> bool:
    """Wait for load generators; returns whether a cell of a search was told before its end that it fails.

    Raises RunError when a load generator, a server or the time for the cells comes to an end.
    """
    plan = bench.plan
    deadline = time.monotonic() + plan.cell_seconds
    judged = time.monotonic()
    running = list(works)
    while running:
        with suppress(subprocess.TimeoutExpired):
            running[0].program.process.wait(0.2)
        ended = [work for work in running if work.program.process.poll() is not None]
        running = [work for work in running if work not in ended]
        report(sum(_written(work.records) for work in works))
        for work in ended:
            _require_whole(bench, work)
        if not running:
            return False
        bench.stack.check()
        cell = running[0].cell
        if time.monotonic() > deadline:
            raise RunError(f"--cell-seconds: cell {cell.name} was not done after {plan.cell_seconds:g} s")
        if plan.together and all(_has_enough(plan, work) for work in works):
            for work in works:
                work.enough.touch()
        if cell.search and time.monotonic() - judged > JUDGE_SECONDS:
            judged = time.monotonic()
            written = running[0].records
            if written.exists() and is_lost(plan, cell, requests.load(written)):
                return True
    return False


def _has_enough(plan: Plan, work: Work) -> bool:
    """Whether a server has answered all requests that are to be measured at least."""
    level = work.cell.level
    return _written(work.records) >= plan.warmup(level) + plan.measured(level)


def _require_whole(bench: Bench, work: Work) -> None:
    """Raise RunError when a load generator that has ended did not end well, or left less than all records."""
    if work.program.process.returncode:
        work.program.check()
    if any(record.error for record in records.read(work.records)):
        # Requests fail before a server's end is seen: give it the time to show.
        bench.stack.require_healthy(work.cell.target)
    written, planned = _written(work.records), bench.plan.total(work.cell.level)
    if bench.plan.goes_on_seconds:
        # How many more there were to be the load generator says: it came to its own end.
        work.state["planned_requests"] = max(planned, written)
    if written < planned or (written > planned and not bench.plan.goes_on_seconds):
        raise RunError(f"the load generator ended early. {work.program.tail()}")


def is_lost(plan: Plan, cell: Cell, ended: Requests) -> bool:
    """Whether so many measured requests missed a limit that a cell cannot reach the attainment any more."""
    missed = int((ended.measured & ~stats.meets(ended, plan.limits)).sum())
    planned = plan.measured(cell.level)
    return planned - missed < plan.attainment * planned


def _written(path: Path) -> int:
    return records.count(path) if path.exists() else 0


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON; a file that was there stays whole until the new one is."""
    replace(path, (json.dumps(value, indent=2) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever happens in between."""
    draft = path.with_name(path.name + ".draft")
    try:
        draft.write_bytes(content)
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
