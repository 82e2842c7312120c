"""Runs the cells of a plan and keeps what they leave: records, timeline, logs.

Every cell has a folder of its own, written as it goes, so that a run that is killed stays readable.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from experiment.kv import Sampling
from experiment.model import token_of_vllm
from experiment.plan import TARGETS, Cell, Plan
from experiment.stack import Program, RunError, Stack, end, get, spawn
from loadtest import records

LOCUSTFILE = Path(records.__file__).with_name("locustfile.py")
LOADTEST_STOP_SECONDS = 15


def run_cells(plan: Plan, stack: Stack, folder: Path, console: Console) -> None:
    """Run all cells in order; raises RunError, KeyboardInterrupt or OSError with everything measured so far kept."""
    cells = list(plan.cells())
    took: dict[tuple[str, int], list[float]] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    options = workload_options(plan, stack)
    timeline = Timeline(stack.programs["monitor"].url, folder / "timeline")
    servers = {target: stack.programs[target].url for target in TARGETS}
    token = token_of_vllm(plan, servers["vllm"])
    with progress, timeline, Sampling(servers, folder / "kv", token) as kv:
        for cell in cells:
            kv.focus(cell.target)
            left = time_left(cells[cell.index - 1 :], took)
            label = f"cell {cell.index}/{len(cells)}: {cell.target}, concurrency {cell.concurrency}"
            total = cell_requests(plan, cell)
            task = progress.add_task(label, total=total, left=left)
            if not console.is_terminal:
                console.print(f"{label}, {total} requests; {left}", markup=False)
            started = time.monotonic()
            _run_cell(plan, cell, stack, options, folder / "cells" / cell.name, partial(_show, progress, task))
            timeline.keep()
            took.setdefault((cell.target, cell.concurrency), []).append(time.monotonic() - started)
            progress.remove_task(task)
            if console.is_terminal:
                console.print(f"{label}: done in {time.monotonic() - started:.0f} s")


def cell_requests(plan: Plan, cell: Cell) -> int:
    """All requests of a cell: warm-up at the measured concurrency, measured, and those that keep the load up."""
    return warmup(cell) + plan.requests(cell.concurrency) + drain(cell)


def warmup(cell: Cell) -> int:
    """Requests before the measured ones: one for each in flight, at least two."""
    return max(2, cell.concurrency)


def drain(cell: Cell) -> int:
    """Requests after the measured ones, so that the last of these still run at the cell's concurrency."""
    return cell.concurrency - 1


def time_left(cells: list[Cell], took: dict[tuple[str, int], list[float]]) -> str:
    """Time for the cells that are left, from those that ran: of the same kind where there are any."""
    known = [seconds for times in took.values() for seconds in times]
    if not known:
        return "time left: not known yet"

    def guess(cell: Cell) -> float:
        same = took.get((cell.target, cell.concurrency)) or known
        return sum(same) / len(same)

    seconds = round(sum(guess(cell) for cell in cells))
    return f"about {seconds // 60}:{seconds % 60:02d} left"


class Timeline:
    """Takes over what the monitor has sampled, piece by piece, so that neither its end nor ours loses the rest."""

    def __init__(self, url: str, folder: Path):
        self._url = url
        self._folder = folder
        self._since_ns = 0

    def __enter__(self) -> "Timeline":
        self._folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        self.keep()

    def keep(self) -> None:
        """Write the samples since the last call to a file of their own."""
        now_ns = time.monotonic_ns()
        body = get(f"{self._url}/timeline?since_ns={self._since_ns}&until_ns={now_ns}")
        if body is not None:
            _replace(self._folder / f"{now_ns}.arrow", body)
            self._since_ns = now_ns


def _show(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def _run_cell(
    plan: Plan,
    cell: Cell,
    stack: Stack,
    options: dict[str, object],
    cell_folder: Path,
    report: Callable[[int], None],
) -> None:
    cell_folder.mkdir(parents=True)
    planned = {"planned_requests": cell_requests(plan, cell)}
    state = asdict(cell) | planned | {"start_ns": time.monotonic_ns(), "end_ns": None, "complete": False}
    write_json(cell_folder / "cell.json", state)
    loadtest = spawn(_command(plan, cell, options, cell_folder), cell_folder / "locust.log", {})
    program = Program("the load generator", loadtest, cell_folder / "locust.log", "")
    try:
        _watch(plan, cell, stack, program, cell_folder / "records.arrow", report)
        state["complete"] = True
    finally:
        if loadtest.poll() is None:
            loadtest.terminate()
        end(loadtest, LOADTEST_STOP_SECONDS)
        state["end_ns"] = time.monotonic_ns()
        write_json(cell_folder / "cell.json", state)


def workload_options(plan: Plan, stack: Stack) -> dict[str, object]:
    """Options of the load test that are the same in all cells."""
    return {
        "workload": plan.workload,
        "input-mean": plan.input_mean,
        "output-mean": plan.output_mean,
        "sigma": plan.sigma,
        "max-context": stack.max_model_len(),
        "model": plan.model,
        **{f"{target}-url": stack.programs[target].url for target in TARGETS},
    }


def flags(options: dict[str, object]) -> list[str]:
    """Options as arguments of a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def _command(plan: Plan, cell: Cell, options: dict[str, object], cell_folder: Path) -> list[str]:
    options = options | {
        "users": cell.concurrency,
        "spawn-rate": cell.concurrency,
        "requests": plan.requests(cell.concurrency),
        "warmup": warmup(cell),
        "drain": drain(cell),
        "seed": cell.seed,
        "records": cell_folder / "records.arrow",
        # Failed requests are records; the exit code is for failures of the load generator itself.
        "exit-code-on-error": 0,
    }
    locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    return [*locust, *flags(options), cell.target.upper()]


def _watch(
    plan: Plan, cell: Cell, stack: Stack, loadtest: Program, written: Path, report: Callable[[int], None]
) -> None:
    """Wait for the load generator; raises RunError when it, a server or the time for the cell comes to an end."""
    deadline = time.monotonic() + plan.cell_seconds
    while True:
        try:
            code = loadtest.process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = None
        report(_written(written))
        if code is not None:
            break
        stack.check()
        if time.monotonic() > deadline:
            raise RunError(f"--cell-seconds: cell {cell.name} was not done after {plan.cell_seconds:g} s")
    if code:
        loadtest.check()
    if any(record.error for record in records.read(written)):
        # Requests fail before a server's end is seen: give it the time to show.
        stack.require_healthy(cell.target)
    if _written(written) != cell_requests(plan, cell):
        raise RunError(f"the load generator ended early. The end of {loadtest.log}:\n{loadtest.tail()}")


def _written(path: Path) -> int:
    return records.count(path) if path.exists() else 0


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON; a file that was there stays whole until the new one is."""
    _replace(path, (json.dumps(value, indent=2) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever happens in between."""
    draft = path.with_name(path.name + ".draft")
    try:
        draft.write_bytes(content)
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
