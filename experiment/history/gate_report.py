"""What `headroom gate` writes: JUnit XML for a CI server, and Markdown for a pull request. It judges nothing."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from experiment.history.judgement import Outcome, Ruling
from experiment.history.two_runs import Run, differences

HEADLINES: dict[Outcome, str] = {
    "passed": "passed",
    "failed": "FAILED",
    "invalid": "INVALID: no verdict, because the evidence for one is missing",
}
# How JUnit calls what became of a rule that was not passed: a failed one is no fault of the test itself.
ELEMENTS = {"failed": "failure", "invalid": "error", "not judged": "skipped"}
COLUMNS = ("", "metric", "limit", "baseline", "now", "ratio (95 % interval)", "verdict")
# What XML 1.0 cannot hold (section 2.2).
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_junit(folder: Path, rulings: Sequence[Ruling]) -> str:
    """One test case a rule, its figures as the message: an error where evidence lacks, skipped where not judged."""
    counts = {name: sum(one.outcome == outcome for one in rulings) for outcome, name in ELEMENTS.items()}
    numbers = {"tests": str(len(rulings)), "failures": str(counts["failure"]), "errors": str(counts["error"])}
    numbers["skipped"] = str(counts["skipped"])
    root = ElementTree.Element("testsuites", {"name": "headroom gate", **numbers})
    suite = ElementTree.SubElement(root, "testsuite", {"name": folder.name, **numbers, "time": "0"})
    for one in rulings:
        names = {"classname": _xml(one.group), "name": _xml(one.rule), "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", names)
        if one.outcome == "not judged":
            ElementTree.SubElement(case, "skipped", {"message": _xml(_figures(one))})
        elif one.outcome != "passed":
            failure = {"type": one.outcome, "message": _xml(one.found)}
            ElementTree.SubElement(case, ELEMENTS[one.outcome], failure).text = _xml(_figures(one))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(_figures(one))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_markdown(outcome: Outcome, run: Run, baseline: Run, rulings: Sequence[Ruling]) -> str:
    """The verdict, what could not be judged or failed, and a table of every rule that has a figure."""
    return "\n".join(_markdown(outcome, run, baseline, rulings)) + "\n"


def _markdown(outcome: Outcome, run: Run, baseline: Run, rulings: Sequence[Ruling]) -> Iterator[str]:
    passed = sum(one.outcome == "passed" for one in rulings)
    yield f"**headroom gate: {HEADLINES[outcome]}** ({passed} of {len(rulings)} rules passed)"
    yield ""
    for one in rulings:
        if one.outcome != "passed":
            yield f"- {one.outcome}: {_text(one.group)}: {_text(one.rule)}: {_text(one.found)}"
    yield from [""] if passed < len(rulings) else []
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for one in rulings:
        if one.limit:
            cells = [one.group, one.metric, one.limit, one.baseline, one.now, one.ratio]
            mark = "" if one.outcome == "passed" else f"**{one.outcome}**: "
            yield f"| {' | '.join(_text(cell) or '-' for cell in cells)} | {mark}{_text(one.found)} |"
    yield ""
    yield "A ratio above 1 is better than the baseline. A regression fails when its whole interval is beyond it."
    wide, held = sum(one.wide for one in rulings), sum(bool(one.ratio) for one in rulings)
    if wide:
        yield f"{wide} of {held} intervals are too wide to exclude more than the allowed: more repeats narrow them."
    yield ""
    yield f"Run `{run.folder}`, baseline `{baseline.folder}`."
    for difference in differences(baseline, run):
        if not difference.matters:
            yield f"- {_text(f'{difference.what}: {difference.first} -> {difference.second}')}"


def _figures(one: Ruling) -> str:
    parts = {"limit": one.limit, "baseline": one.baseline, "now": one.now, "ratio (95 % interval)": one.ratio}
    return "; ".join([one.found, *(f"{name}: {value}" for name, value in parts.items() if value)])


def _text(text: str) -> str:
    """Text as Markdown shows it, in a table too."""
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", " ".join(text.split()))


def _xml(text: str) -> str:
    return _NOT_XML.sub("?", text)
