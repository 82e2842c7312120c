"""The verdict of a report in one sentence, and what more there is to say, from the figures of the summary alone."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from experiment.analysis import stats
from experiment.analysis.results import JSON
from experiment.analysis.steady import has_mean
from experiment.report.caches import held, limited_by
from experiment.report.layers import amount
from experiment.report.look import Frame


@dataclass(frozen=True)
class Compared:
    """What a verdict is of: a level, a metric, and the ratio to the baseline of each target that has one to tell.

    `unlike` are those of the targets that hold memory on another number of GPUs than the baseline.
    """

    level: float
    metric: str
    ratios: Mapping[str, JSON]
    unlike: Collection[str]

    @property
    def first(self) -> str:
        """The target that gains most, of those on as many GPUs as the baseline where there is one."""
        alike = [target for target in self.ratios if target not in self.unlike]
        return max(alike or self.ratios, key=lambda target: self.ratios[target]["value"])


def verdict(frame: Frame, summary: JSON) -> str:
    """What a run found: how the target that gains most compares, else where each saturates, else the one alone."""
    words, compared = frame.words, _compared(frame, summary)
    found = _comparison(frame, summary, compared) if compared else _saturation(frame, summary)
    found = found or _alone(frame, summary) or words("verdict.none")
    if not summary["valid"]:
        return words("verdict.invalid", told=found)
    if summary["state"] != "complete":
        return words("verdict.partial", told=found)
    return found[0].upper() + found[1:]


def details(frame: Frame, summary: JSON) -> list[str]:
    """What else there is to say, a sentence each: the other targets, what has no verdict, the search, the memory."""
    compared = _compared(frame, summary)
    told = [] if compared is None else [_others(frame, summary, compared), _unlike(frame, summary, compared)]
    told += _queues(frame, summary)
    told += [_saturation(frame, summary) if compared else None, *_held(frame, summary)]
    return [one[0].upper() + one[1:] for one in told if one]


def _compared(frame: Frame, summary: JSON) -> Compared | None:
    """The highest level at which a metric has a verdict, or could have one where the run as a whole is not valid.

    In an open loop the time of a response comes first: while no queue grows, all servers make the tokens that are
    asked of them.
    """
    metrics = ("output_throughput",) if frame.closed else ("response_seconds", "e2e_seconds", "output_throughput")
    for metric in metrics:
        for level in reversed(summary["levels"]):
            told = {target: found[metric] for target, found in level["ratios"].items() if metric in found}
            known = {target: ratio for target, ratio in told.items() if ratio["value"] is not None}
            ratios = {target: ratio for target, ratio in known.items() if _judged(summary, level, target, metric)}
            if ratios:
                unlike = _on_other_gpus(level.get("targets", {}), summary["baseline"])
                return Compared(level["level"], metric, ratios, [target for target in unlike if target in ratios])
    return None


def _on_other_gpus(targets: Mapping[str, JSON], baseline: str) -> list[str]:
    """The targets that held memory on another number of GPUs than the baseline, as far as the monitor could tell."""
    counts = {target: len(held_on) for target, figures in targets.items() if (held_on := figures.get("held_on"))}
    return [target for target, count in counts.items() if count != counts.get(baseline, count)]


def _judged(summary: JSON, level: JSON, target: str, metric: str) -> bool:
    """Whether no queue grew that a latency would have to wait in; a run that is not valid has no verdict to ask."""
    if summary["valid"]:
        return bool(level["ratios"][target][metric]["verdict"] != "invalid")
    pair = (level["targets"].get(name, {}) for name in (summary["baseline"], target))
    return metric == "output_throughput" or all(map(has_mean, pair))


def _comparison(frame: Frame, summary: JSON, compared: Compared) -> str:
    """How the target that gains most compares with the baseline."""
    words, ratio = frame.words, compared.ratios[compared.first]
    interval = ""
    if ratio["low"] is not None:
        interval = words("verdict.interval", low=ratio["low"], high=ratio["high"])
    values = {name: ratio.get(name) for name in ("value", "first", "second")}
    names = {"target": frame.name(compared.first), "baseline": frame.name(summary["baseline"])}
    kind = "speed" if compared.metric == "output_throughput" else "time"
    clause = words(f"verdict.{kind}", **names, **values, interval=interval)
    if not interval:
        clause += words("verdict.one_repeat") if ratio["repeats"] else ""
    elif stats.verdict(ratio["low"], ratio["high"]) == "no detectable difference":
        clause += words("verdict.no_difference")
    return words("verdict.level", where=_where(frame, summary, compared.level), clauses=clause)


def _others(frame: Frame, summary: JSON, compared: Compared) -> str | None:
    """How the other targets compare with the baseline, by the same metric at the same level."""
    words = frame.words
    others = sorted(compared.ratios.keys() - {compared.first}, key=lambda target: -compared.ratios[target]["value"])
    told = [words("verdict.short", target=frame.name(one), told=_short(frame, compared.ratios[one])) for one in others]
    key = "verdict.others_speed" if compared.metric == "output_throughput" else "verdict.others_time"
    names = {"where": _where(frame, summary, compared.level), "baseline": frame.name(summary["baseline"])}
    return words(key, **names, told=words("join.clauses").join(told)) if told else None


def _unlike(frame: Frame, summary: JSON, compared: Compared) -> str | None:
    """Which of the targets have more or less hardware than the baseline."""
    names = frame.words("join.list").join(map(frame.name, compared.unlike))
    return frame.words("verdict.other_gpus", baseline=frame.name(summary["baseline"]), targets=names) if names else None


def _short(frame: Frame, ratio: JSON) -> str:
    words, value = frame.words, frame.words("ratio", value=ratio["value"])
    if ratio["low"] is None:
        return words("verdict.of", value=value, what=words("one_repeat"))
    interval = words("interval", low=ratio["low"], high=ratio["high"])
    same = "no detectable difference"
    what = words(f"is.{same if stats.verdict(ratio['low'], ratio['high']) == same else ratio['verdict']}")
    return words("verdict.of", value=value, what=words("join.list").join([interval, what]))


def _queues(frame: Frame, summary: JSON) -> Iterator[str]:
    """The levels at which latencies have no mean, and of which targets."""
    if frame.closed:
        return
    for level in summary["levels"]:
        waited = [frame.name(target) for target, figures in level["targets"].items() if not has_mean(figures)]
        if waited:
            names = frame.words("join.list").join(waited)
            yield frame.words("verdict.queue", where=_where(frame, summary, level["level"]), targets=names)


def _held(frame: Frame, summary: JSON) -> Iterator[str]:
    """How many sequences each server held at once in the same bytes, where these were what limited it."""
    words = frame.words
    limited = limited_by("memory", frame, summary)
    if len(limited) < 2:
        return
    counts = {target: one for target, one in held(summary["levels"]).items() if target in limited}
    told = [words("verdict.count", target=frame.name(target), count=one["mean"]) for target, one in counts.items()]
    room = amount(words, summary["kv_budget"], "bytes")
    yield words("verdict.held", room=room, counts=words("join.list").join(told))


def _saturation(frame: Frame, summary: JSON) -> str | None:
    """The highest rate of each target; None when none was searched."""
    words, searched = frame.words, summary.get("saturation") or {}
    rates = [
        words("verdict.rate" if found["rate"] else "verdict.no_rate", target=frame.name(target), rate=found["rate"])
        for target, found in searched.items()
    ]
    return words("verdict.saturation", rates=words("join.clauses").join(rates)) if rates else None


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
