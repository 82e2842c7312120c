"""The verdict of a report in one sentence, in the language of the reader, from the figures of the summary alone."""

from collections.abc import Iterator

from experiment.report.look import Frame
from experiment.results import JSON


def verdict(frame: Frame, summary: JSON) -> str:
    """What the run found: where each target saturates, else how each compares with the baseline at the last level."""
    words = frame.words
    found = _saturation(frame, summary) or _comparison(frame, summary) or words("verdict.none")
    parts = [words("verdict.partial")] if summary["state"] != "complete" else []
    parts.append(found)
    if not summary["valid"]:
        parts.append(words("verdict.invalid"))
    return words("join.sentences").join(parts)


def _saturation(frame: Frame, summary: JSON) -> str | None:
    """The highest rate of each target; None when none was searched."""
    words, searched = frame.words, summary.get("saturation") or {}
    rates = [
        words("verdict.rate" if found["rate"] else "verdict.no_rate", target=frame.name(target), rate=found["rate"])
        for target, found in searched.items()
    ]
    return words("verdict.saturation", rates=words("join.clauses").join(rates)) if rates else None


def _comparison(frame: Frame, summary: JSON) -> str | None:
    """How each target compares with the baseline at the last level at which any does; None without a comparison."""
    metrics = ("output_throughput",) if frame.closed else ("response_seconds", "e2e_seconds", "output_throughput")
    for level in reversed(summary["levels"]):
        for metric in metrics:
            clauses = list(_clauses(frame, summary, level, metric))
            if clauses:
                joined = frame.words("join.clauses").join(clauses)
                return frame.words("verdict.level", level=frame.level(level["level"]), clauses=joined)
    return None


def _clauses(frame: Frame, summary: JSON, level: JSON, metric: str) -> Iterator[str]:
    words, baseline = frame.words, summary["baseline"]
    kind = "speed" if metric == "output_throughput" else "time"
    for target, ratios in level["ratios"].items():
        ratio = ratios.get(metric)
        if not ratio:
            continue
        values = {"target": frame.name(target), "baseline": frame.name(baseline), "value": ratio["value"]}
        interval = ""
        if ratio["low"] is not None:
            interval = words("verdict.interval", low=ratio["low"], high=ratio["high"])
        values |= {"interval": interval, "first": ratio.get("first"), "second": ratio.get("second")}
        clause = words(f"verdict.{kind}", **values)
        if not interval:
            clause += words("verdict.one_repeat")
        elif ratio["verdict"] == "no detectable difference":
            clause += words("verdict.no_difference")
        yield clause
