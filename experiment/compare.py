"""What `headroom compare` and `headroom up` do, from the first check to the last line on the screen."""

import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from experiment.environment import describe
from experiment.plan import Plan
from experiment.results import ResultError
from experiment.run import LOCUSTFILE, flags, run_cells, workload_options, write_json
from experiment.stack import RunError, Stack, end, ports_of, require_free, spawn

FAILED, INTERRUPTED = 1, 130
LOCUST_PORT = 8089


def compare(plan: Plan, console: Console, folder: Path | None = None) -> int:
    """Run a comparison and write its report; returns 0, 1 when it failed, or 130 after Ctrl-C.

    Whatever ends it, what was measured is kept and reported as partial. `folder` is that of the run, if not a new one.
    """
    folder = folder or new_folder(plan)
    try:
        for name, port in ports_of(plan).items():
            require_free(f"--{name}-port", port)
        _open(folder, plan)
    except (RunError, OSError) as error:
        return _fail(error, FAILED)
    code = _run(plan, folder, console)
    if not any((folder / "cells").iterdir()):
        return code
    try:
        write_report(folder, console)
    except (ResultError, OSError) as error:
        _fail(error, FAILED, folder)
        console.print(f"What was measured is kept; to write the report: headroom report {folder}", markup=False)
        return code or FAILED
    return code


def new_folder(plan: Plan) -> Path:
    """Where a run that begins now is kept."""
    return Path(plan.out) / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def up(plan: Plan, console: Console) -> int:
    """Start the servers, the monitor and Locust's web UI, and keep them up until Ctrl-C or until one ends."""
    logs = Path(plan.out) / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-up"
    try:
        for name, port in ports_of(plan).items():
            require_free(f"--{name}-port", port)
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


def _open(folder: Path, plan: Plan) -> None:
    (folder / "logs").mkdir(parents=True)
    (folder / "cells").mkdir()
    write_json(folder / "plan.json", plan.model_dump())
    write_json(folder / "environment.json", describe())
    _write_status(folder, "running", "the run did not come to its end")


def _run(plan: Plan, folder: Path, console: Console) -> int:
    try:
        with Stack(plan, folder / "logs", partial(console.print, markup=False)) as stack:
            stack.start()
            run_cells(plan, stack, folder, console)
        _write_status(folder, "complete", None)
    except KeyboardInterrupt:
        return _stopped(folder, "interrupted by the user", INTERRUPTED)
    except (RunError, OSError) as error:
        return _stopped(folder, error, FAILED)
    return 0


def _stopped(folder: Path, why: object, code: int) -> int:
    """Say why a run ended before its plan did, on the screen and in its folder."""
    _fail(why, code, folder)
    with suppress(OSError):  # a full disk: the folder says "running", which is read as partial too
        _write_status(folder, "partial", str(why))
    return code


def _write_status(folder: Path, state: str, reason: str | None) -> None:
    write_json(folder / "status.json", {"state": state, "reason": reason})


def _fail(why: object, code: int, folder: Path | None = None) -> int:
    if isinstance(why, OSError):
        why = f"{why.filename or folder}: {why.strerror or why}"
    print(f"headroom: {why}", file=sys.stderr, flush=True)
    return code


def _serve_web_ui(plan: Plan, stack: Stack, logs: Path, console: Console) -> int:
    options = workload_options(plan, stack) | {"seed": plan.seed, "web-port": LOCUST_PORT}
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
