"""`headroom list`: the runs in a folder, one line each, from what they say of themselves."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from experiment.analysis.results import JSON, OLD_PLAN, ResultError, damage_named, targets
from experiment.options import Options

Kind = Literal["comparison", "classic", "damaged", "not a run"]
_TIME = re.compile(r"\d{8}T\d{6}Z")


@dataclass(frozen=True)
class Entry:
    """A folder: what it holds, and what its run was; what it does not say is None.

    `when` is UTC as the folder's name says, `told` the headline of a run, or what is wrong with the folder.
    """

    folder: str
    kind: Kind
    told: str
    when: str | None = None
    state: str | None = None
    valid: bool | None = None
    model: str | None = None
    targets: list[str] | None = None
    arrival: str | None = None
    levels: list[float] | None = None
    together: bool | None = None


def list_runs(arguments: Sequence[str], console: Console) -> int:
    """Print the runs in a folder, the oldest first; returns 0. Raises ResultError, OSError."""
    options = Options("list", "List the runs in a folder.")
    options.add_argument(
        "folder", nargs="?", type=Path, default=Path("results"), metavar="DIR", help="default: results"
    )
    options.add_argument("--json", action="store_true", help="print JSON")
    given = options.parse_args(arguments)
    found = entries(given.folder)
    if given.json:
        print(json.dumps([asdict(one) for one in found], indent=2, allow_nan=False))
        return 0
    for one in found:
        style = "bold red" if one.kind == "damaged" else "bold"
        console.print(f"[{style}]{escape(one.folder)}[/]  {escape(line(one))}")
    if not found:
        console.print(f"No runs in {given.folder}", markup=False)
    return 0


def entries(folder: Path) -> list[Entry]:
    """What each folder in `folder` is, by name; raises ResultError when that is itself a run, OSError."""
    if (folder / "plan.json").exists():
        raise ResultError(f"{folder}: the folder of a run; give the one that it is in")
    return [describe(one) for one in sorted(folder.iterdir()) if one.is_dir() and not one.name.startswith(".")]


def describe(folder: Path) -> Entry:
    """What a folder is; one that cannot be read says why."""
    try:
        with damage_named(folder):
            if (folder / "classic.json").exists():
                return _classic(folder)
            if (folder / "plan.json").exists():
                return _comparison(folder)
    except (ResultError, OSError) as error:
        told = str(error).removeprefix(f"{folder}: ")
        return Entry(folder.name, "damaged", told.removeprefix("damaged: "), _when(folder))
    return Entry(folder.name, "not a run", "plan.json is missing", _when(folder))


def line(entry: Entry) -> str:
    """An entry in words, without its name."""
    if entry.kind in ("damaged", "not a run"):
        return f"{entry.when or 'no time'}  {entry.kind}: {entry.told}"
    valid = {True: "valid", False: "NOT VALID", None: "no report"}[entry.valid]
    state = [entry.state or "", *([valid] if entry.kind == "comparison" else [])]
    parts = [entry.when or "no time", ", ".join(state), entry.model or "", ", ".join(entry.targets or [])]
    if entry.levels:
        unit = "concurrency" if entry.arrival == "closed" else "requests/s"
        parts.append(f"{unit} {', '.join(f'{level:g}' for level in entry.levels)}")
    parts += ["together"] if entry.together else []
    return "  ".join([*parts, entry.told])


def _comparison(folder: Path) -> Entry:
    plan, status = (_object(folder / f"{name}.json") for name in ("plan", "status"))
    plan = OLD_PLAN | plan
    path = folder / "summary.json"
    summary = _object(path) if path.exists() else None
    return Entry(
        folder=folder.name,
        kind="comparison",
        told=str(summary["headline"]) if summary is not None else f"to write its report: headroom report {folder}",
        when=_when(folder),
        # What still says that it runs may have been killed: nobody can tell from its files.
        state="running or killed" if status["state"] == "running" else status["state"],
        valid=bool(summary["valid"]) if summary is not None else None,
        model=str(plan["model"]),
        targets=targets(plan),
        arrival=plan["arrival"],
        together=bool(plan["together"]),
        levels=[float(level) for level in plan.get("levels") or plan["concurrency"]],
    )


def _classic(folder: Path) -> Entry:
    found = _object(folder / "classic.json")
    return Entry(
        folder=folder.name,
        kind="classic",
        told="the classic experiment",
        when=_when(folder),
        state=str(found["state"]),
        model=str(found["model"]),
        targets=["hf", "vllm"],
    )


def _object(path: Path) -> JSON:
    with damage_named(path.parent):
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"{path.name}: expected an object, got {type(value).__name__}")
        return value


def _when(folder: Path) -> str | None:
    found = _TIME.search(folder.name)
    if not found:
        return None
    try:
        moment = datetime.strptime(found[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:  # digits that are no date
        return None
    return f"{moment:%Y-%m-%d %H:%M:%S}"
