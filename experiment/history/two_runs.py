"""Two runs held against each other: what differs between them, and each metric with its ratio and interval."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from experiment.analysis import stats
from experiment.analysis.analyse import analyse
from experiment.analysis.requests import Floats
from experiment.analysis.results import JSON, CellResult, Results, damage_named, goes_on, load
from experiment.analysis.results import targets as targets_of
from experiment.analysis.steady import has_mean
from experiment.plan.rules import RATES

Verdict = Literal["better", "worse", "no detectable difference", "invalid"]
# Keys of the plan that say what was asked of the servers: where they differ, so does what was measured.
WORK = ("model", "workload", "input_mean", "output_mean", "sigma", "arrival", "together")
# Keys of the plan that do not shape what is measured.
ELSEWHERE = ("out", "hf_port", "vllm_port", "monitor_port", "start_seconds", "cell_seconds", "gate")
GIB = 2**30
Method = Literal["paired", "unpaired"]
METHOD_OF: dict[bool, Method] = {True: "paired", False: "unpaired"}
# What a verdict on the second of two servers is called of the second of two runs.
AS_CHANGE: dict[str, Verdict] = {"faster": "better", "slower": "worse"}
Key = tuple[float, str]
METHODS: dict[Method, str] = {
    "paired": "Both runs made the same requests, so repeat is held against repeat: the interval is Student's, over the "
    "logarithms of their ratios.",
    "unpaired": "The runs did not make the same requests: the interval is Welch's, over the logarithms of one value a "
    "repeat.",
}


@dataclass(frozen=True)
class Run:
    """A run and what its records say."""

    results: Results
    summary: JSON

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.results.folder


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in both runs; `matters` when figures cannot be compared because of it."""

    what: str
    first: str
    second: str
    matters: bool


@dataclass(frozen=True)
class Change:
    """A metric of a target at a level in both runs, in its base unit, and how many times better the second is.

    `first` and `second` are the figures of the runs' reports, `value` is the geometric mean of the repeats' ratios. The
    95 % interval is None with fewer than two of them.
    """

    level: float
    target: str
    metric: str
    first: float
    second: float
    value: float
    low: float | None
    high: float | None
    verdict: Verdict
    method: Method


def read(folder: Path) -> Run:
    """Load and analyse a run; raises ResultError, OSError."""
    results = load(folder)
    with damage_named(folder):
        return Run(results, analyse(results))


def cells(run: Run) -> Iterator[CellResult]:
    """The cells whose figures count: those that came to their end, without those of a search for the saturation."""
    return (cell for cell in run.results.cells if cell.complete and not cell.search)


def targets(run: Run) -> list[str]:
    """Names of the servers of a run, the baseline first."""
    return targets_of(run.results.plan)


def level_name(run: Run, level: float) -> str:
    """A level in words."""
    closed = run.results.plan["arrival"] == "closed"
    return f"concurrency {level:g}" if closed else f"{level:g} requests/s"


def value_of(cell: CellResult, metric: str, limits: Mapping[str, float]) -> float | None:
    """A metric of one cell; None where no request gave one, and for goodput without limits."""
    if metric == "output_throughput":
        return stats.output_throughput(cell.requests)
    if metric == "goodput":
        return stats.goodput(cell.requests, limits) if limits else None
    latency, statistic = metric.split(".")
    summary = stats.summarize(stats.LATENCIES[latency](cell.requests)[cell.requests.measured])
    return float(getattr(summary, statistic)) if summary else None


def changes(first: Run, second: Run, metrics: Sequence[str]) -> Iterator[Change]:
    """Each metric of each target and level that both runs have; goodput is by the limits of the second."""
    limits = second.results.plan.get("limits") or {}
    valid = first.summary["valid"] and second.summary["valid"]
    order = targets(second)
    for key, (compared, different) in sorted(work(first, second).items(), key=lambda one: _place(one[0], order)):
        for metric in metrics:
            values = [repeats(run, key, metric, limits) for run in (first, second)]
            shown = [_shown(run, key, metric, own, limits) for run, own in zip((first, second), values, strict=True)]
            if compared and not different:
                both = values[0].keys() & values[1].keys()
                values = [{repeat: own[repeat] for repeat in sorted(both)} for own in values]
            if all(values):
                one = change((*key, metric), *(list(own.values()) for own in values), paired=compared > different == 0)
                one = replace(one, first=shown[0], second=shown[1])
                known = valid and (metric in RATES or all(steady(run, key) for run in (first, second)))
                yield one if known else replace(one, verdict="invalid")


def figure(run: Run, key: Key, metric: str) -> float | None:
    """A figure of a level and target as the run's report has it, over all of its repeats; None where there is none."""
    figures = _figures(run, key)
    if figures is None:
        return None
    if metric in RATES:
        value = figures["output_throughput_mean" if metric == "output_throughput" else metric]
    else:
        latency, statistic = metric.split(".")
        value = (figures[latency] or {}).get(statistic)
    return None if value is None else float(value)


def _figures(run: Run, key: Key) -> JSON | None:
    return next((level["targets"].get(key[1]) for level in run.summary["levels"] if level["level"] == key[0]), None)


def _shown(run: Run, key: Key, metric: str, own: Mapping[int, float], limits: Mapping[str, float]) -> float:
    """The figure of a run's report, or for a goodput by limits that are not its own the mean over its repeats."""
    foreign = metric == "goodput" and limits != run.summary["limits"]
    found = None if foreign else figure(run, key, metric)
    return sum(own.values()) / max(1, len(own)) if found is None else found


def drifting(run: Run, key: Key) -> list[int]:
    """The repeats of a level and target in which a queue grew or shrank, so that no latency has a mean."""
    figures = _figures(run, key)
    return list(figures["unstable"]) if figures else []


def steady(run: Run, key: Key) -> bool:
    """Whether latencies of a level and target have a mean."""
    return has_mean(_figures(run, key) or {})


def _place(key: Key, order: Sequence[str]) -> tuple[float, int]:
    return key[0], order.index(key[1])


def repeats(run: Run, key: Key, metric: str, limits: Mapping[str, float]) -> dict[int, float]:
    """The metric of each repeat of a target at a level, without those that have none."""
    own = (cell for cell in cells(run) if (cell.level, cell.target) == key)
    return {cell.repeat: value for cell in own if (value := value_of(cell, metric, limits)) is not None}


def change(key: tuple[float, str, str], first: Sequence[float], second: Sequence[float], *, paired: bool) -> Change:
    """Hold the repeats of a metric against each other; `key` is its level, target and name.

    Where some repeat has none of a rate there is no mean ratio and no interval: see `stats.ratio_with_none`. Paired,
    each repeat is held against that of the same requests, which takes what differs between requests out of the spread.
    Else the interval is Welch's (Biometrika 34, 1947), of two samples that need not spread alike.
    """
    means, method = (float(np.mean(first)), float(np.mean(second))), METHOD_OF[paired]
    if not all((*first, *second)):
        found = stats.ratio_with_none(first, second)
        told: Verdict = AS_CHANGE.get(found.verdict, "no detectable difference")
        return Change(*key, *means, math.inf if found.value is None else found.value, None, None, told, method)
    a, b = np.log(first), np.log(second)
    way = 1 if key[2] in RATES else -1
    gain = way * float(b.mean() - a.mean())
    reach = None
    if min(len(a), len(b)) > 1:
        reach = _paired_reach(b - a) if paired else _welch_reach(a, b)
    low, high = (None, None) if reach is None else (float(np.exp(gain - reach)), float(np.exp(gain + reach)))
    verdict: Verdict = "no detectable difference"
    if low is not None and high is not None:
        verdict = "better" if low > 1 else "worse" if high < 1 else verdict
    return Change(*key, *means, float(np.exp(gain)), low, high, verdict, method)


def _paired_reach(logs: Floats) -> float:
    """Half of Student's interval of a mean."""
    return float(stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / np.sqrt(len(logs)))


def _welch_reach(a: Floats, b: Floats) -> float:
    """Half of Welch's interval of the difference of two means."""
    first, second = (float(one.var(ddof=1)) / len(one) for one in (a, b))
    if not first + second:
        return 0.0
    freedom = (first + second) ** 2 / (first**2 / (len(a) - 1) + second**2 / (len(b) - 1))
    return float(stdtrit(freedom, 0.975)) * float(np.sqrt(first + second))


def work(first: Run, second: Run) -> dict[Key, tuple[int, int]]:
    """How many requests of each level and target that both runs have were compared, and how many differ.

    They differ when they do not have the same prompt and output tokens; compared are cells of the same repeat.
    """
    theirs = {(cell.level, cell.target, cell.repeat): cell for cell in cells(first)}
    both = {key[:2] for key in theirs} & {(cell.level, cell.target) for cell in cells(second)}
    found = dict.fromkeys(both, (0, 0))
    for cell in cells(second):
        other = theirs.get((cell.level, cell.target, cell.repeat))
        if other:
            compared, different = found[cell.level, cell.target]
            longer = any(goes_on(run.results.plan) for run in (first, second))
            different += len(stats.different_work(other.requests, cell.requests, one_goes_on=longer))
            found[cell.level, cell.target] = compared + min(len(other.requests), len(cell.requests)), different
    return found


def differences(first: Run, second: Run) -> list[Difference]:
    """What is not the same in both runs, or within one of them; what makes them incomparable comes first."""
    machines = first.results.environment, second.results.environment
    found = [*_of_plan(first, second), *_of_machine(*machines), *_of_work(first, second)]
    for name, machine in zip(("first", "second"), machines, strict=True):
        found += of_parts(machine, f"within the {name} run, ")
    return sorted(found, key=lambda one: not one.matters)


def _of_plan(first: Run, second: Run) -> Iterator[Difference]:
    theirs, ours = (dict(flat(run.results.plan)) for run in (first, second))
    for key in dict.fromkeys([*theirs, *ours]):
        name, values = key.split(".")[0], (_text(theirs.get(key)), _text(ours.get(key)))
        if values[0] != values[1] and name not in ELSEWHERE:
            yield Difference(f"plan: {key}", *values, name in WORK)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of nested JSON with its path, a.b.c; entries of a list go by their name where they have one."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        items = [(one.get("name", place), one) for place, one in enumerate(value)]
    else:
        yield path, value
        return
    for name, inner in items:
        yield from flat(inner, f"{path}.{name}" if path else str(name))


def of_parts(machine: JSON, before: str = "") -> Iterator[Difference]:
    """What changed on the machine of a run between its first part and those in which it was resumed."""
    for number, part in enumerate(machine.get("parts") or [], 1):
        for one in _of_machine(machine, machine | part.get("changed", {})):
            yield replace(one, what=f"{before}in part {number}: {one.what}")


def _of_machine(a: JSON, b: JSON) -> Iterator[Difference]:
    hardware: dict[str, Callable[[JSON], Any]] = {
        "processor": lambda machine: machine["processor"],
        "cores": lambda machine: machine["cores"],
        "memory": lambda machine: f"{machine['memory_bytes'] / GIB:.0f} GiB",
        "GPUs": lambda machine: [f"{gpu['name']}, {gpu['memory_bytes'] / GIB:.0f} GiB" for gpu in machine["gpus"]],
    }
    for what, read_value in hardware.items():
        if read_value(a) != read_value(b):
            yield Difference(f"hardware: {what}", _text(read_value(a)), _text(read_value(b)), True)
    software = [_software(machine) for machine in (a, b)]
    for what in dict.fromkeys([*software[0], *software[1]]):
        values = [one.get(what) for one in software]
        if values[0] != values[1]:
            yield Difference(what, _text(values[0]), _text(values[1]), False)


def _software(machine: JSON) -> JSON:
    drivers = sorted({gpu["driver"] for gpu in machine["gpus"] if "driver" in gpu})
    found = {f"version: {name}": value for name, value in machine["packages"].items()}
    found |= {f"version: {name}": machine[name] for name in ("python", "system")}
    found |= {f"variable: {name}": value for name, value in machine.get("variables", {}).items()}
    return found | ({"version: driver": drivers} if drivers else {})


def _of_work(first: Run, second: Run) -> Iterator[Difference]:
    found = work(first, second).values()
    compared, different = (sum(one[place] for one in found) for place in (0, 1))
    if different or not compared:
        told = f"{different} of {compared} have other token counts" if compared else "no cell is in both runs"
        yield Difference("requests", "", told, True)


def _text(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def ratio(one: Change) -> str:
    """A ratio and its interval in words."""
    return f"{one.value:.3f} " + ("(no interval)" if one.low is None else f"({one.low:.3f} to {one.high:.3f})")


def show(metric: str, value: float) -> str:
    """A value for people, in milliseconds, tokens/s or requests/s."""
    return f"{value:,.1f} {RATES[metric]}" if metric in RATES else f"{value * 1e3:,.2f} ms"
