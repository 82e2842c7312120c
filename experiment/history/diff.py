"""`headroom diff`: two runs metric by metric, after what differs between them in plan, versions and hardware."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from experiment.analysis import stats
from experiment.analysis.results import JSON, damage_named
from experiment.history.two_runs import (
    METHODS,
    Change,
    Difference,
    Method,
    Run,
    changes,
    differences,
    level_name,
    ratio,
    read,
    show,
)
from experiment.options import Options
from experiment.plan.rules import RATES

SHOWN = (*RATES, *(f"{latency}.{which}" for latency in stats.LATENCIES for which in ("mean", "p99")))


def diff(arguments: Sequence[str], console: Console) -> int:
    """Print how the second run differs from the first; returns 0. Raises ResultError, OSError."""
    options = Options("diff", "Compare two runs metric by metric, from their result folders.")
    options.add_argument("first", type=Path, metavar="DIR", help="the run to compare with")
    options.add_argument("second", type=Path, metavar="DIR", help="the run that is compared")
    options.add_argument("--json", action="store_true", help="print JSON")
    given = options.parse_args(arguments)
    first, second = read(given.first), read(given.second)
    with damage_named(given.second):
        found, changed = differences(first, second), list(changes(first, second, SHOWN))
    if not _comparable(found):
        changed = [replace(one, verdict="invalid") for one in changed]
    if given.json:
        print(json.dumps(_as_json(first, second, found, changed), indent=2, allow_nan=False))
    else:
        _print(first, second, found, changed, console)
    return 0


def _comparable(found: Sequence[Difference]) -> bool:
    return not any(one.matters for one in found)


def _as_json(first: Run, second: Run, found: Sequence[Difference], changed: Sequence[Change]) -> JSON:
    return {
        "first": str(first.folder),
        "second": str(second.folder),
        "valid": {"first": first.summary["valid"], "second": second.summary["valid"]},
        "comparable": _comparable(found),
        "methods": {name: METHODS[name] for name in _methods(changed)},
        "differences": [asdict(one) for one in found],
        "changes": [asdict(one) for one in changed],
    }


def _print(first: Run, second: Run, found: Sequence[Difference], changed: Sequence[Change], console: Console) -> None:
    for name, run in (("first", first), ("second", second)):
        valid = "" if run.summary["valid"] else " [bold red]NOT VALID: its report says which rule failed.[/]"
        console.print(f"{name + ':':8}{escape(str(run.folder))}{valid}")
    comparable = _comparable(found)
    if not comparable:
        console.print("\n[bold red]NOT COMPARABLE: the two runs did not measure the same thing.[/]")
    for one in found:
        style = "bold red" if one.matters else "default"
        told = f"{one.first} -> {one.second}" if one.first else one.second
        console.print(f"  [{style}]{escape(f'{one.what}: {told}')}[/]")
    if not found:
        console.print("Plan, versions, hardware and requests are the same.")
    for key, own in groupby(changed, key=lambda one: (one.level, one.target)):
        console.print(f"\n[bold]{escape(key[1])}, {level_name(second, key[0])}[/]")
        for line in _lines(list(own)) if comparable else _figures(list(own)):
            console.print(line, markup=False)
    if not changed:
        console.print("\nNo level of a target has figures in both runs.")
        return
    console.print("\nFigures are those of the reports.")
    if not comparable:
        return
    console.print("Ratios are geometric means over the repeats with 95 % intervals; above 1 the second run is better.")
    for method in _methods(changed):
        console.print(METHODS[method])


def _methods(changed: Sequence[Change]) -> list[Method]:
    return list(dict.fromkeys(one.method for one in changed))


def _figures(changed: Sequence[Change]) -> Iterator[str]:
    """The figures alone: what did not measure the same thing has no ratio and no verdict."""
    yield f"  {'metric':18}{'first':>17}{'second':>17}"
    for one in changed:
        yield f"  {one.metric:18}{show(one.metric, one.first):>17}{show(one.metric, one.second):>17}"


def _lines(changed: Sequence[Change]) -> Iterator[str]:
    yield f"  {'metric':18}{'first':>17}{'second':>17}  {'ratio':28}verdict"
    for one in changed:
        first, second = show(one.metric, one.first), show(one.metric, one.second)
        yield f"  {one.metric:18}{first:>17}{second:>17}  {ratio(one):28}{one.verdict}"
