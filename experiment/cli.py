"""The `headroom` command."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from experiment.analysis.results import ResultError
from experiment.classic.command import classic
from experiment.doctor import doctor
from experiment.history.diff import diff
from experiment.history.gate import gate
from experiment.history.listing import list_runs
from experiment.plan.plan import Plan
from experiment.plan.settings import PlanError, read_plan
from experiment.run.arguments import require_arguments
from experiment.run.compare import INTERRUPTED, compare, resume, up, write_report
from experiment.run.parts import ResumeError

USAGE = """usage: headroom COMMAND [options]

  compare      start the servers here, load each in turn, write a report; --resume DIR goes on with a run
  up           start the servers, the monitor and Locust's web UI, until Ctrl-C
  report DIR   write the report of a run again, from its records alone
  diff DIR DIR compare two runs metric by metric
  list [DIR]   list the runs in a folder, results if none is given
  gate         run a plan, or take a run, and judge it by limits and a baseline run: 0 passed, 1 failed, 2 invalid
  classic      the classic experiment: four inputs on both servers, step by step, and what it showed
  calibrate    find the rate up to which this machine's load generator tells the truth
  doctor       say what this machine has, and what to do about what is missing

headroom compare --help lists the options of compare, which plan.yaml may hold too; up takes the same ones.
"""
BAD_INPUT = 2

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command that the first argument names."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "compare": _compare,
        "up": lambda rest: up(_plan(rest), console),
        "report": _report,
        "diff": lambda rest: _reading(diff, rest),
        "list": lambda rest: _reading(list_runs, rest),
        "gate": lambda rest: _reading(partial(gate, plan_of=_plan), rest),
        "classic": lambda rest: classic(rest, _plan, console),
        "calibrate": lambda rest: subprocess.call([sys.executable, "-m", "loadtest.calibrate", *rest]),
        "doctor": _doctor,
    }
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0)
    if name not in commands:
        raise SystemExit(_say(f"{name!r}: unknown command; known: {', '.join(commands)}", BAD_INPUT))
    # What stops a service (docker stop, systemd) stops a run like Ctrl-C does: with what was measured kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = commands[name](rest)
    except KeyboardInterrupt:
        code = _say("interrupted", INTERRUPTED)
    raise SystemExit(code)


def _say(message: object, code: int) -> int:
    print(f"headroom: {message}", file=sys.stderr, flush=True)
    return code


def _compare(arguments: Sequence[str]) -> int:
    found = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    found.add_argument("--resume")
    given, others = found.parse_known_args(arguments)
    if given.resume is None:
        return compare(_plan(arguments), console)
    if others:
        return _say(f"--resume: takes no other option, as the plan is that of the run; got {others[0]!r}", BAD_INPUT)
    try:
        return resume(Path(given.resume), console)
    except ResumeError as error:
        return _say(error, BAD_INPUT)


def _plan(arguments: Sequence[str]) -> Plan:
    try:
        plan = read_plan(arguments)
        require_arguments(plan)
        return plan
    except PlanError as error:
        for line in str(error).splitlines():
            _say(line, BAD_INPUT)
        raise SystemExit(BAD_INPUT) from None


def _doctor(arguments: Sequence[str]) -> int:
    if arguments:
        return _say(f"doctor: takes no arguments, got {arguments[0]!r}", BAD_INPUT)
    return doctor(_plan([]), console)


def _reading(command: Callable[..., int], arguments: Sequence[str]) -> int:
    try:
        return command(arguments, console=console)
    except (ResultError, OSError) as error:
        return _say(error, BAD_INPUT)


def _report(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        return _say("report: give one result folder: headroom report DIR", BAD_INPUT)
    try:
        write_report(Path(arguments[0]), console)
    except (ResultError, OSError) as error:
        return _say(error, BAD_INPUT)
    return 0
