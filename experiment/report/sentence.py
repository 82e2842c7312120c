"""The verdict of a report in one sentence, in the language of the reader, from the figures of the summary alone."""

from collections.abc import Mapping

from experiment.analysis.results import JSON
from experiment.report.caches import held
from experiment.report.layers import amount
from experiment.report.look import Frame


def verdict(frame: Frame, summary: JSON) -> str:
    """What a run found: where each target saturates, else how each compares with the baseline, else the one alone."""
    words = frame.words
    found = _saturation(frame, summary) or _comparison(frame, summary) or _alone(frame, summary)
    parts = [words("verdict.partial")] if summary["state"] != "complete" else []
    parts += [told] if (told := _held(frame, summary)) else []
    parts.append(found or words("verdict.none"))
    if not summary["valid"]:
        parts.append(words("verdict.invalid"))
    return words("join.sentences").join(parts)


def _held(frame: Frame, summary: JSON) -> str | None:
    """How many sequences each server held at once, where all had the same bytes of KV cache; else None."""
    words, counts = frame.words, held(summary["levels"]) if summary["kv_budget"] else {}
    if len(counts) < 2:
        return None
    told = [words("verdict.count", target=frame.name(target), count=one["mean"]) for target, one in counts.items()]
    room = amount(words, summary["kv_budget"], "bytes")
    return words("verdict.held", room=room, counts=words("join.list").join(told))


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
                return frame.words("verdict.level", where=_where(frame, summary, level["level"]), clauses=clauses)
    return None


def _where(frame: Frame, summary: JSON, level: float) -> str:
    """The load of a level, and whether all servers bore it at once."""
    where = frame.words("verdict.closed" if frame.closed else "verdict.open", level=level)
    return frame.words("verdict.together", where=where) if summary["together"] else where


def _alone(frame: Frame, summary: JSON) -> str | None:
    """What a run of one target found at its last level; None for a run of several, or without a figure."""
    words, levels = frame.words, summary["levels"]
    if len(frame.targets) > 1 or not levels:
        return None
    target, figures = next(iter(levels[-1]["targets"].items()))
    tokens, ttft = figures["output_throughput_mean"], figures["ttft_seconds"]
    if tokens is None or ttft is None:
        return None
    told = [words("verdict.alone", target=frame.name(target), tokens=tokens, ttft=ttft["mean"] * 1e3)]
    if figures["attainment"] is not None:
        told.append(words("verdict.attained", share=figures["attainment"]))
    where = _where(frame, summary, levels[-1]["level"])
    return words("verdict.level", where=where, clauses=words("join.clauses").join(told))


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
