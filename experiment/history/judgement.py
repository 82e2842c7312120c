"""The rules that `headroom gate` holds a run against: the run's own, its limits, and how far it may fall behind.

Nothing is judged when the evidence is missing: a run that is not valid, or cannot be compared with its baseline, is
neither passed nor failed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from experiment.analysis.results import JSON, damage_named
from experiment.history.two_runs import (
    Change,
    Key,
    Run,
    changes,
    differences,
    drifting,
    figure,
    level_name,
    ratio,
    show,
    targets,
)
from experiment.plan.rules import RATES, Rules
from experiment.words import Words, findings

WORDS = Words("en")
Outcome = Literal["passed", "failed", "invalid", "not judged"]
OF_GATES: dict[bool | None, Outcome] = {True: "passed", False: "invalid", None: "not judged"}


@dataclass(frozen=True)
class Ruling:
    """One rule and what became of it; `group` is what it is about. One of a metric has the figures, in words.

    It is `wide` when its interval leaves open whether more than the allowed was lost.
    """

    group: str
    rule: str
    outcome: Outcome
    found: str
    metric: str = ""
    limit: str = ""
    baseline: str = ""
    now: str = ""
    ratio: str = ""
    wide: bool = False


def judge(run: Run, baseline: Run, rules: Rules) -> Iterator[Ruling]:
    """Hold a run against every rule."""
    with damage_named(baseline.folder):
        yield from _validity("baseline", baseline)
    with damage_named(run.folder):
        yield from _validity("run", run)
        names, theirs = (rules.targets or targets(one)[1:] or targets(one) for one in (run, baseline))
        yield from _comparable(baseline, run, theirs)
        for level in run.summary["levels"]:
            for name in names:
                yield from _limits((level["level"], name), level["targets"].get(name), run, rules)
        yield from _regressions(baseline, run, rules, names)


def verdict(rulings: Sequence[Ruling]) -> Outcome:
    """Invalid when any rule lacks its evidence, else failed when any failed; what is not judged is only told."""
    outcomes = {one.outcome for one in rulings}
    return "invalid" if "invalid" in outcomes else "failed" if "failed" in outcomes else "passed"


def _validity(name: str, run: Run) -> Iterator[Ruling]:
    for found in run.summary["gates"]:
        rule, told = findings.rule(WORDS, found), findings.found(WORDS, found, run.summary["arrival"])
        yield Ruling(f"{name} is valid", rule, OF_GATES[found["passed"]], told)
    state, reason = run.summary["state"], run.summary["reason"]
    whole: Outcome = "passed" if state == "complete" else "invalid"
    yield Ruling(f"{name} is valid", "the run came to its planned end", whole, reason or state)


def _lost(baseline: Run, run: Run, names: Sequence[str]) -> list[str]:
    """The servers and loads of the baseline that the run does not have, of those that are held against it."""
    ours = {(level["level"], name) for level in run.summary["levels"] for name in level["targets"]}
    theirs = [(level["level"], name) for level in baseline.summary["levels"] for name in level["targets"]]
    return [_group(key, baseline) for key in theirs if key not in ours and key[1] in names]


def _comparable(baseline: Run, run: Run, names: Sequence[str]) -> Iterator[Ruling]:
    against = [one for one in differences(baseline, run) if one.matters]
    told = "; ".join(f"{one.what}: {one.first} -> {one.second}" if one.first else one.second for one in against)
    if lost := _lost(baseline, run, names):
        told = "; ".join([*([told] if told else []), f"only the baseline has {', '.join(lost)}"])
    outcome: Outcome = "invalid" if against or lost else "passed"
    rule = "both runs have the same model, workload, requests and hardware"
    yield Ruling("run and baseline are comparable", rule, outcome, told or "the same")


def _limits(key: Key, figures: JSON | None, run: Run, rules: Rules) -> Iterator[Ruling]:
    group = _group(key, run)
    for metric, limit in rules.limits.items():
        now, least = figure(run, key, metric), metric in RATES
        told = f"at {'least' if least else 'most'} {show(metric, limit)}"
        kept = None if now is None else now >= limit if least else now <= limit
        yield _limit(group, metric, told, kept, "" if now is None else show(metric, now))
    limits = {name: value for name, value in (run.results.plan.get("limits") or {}).items() if value}
    if limits:
        wanted, now = run.results.plan["attainment"], (figures or {}).get("attainment")
        metric = f"share of the requests within {', '.join(f'{name} {show(name, limits[name])}' for name in limits)}"
        kept = None if now is None else now >= wanted
        yield _limit(group, metric, f"at least {wanted * 100:g} %", kept, "" if now is None else f"{now * 100:.2f} %")


def _limit(group: str, metric: str, limit: str, kept: bool | None, now: str) -> Ruling:
    outcome: Outcome = "invalid" if kept is None else "passed" if kept else "failed"
    told = {"invalid": "there is no such figure", "passed": "kept", "failed": "not kept"}[outcome]
    return Ruling(group, f"{metric}: {limit}", outcome, told, metric, limit, now=now)


def _regressions(baseline: Run, run: Run, rules: Rules, names: Sequence[str]) -> Iterator[Ruling]:
    found = {(one.level, one.target, one.metric): one for one in changes(baseline, run, rules.metrics)}
    for level in run.summary["levels"]:
        for name in names:
            key, figures = (level["level"], name), level["targets"].get(name)
            behind = figures and len(drifting(run, key)) == len(figures["output_throughput"])
            if behind and not drifting(baseline, key):
                told = "drifted in every repeat, the baseline in none"
                yield Ruling(_group(key, run), "latency keeps steady", "failed", told, "latency", "steady")
            for metric in rules.metrics:
                if metric in RATES or not behind or drifting(baseline, key):
                    yield _regression(_group(key, run), metric, found.get((*key, metric)), rules.allowed_regression)


def _regression(group: str, metric: str, change: Change | None, allowed: float) -> Ruling:
    """A regression counts when the whole interval is beyond what is allowed."""
    limit = f"at most {allowed * 100:g} % worse"
    rule, missing = f"{metric}: {limit} than the baseline", "there is no such figure in both runs"
    ruling = Ruling(group, rule, "invalid", missing, metric, limit)
    if change is None:
        return ruling
    figures = show(metric, change.first), show(metric, change.second), ratio(change)
    ruling = Ruling(group, rule, "invalid", "a run is not valid, drifted or was too short", metric, limit, *figures)
    if change.verdict == "invalid":
        return ruling
    if change.low is None and change.verdict == "worse":
        return replace(ruling, outcome="failed", found="the run has none in any repeat")
    if change.low is None and change.verdict == "better":
        return replace(ruling, outcome="passed", found="the baseline has none in any repeat")
    if change.low is None or change.high is None:
        return replace(ruling, found="no interval: both runs need two repeats")
    if change.high < 1 - allowed:
        return replace(ruling, outcome="failed", found="worse than allowed")
    worse = change.verdict == "worse"
    if change.low >= 1 - allowed:
        return replace(ruling, outcome="passed", found="worse, as allowed" if worse else change.verdict)
    told = "worse, but not surely more than allowed" if worse else str(change.verdict)
    open_ = f"{(1 - change.low) * 100:.0f} % worse is not excluded"
    return replace(ruling, outcome="passed", found=f"{told}; {open_}", wide=True)


def _group(key: Key, run: Run) -> str:
    return f"{key[1]} at {level_name(run, key[0])}"
