"""The verdict of a report in one sentence, in the language of the reader, from the figures of the summary alone."""

from collections.abc import Mapping

from experiment.analysis.results import JSON
from experiment.report.look import Frame


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
            ratios = {target: found[metric] for target, found in level["ratios"].items() if found.get(metric)}
            if ratios:
                clauses = _clauses(frame, summary["baseline"], ratios, metric)
                where = frame.words("verdict.closed" if frame.closed else "verdict.open", level=level["level"])
                return frame.words("verdict.level", where=where, clauses=clauses)
    return None


def _clauses(frame: Frame, baseline: str, ratios: Mapping[str, JSON], metric: str) -> str:
    """The target that gains most with its interval, and after it the gains of the others."""
    words = frame.words
    first, *others = sorted(ratios, key=lambda target: ratios[target]["value"], reverse=True)
    told = [_clause(frame, baseline, first, ratios[first], "speed" if metric == "output_throughput" else "time")]
    if others:
        short = [words("verdict.short", target=frame.name(one), value=ratios[one]["value"]) for one in others]
        told.append(words("join.list").join(short))
    return words("join.clauses").join(told)


def _clause(frame: Frame, baseline: str, target: str, ratio: JSON, kind: str) -> str:
    words, interval = frame.words, ""
    if ratio["low"] is not None:
        interval = words("verdict.interval", low=ratio["low"], high=ratio["high"])
    values = {name: ratio.get(name) for name in ("value", "first", "second")}
    names = {"target": frame.name(target), "baseline": frame.name(baseline)}
    clause = words(f"verdict.{kind}", **names, **values, interval=interval)
    if not interval:
        return clause + words("verdict.one_repeat")
    return clause + (words("verdict.no_difference") if ratio["verdict"] == "no detectable difference" else "")
