"""The folder of a run from its beginning over its end to when it is resumed: a run has a part for each time it ran."""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiment.environment import boot_id, describe
from experiment.plan.plan import Plan
from experiment.run.cell import write_json
from experiment.run.cells import is_complete
from experiment.run.stack import get

JSON = dict[str, Any]


class ResumeError(Exception):
    """The folder holds no run that can go on; the message says why."""


def begin(folder: Path, plan: Plan) -> None:
    """Make the folder of a run; raises OSError."""
    (folder / "logs").mkdir(parents=True)
    (folder / "cells").mkdir()
    write_json(folder / "plan.json", plan.model_dump())
    machine = describe()
    machine["packages"] |= _told_by_servers(plan)
    write_json(folder / "environment.json", machine | {"parts": [_part(folder)]})
    write_status(folder, "running", "the run did not come to its end")


def _told_by_servers(plan: Plan) -> dict[str, str]:
    """Versions of servers that run already, maybe elsewhere: what is installed here says nothing of them."""
    found: dict[str, str] = {}
    for target in plan.targets:
        with suppress(ValueError, AttributeError):  # it has no such page, or another one
            told = json.loads((get(f"{target.url}/version") if target.url else None) or b"{}")
            found |= {f"{target.name}'s {what}": str(value) for what, value in told.items()}
    return found


def read(folder: Path) -> tuple[Plan, int]:
    """The plan of a run that can go on and the number of its next part; raises ResumeError."""
    try:
        plan = Plan.model_validate_json((folder / "plan.json").read_text())
        status, environment = (json.loads((folder / f"{name}.json").read_text()) for name in ("status", "environment"))
        begun = environment["parts"]
        state, digest = status["state"], begun[0]["plan_sha256"]
        with held(folder):
            pass
    except (OSError, ValidationError, ValueError, KeyError, TypeError, IndexError) as error:
        why = "an earlier version or damage" if isinstance(error, KeyError | TypeError | IndexError) else error
        raise ResumeError(f"resume: {str(folder)!r}: not a run that can go on: {why}") from None
    if state == "complete":
        raise ResumeError(f"resume: {str(folder)!r}: the run came to its end; expected one that did not")
    if digest != _digest(folder):
        raise ResumeError(f"resume: {str(folder)!r}: plan.json is not what the run began with; begin a new run")
    return plan, len(begun) + 1


def resume(folder: Path, plan: Plan, part: int) -> None:
    """Put aside the cells that are not complete, with those that ran beside them, and note the new part.

    Raises OSError.
    """
    cells = folder / "cells"
    groups = ([cells / cell.name for cell in group] for group in plan.groups())
    broken = {cell for group in groups if not all(map(is_complete, group)) for cell in group}
    for cell in sorted(cells.iterdir()):
        if cell in broken or not is_complete(cell):
            aside = folder / "set-aside" / f"{part - 1}-{cell.name}"
            aside.parent.mkdir(exist_ok=True)
            cell.rename(aside)
    environment = json.loads((folder / "environment.json").read_text())
    now = describe()
    changed = {name: value for name, value in now.items() if environment.get(name) != value}
    environment["parts"].append(_part(folder) | {"changed": changed})
    write_json(folder / "environment.json", environment)
    write_status(folder, "running", "the run did not come to its end")


def write_status(folder: Path, state: str, reason: str | None) -> None:
    """Say how far a run has come, and why no further."""
    write_json(folder / "status.json", {"state": state, "reason": reason})


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run to one process at a time; raises BlockingIOError while another has it. Its end, however, frees it."""
    with (folder / "plan.json").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError("it is still running") from None
        yield


def _part(folder: Path) -> JSON:
    """When and in which start of the machine a part began; by the clocks parts are put on one axis of time."""
    return {
        "began": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "boot_id": boot_id(),
        "wall_minus_monotonic_ns": time.time_ns() - time.monotonic_ns(),
        "plan_sha256": _digest(folder),
    }


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
