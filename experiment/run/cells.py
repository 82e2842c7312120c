"""Runs the cells of a plan and keeps what they leave: records, timeline, samples of the KV caches, logs.

Every cell has a folder of its own, written as it goes, so that a run that is killed stays readable and can be resumed.
A run has a part for each time that it was begun or resumed; what is sampled all along is kept by part.
"""

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from experiment.analysis import requests, stats
from experiment.analysis.saturation import Search
from experiment.plan.plan import Cell, Plan, Target
from experiment.run.cell import Bench, replace, run_cells, user_of, workload_options
from experiment.run.kv import IDLE_NS, NEVER_NS, Sampling
from experiment.run.model import token_of_vllm
from experiment.run.stack import Stack, get

SEARCH_CELLS = 12


class Runner:
    """Runs cells one after another into `folder`; those that are complete are not run again.

    `part` counts the times that the run was begun or resumed, from 1.
    """

    def __init__(self, plan: Plan, stack: Stack, folder: Path, console: Console, part: int = 1):
        self._plan = plan
        self._folder = folder
        self._console = console
        self._bench = Bench(plan, stack, workload_options(plan, stack))
        suffix = "" if part == 1 else f"-{part}"
        self.timeline = Timeline(stack["monitor"].url, folder / f"timeline{suffix}")
        self.kv = Sampling(folder / f"kv{suffix}", IDLE_NS if plan.resident == "all" else NEVER_NS)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._took: dict[tuple[str, float], list[float]] = {}

    def run(self, cells: Sequence[Cell], planned: list[Cell]) -> None:
        """Run cells at the same time unless that was done; `planned` are all whose time is foreseen."""
        folder, first = self._folder / "cells", cells[0]
        if all(is_complete(folder / cell.name) for cell in cells):
            return
        for cell in cells:
            self._bench.stack.focus(cell.target)
            self.sample(next(target for target in self._plan.targets if target.name == cell.target))
        self.kv.focus([cell.target for cell in cells])
        rest = [one for one in planned if one.index >= first.index]
        label = _label(cells, len(planned))
        left = time_left(rest, self._took) if rest else "search"
        total = sum(self._plan.total(cell.level) for cell in cells)
        task = self.progress.add_task(label, total=total, left=left)
        if not self._console.is_terminal:
            more = "or more " if self._plan.goes_on_seconds else ""
            self._console.print(f"{label}, {total} {more}requests; {left}", markup=False)
        started = time.monotonic()
        run_cells(self._bench, cells, folder, partial(self._show, task))
        self.timeline.keep()
        for cell in cells:
            self._took.setdefault((cell.target, cell.level), []).append((time.monotonic() - started) / len(cells))
        self.progress.remove_task(task)
        if self._console.is_terminal:
            self._console.print(f"{label}: done in {time.monotonic() - started:.0f} s")

    def sample(self, target: Target) -> None:
        """Sample the KV cache of a server that is up, from now on."""
        if target.name not in self.kv:
            url = self._bench.stack[target.name].url
            ours = target.kind == "vllm" and not target.url
            token = token_of_vllm(self._plan, url, target.args) if ours else None
            self.kv.add(target.name, user_of(target), url, token)

    def _show(self, task: TaskID, done: int) -> None:
        self.progress.update(task, completed=done)


def run_plan(plan: Plan, stack: Stack, folder: Path, console: Console, part: int = 1) -> None:
    """Run all cells that are not complete; raises RunError, KeyboardInterrupt or OSError with everything kept."""
    planned = list(plan.cells())
    runner = Runner(plan, stack, folder, console, part)
    with runner.progress, runner.timeline, runner.kv:
        for target in plan.targets if plan.resident == "all" else []:
            runner.sample(target)
        for cells in plan.groups():
            runner.run(cells, planned)
        if plan.saturation:
            _search(plan, runner, folder, len(planned))


def _search(plan: Plan, runner: Runner, folder: Path, index: int) -> None:
    """Search the highest rate of each target that meets the limits; a resumed search takes the cells it had."""
    for target in plan.targets:
        search = Search(max(plan.levels), SEARCH_CELLS)
        while (rate := search.next_rate()) is not None:
            index += 1
            cell = plan.cell(index, target.name, rate, 1, search=True)
            runner.run([cell], [])
            search.tell(rate, attained(plan, cell, folder / "cells" / cell.name) >= plan.attainment)


def attained(plan: Plan, cell: Cell, folder: Path) -> float:
    """Share of a cell's measured requests, also of those never sent, that met every limit."""
    kept = requests.load(folder / "records.arrow")
    return float((kept.measured & stats.meets(kept, plan.limits)).sum() / plan.measured(cell.level))


def _label(cells: Sequence[Cell], planned: int) -> str:
    """Cells that run at the same time in words."""
    first, of = cells[0], f"/{planned}" if planned else ""
    if len(cells) == 1:
        return f"cell {first.index}{of}: {first.target}, {first.load}"
    return f"cells {first.index} to {cells[-1].index}{of}: {', '.join(c.target for c in cells)} together, {first.load}"


def is_complete(folder: Path) -> bool:
    """Whether a cell was run to its end."""
    path = folder / "cell.json"
    return path.exists() and bool(json.loads(path.read_text())["complete"])


def time_left(rest: list[Cell], took: Mapping[tuple[str, float], list[float]]) -> str:
    """Time for the cells that are left, from those that ran: of the same kind where there are any."""
    known = [seconds for times in took.values() for seconds in times]
    if not known:
        return "time left: not known yet"

    def guess(cell: Cell) -> float:
        same = took.get((cell.target, cell.level)) or known
        return sum(same) / len(same)

    seconds = round(sum(guess(cell) for cell in rest))
    return f"about {seconds // 60}:{seconds % 60:02d} left"


class Timeline:
    """Takes over what the monitor has sampled, piece by piece, so that neither its end nor ours loses the rest."""

    def __init__(self, url: str, folder: Path):
        self._url = url
        self._folder = folder
        self._since_ns = 0

    def __enter__(self) -> "Timeline":
        self._folder.mkdir()
        self._since_ns = time.monotonic_ns()
        return self

    def __exit__(self, *_: object) -> None:
        self.keep()

    def keep(self) -> None:
        """Write the samples since the last call to a file of their own."""
        now_ns = time.monotonic_ns()
        body = get(f"{self._url}/timeline?since_ns={self._since_ns}&until_ns={now_ns}")
        if body is not None:
            replace(self._folder / f"{now_ns}.arrow", body)
            self._since_ns = now_ns
