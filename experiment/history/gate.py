"""`headroom gate`: a run held against its limits and a baseline run, for CI: exit code, JUnit XML and Markdown."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from experiment.analysis.results import JSON
from experiment.history.gate_report import as_junit, as_markdown
from experiment.history.judgement import Outcome, Ruling, judge, verdict
from experiment.history.two_runs import Run, read, targets
from experiment.options import Options
from experiment.plan.plan import Plan
from experiment.plan.rules import Rules
from experiment.run.compare import INTERRUPTED, compare, new_folder

EXIT_CODES: dict[Outcome, int] = {"passed": 0, "failed": 1, "invalid": 2}


def gate(arguments: Sequence[str], plan_of: Callable[[Sequence[str]], Plan], console: Console) -> int:
    """Run a plan, or take a run, and judge it; returns 0 passed, 1 failed, 2 invalid, or 130 after Ctrl-C.

    `plan_of` reads a plan from the arguments that are not the gate's own. Raises ResultError, OSError.
    """
    options = Options("gate", "Judge a run by its limits and by a baseline run; other options are those of compare.")
    options.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="the run to hold it against")
    options.add_argument("--run", type=Path, metavar="DIR", help="judge this run, instead of running a plan")
    options.add_argument("--allowed-regression", metavar="SHARE", help="in place of the plan's, for example 0.05")
    given, rest = options.parse_known_args(arguments)
    if resumed := [one for one in rest if one.split("=")[0] == "--resume"]:
        options.error(f"{resumed[0]}: go on with headroom compare, then give the folder as --run")
    if given.run and rest:
        options.error(f"--run: that run's own plan holds; {rest[0]!r} cannot be given with it")
    override = {} if given.allowed_regression is None else {"allowed_regression": given.allowed_regression}
    _rules(override, "--", options)
    baseline = read(given.baseline)
    folder = given.run or _run(plan_of(rest), console)
    if folder is None:
        return INTERRUPTED
    run = read(folder)
    rules = _rules((run.results.plan.get("gate") or {}) | override, "gate.", options)
    if unknown := [name for name in rules.targets if name not in targets(run)]:
        options.error(f"gate.targets: {unknown[0]!r}: no target of the run; known: {', '.join(targets(run))}")
    return _tell(run, baseline, list(judge(run, baseline, rules)), console)


def _rules(given: JSON, before: str, options: Options) -> Rules:
    """Read rules; those that cannot be end the command with the name of the key after `before`."""
    try:
        return Rules.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        key = before + ".".join(map(str, problem["loc"]))
        name = key.replace("_", "-") if before == "--" else key
        return options.error(f"{name}: {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}")


def _run(plan: Plan, console: Console) -> Path | None:
    """Run the plan and say where it is; None after Ctrl-C. What came of it is judged from its folder."""
    folder = new_folder(plan)
    return None if compare(plan, console, folder) == INTERRUPTED else folder


def _tell(run: Run, baseline: Run, rulings: Sequence[Ruling], console: Console) -> int:
    """Write gate.xml and gate.md into the run's folder, print the summary and return the exit code."""
    outcome = verdict(rulings)
    markdown = as_markdown(outcome, run, baseline, rulings)
    (run.folder / "gate.xml").write_text(as_junit(run.folder, rulings), encoding="utf-8")
    (run.folder / "gate.md").write_text(markdown, encoding="utf-8")
    console.print(markdown, markup=False, end="")
    return EXIT_CODES[outcome]
