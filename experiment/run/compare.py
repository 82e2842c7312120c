"""What `headroom compare` and `headroom up` do, from the first check to the last line on the screen."""

import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from experiment.analysis.results import ResultError
from experiment.plan.plan import Plan
from experiment.run import parts
from experiment.run.cell import LOCUSTFILE, flags, user_of, workload_options
from experiment.run.cells import run_plan
from experiment.run.stack import RunError, Stack, end, option_of, ports_of, require_free, spawn

FAILED, INTERRUPTED = 1, 130
LOCUST_PORT = 8089


def compare(plan: Plan, console: Console, folder: Path | None = None) -> int:
    """Run a comparison and write its report; returns 0, 1 when it failed, or 130 after Ctrl-C.

    Whatever ends it, what was measured is kept and reported as partial. `folder` is that of the run, if not a new one.
    """
    folder = folder or new_folder(plan)
    try:
        _require_ports(plan)
        parts.begin(folder, plan)
    except (RunError, OSError) as error:
        return _fail(error, FAILED)
    return _compare(plan, folder, console)


def new_folder(plan: Plan) -> Path:
    """Where a run that begins now is kept."""
    return Path(plan.out) / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def resume(folder: Path, console: Console) -> int:
    """Go on with a run that was stopped, from its first cell that is not complete; returns as `compare` does.

    Raises ResumeError when it cannot be resumed.
    """
    plan, part = parts.read(folder)
    try:
        _require_ports(plan)
        parts.resume(folder, plan, part)
    except (RunError, OSError) as error:
        return _fail(error, FAILED)
    console.print(f"Going on with {folder}; its complete cells are kept.", markup=False)
    return _compare(plan, folder, console, part)


def _compare(plan: Plan, folder: Path, console: Console, part: int = 1) -> int:
    with parts.held(folder):
        code = _run(plan, folder, console, part)
    if not any((folder / "cells").iterdir()):
        return code
    try:
        write_report(folder, console)
    except (ResultError, OSError) as error:
        _fail(error, FAILED, folder)
        console.print(f"What was measured is kept; to write the report: headroom report {folder}", markup=False)
        return code or FAILED
    if code:
        console.print(f"To go on: headroom compare --resume {folder}", markup=False)
    return code


def _require_ports(plan: Plan) -> None:
    for name, port in ports_of(plan).items():
        require_free(option_of(plan, name), port)


def up(plan: Plan, console: Console) -> int:
    """Start the servers, the monitor and Locust's web UI, and keep them up until Ctrl-C or until one ends."""
    logs = Path(plan.out) / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-up"
    try:
        if plan.resident == "one":
            raise RunError("--resident: one: expected all, as all servers are up at once")
        _require_ports(plan)
        require_free("the port of Locust's web UI", LOCUST_PORT)
        logs.mkdir(parents=True)
        with Stack(plan, logs, partial(console.print, markup=False)) as stack:
            stack.start()
            return _serve_web_ui(plan, stack, logs, console)
    except (RunError, OSError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return 0


def write_report(folder: Path, console: Console) -> None:
    """Analyse a result folder and write its tables and its report; raises ResultError, OSError."""
    # Imported late: charts take a second to load, which would delay the start of the servers.
    from experiment.report import write

    summary = write(folder)
    console.print(summary["headline"], markup=False)
    console.print(f"The report is at {folder / 'report.html'}", markup=False)


def _run(plan: Plan, folder: Path, console: Console, part: int) -> int:
    try:
        with Stack(plan, folder / "logs", partial(console.print, markup=False)) as stack:
            stack.start()
            run_plan(plan, stack, folder, console, part)
        parts.write_status(folder, "complete", None)
    except KeyboardInterrupt:
        return _stopped(folder, "interrupted by the user", INTERRUPTED)
    except (RunError, OSError) as error:
        return _stopped(folder, error, FAILED)
    return 0


def _stopped(folder: Path, why: object, code: int) -> int:
    """Say why a run ended before its plan did, on the screen and in its folder."""
    _fail(why, code, folder)
    with suppress(OSError):  # a full disk: the folder says "running", which is read as partial too
        parts.write_status(folder, "partial", str(why))
    return code


def _fail(why: object, code: int, folder: Path | None = None) -> int:
    if isinstance(why, OSError):
        why = f"{why.filename or folder}: {why.strerror or why}"
    print(f"headroom: {why}", file=sys.stderr, flush=True)
    return code


def _serve_web_ui(plan: Plan, stack: Stack, logs: Path, console: Console) -> int:
    # The load test knows one server of each kind: the first.
    urls = {f"{user_of(target)}-url": stack[target.name].url for target in reversed(plan.targets)}
    model = plan.model if not any(target.url for target in plan.targets) else ""
    options = workload_options(plan, stack) | urls | {"model": model, "seed": plan.seed, "web-port": LOCUST_PORT}
    locust = spawn([sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *flags(options)], logs / "locust.log", {})
    console.print(f"Locust's web UI: http://127.0.0.1:{LOCUST_PORT}   stop everything: Ctrl-C")
    try:
        while locust.poll() is None:
            stack.check()
            time.sleep(0.5)
        raise RunError(f"Locust ended with code {locust.returncode}; see {logs / 'locust.log'}")
    finally:
        locust.terminate()
        end(locust, 10)
