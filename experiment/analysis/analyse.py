"""From what a run left to all figures of its report. Everything comes from the records alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from experiment.analysis import activity, gates, ladder, stats, steady
from experiment.analysis.memory import cache_figures
from experiment.analysis.results import JSON, CellResult, Results, pairs, targets
from experiment.analysis.saturation import Search
from experiment.analysis.steady import Steady

RATES = ("output_throughput", "goodput")


@dataclass(frozen=True)
class Figures:
    """A run with what each of its cells came to, by the cell's index."""

    results: Results
    steady: dict[int, Steady]
    drifts: dict[int, dict[str, float]]
    short: dict[int, float]

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the plan; a request meets all of them or is not good."""
        return self.results.plan.get("limits") or {}

    def rate(self, cell: CellResult, name: str) -> float | None:
        """A rate of a cell: output tokens, or requests that met the limits, per second."""
        if name == "output_throughput":
            return self.steady[cell.index].output_throughput
        return stats.goodput(cell.requests, self.limits) if self.limits else None


def analyse(results: Results) -> JSON:
    """Compute everything that a report shows; the keys are those of summary.json, which adds the `headline`."""
    complete = [cell for cell in results.cells if cell.complete]
    measured = {cell.index: steady.measure(cell.requests) for cell in complete}
    of_levels = {cell.index: measured[cell.index] for cell in complete if not cell.search}
    figures = Figures(results, measured, steady.drifts(of_levels), steady.short(of_levels))
    plan, names = results.plan, targets(results.plan)
    judged = list(gates.judge(results, of_levels))
    valid = all(gate["passed"] is not False for gate in judged)
    levels = [_level(figures, level, valid) for level in sorted(plan["levels"])]
    levels = [level for level in levels if level["targets"]]
    steps = _ladder(figures, valid)
    return {
        "state": results.status["state"],
        "reason": results.status["reason"],
        "valid": valid,
        "baseline": names[0],
        "targets": names,
        "arrival": plan["arrival"],
        "together": plan["together"],
        # A server that ran already was not told of it.
        "kv_budget": None if any(target.get("url") for target in plan["targets"]) else plan.get("kv_budget"),
        "limits": figures.limits,
        "gates": judged,
        "levels": levels,
        "comparisons": _comparisons(levels),
        "saturation": {name: found for name in names if (found := _saturation(figures, name))},
        "ladder": steps,
        "ladder_product": ladder.product(steps),
        "cells": [_cell_summary(cell, figures) for cell in results.cells],
    }


def _level(figures: Figures, level: float, valid: bool) -> JSON:
    cells = _cells_of(figures.results, level)
    baseline, *others = targets(figures.results.plan)
    by_target = {name: [cell for cell in cells if cell.target == name] for name in (baseline, *others)}
    found = {name: _target_summary(figures, own) for name, own in by_target.items() if own}
    compared = {name: _ratios(figures, list(pairs(cells, baseline, name)), valid) for name in others}
    return {"level": level, "targets": found, "ratios": {name: ratios for name, ratios in compared.items() if ratios}}


def _comparisons(levels: Sequence[JSON]) -> int:
    """How many ratios have an interval: where nothing differs, each leaves out 1 by chance in one case of twenty."""
    ratios = [ratio for level in levels for one in level["ratios"].values() for ratio in one.values()]
    return sum(ratio["low"] is not None for ratio in ratios)


def _cells_of(results: Results, level: float) -> list[CellResult]:
    return [cell for cell in results.cells if cell.level == level and cell.complete and not cell.search]


def _target_summary(figures: Figures, cells: Sequence[CellResult]) -> JSON:
    chosen = [cell.requests.measured for cell in cells]
    errors = [cell.requests.error[which] for cell, which in zip(cells, chosen, strict=True)]
    rates = {name: [figures.rate(cell, name) for cell in cells] for name in RATES}
    summary: JSON = {
        "requests": int(sum(which.sum() for which in chosen)),
        "failed": stats.errors_by_kind(np.concatenate(errors)),
        "output_throughput": rates["output_throughput"],
        "output_throughput_mean": _mean(rates["output_throughput"]),
        "goodput": _mean(rates["goodput"]),
        "attainment": _attainment(figures, cells),
        "unstable": [cell.repeat for cell in cells if cell.index in figures.drifts],
        "short": [cell.repeat for cell in cells if cell.index in figures.short],
        "offered_rate": _mean([stats.offered_rate(cell.requests) for cell in cells]),
    }
    for metric, read in stats.COMPARED.items():
        values = np.concatenate([read(cell.requests)[which] for cell, which in zip(cells, chosen, strict=True)])
        distribution = stats.summarize(values)
        if metric == "normalized_latency":
            summary[metric] = distribution.mean if distribution else None
        else:
            summary[metric] = asdict(distribution) if distribution else None
    windows = [window for cell in cells if (window := figures.steady[cell.index].window)]
    target, memory = cells[0].target, figures.results.memory
    held_on = memory.gpus(target, windows)
    return summary | {
        "memory": memory.figures(target, windows),
        "held_on": held_on,
        "gpus": activity.gpus(figures.results.timeline, windows, held_on),
        "cores": activity.cores(figures.results.timeline, target, windows),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _attainment(figures: Figures, cells: Sequence[CellResult]) -> float | None:
    """Share of all measured requests of some cells that met every limit; None without limits."""
    met = [stats.meets(cell.requests, figures.limits)[cell.requests.measured] for cell in cells]
    offered = np.concatenate(met) if met else np.zeros(0)
    return float(offered.mean()) if figures.limits and len(offered) else None


def _ratios(figures: Figures, compared: Sequence[tuple[CellResult, CellResult]], valid: bool) -> JSON:
    """How the second server of each pair compares with the first, over the repeats of both; above 1 it is better.

    What waits in a queue that grows has no mean: where a cell drifted, or was too short beside the time that requests
    waited, no latency has a verdict.
    """
    unsteady = figures.drifts.keys() | figures.short.keys()
    drifted = any(cell.index in unsteady for pair in compared for cell in pair)
    found: JSON = {}
    for metric in stats.COMPARED:
        repeats = [stats.paired(a.requests, b.requests, metric) for a, b in compared]
        found[metric] = {"repeats": [ratio for values in repeats if (ratio := stats.ratio_of_means(values))]}
    found = {
        metric: one | asdict(stats.ratio_of_pairs(one["repeats"])) for metric, one in found.items() if one["repeats"]
    }
    for name in RATES:
        both = [(figures.rate(a, name), figures.rate(b, name)) for a, b in compared]
        known = [(a, b) for a, b in both if a is not None and b is not None]
        if any(a or b for a, b in known):
            found[name] = _ratio_of_rates(*zip(*known, strict=True))
    sure = {metric: valid and not (drifted and metric in stats.COMPARED) for metric in found}
    return {metric: one | ({} if sure[metric] else {"verdict": "invalid"}) for metric, one in found.items()}


def _ratio_of_rates(first: Sequence[float], second: Sequence[float]) -> JSON:
    """A rate of the second server over that of the first, by repeat."""
    means = {"first": sum(first) / len(first), "second": sum(second) / len(second)}
    if all(first) and all(second):
        ratios = [b / a for a, b in zip(first, second, strict=True)]
        return {"repeats": ratios, **means, **asdict(stats.ratio_of_pairs(ratios))}
    return {"repeats": [], **means, **asdict(stats.ratio_with_none(first, second))}


def _saturation(figures: Figures, target: str) -> JSON | None:
    """What the search for a target's saturation found; None when it was not searched."""
    cells = [cell for cell in figures.results.cells if cell.search and cell.complete and cell.target == target]
    if not cells:
        return None
    wanted = figures.results.plan.get("attainment", 0.99)
    search, told = Search(cells[0].level), []
    for cell in cells:
        share = _attainment(figures, [cell])
        met = share is not None and share >= wanted
        search.tell(cell.level, met)
        count = int(cell.requests.measured.sum())
        low, high = stats.wilson(share, count) if share is not None else (None, None)
        one = {"rate": cell.level, "met": met, "attainment": share, "goodput": figures.rate(cell, "goodput")}
        told.append(one | {"attainment_low": low, "attainment_high": high})
    found = search.result
    bracket = [one for one in told if one["rate"] in (found.rate, found.missed) and one["attainment_low"] is not None]
    unsure = [one["rate"] for one in bracket if one["attainment_low"] <= wanted <= one["attainment_high"]]
    return asdict(found) | {"unsure": unsure, "wanted": wanted, "cells": told}


def _ladder(figures: Figures, valid: bool) -> list[JSON]:
    """What each rung brings over the one below it, at each level, over the repeats that all rungs ran."""
    steps = list(ladder.steps(figures.results.plan["targets"]))
    rungs = {name for low, up, _ in steps for name in (low, up)}
    levels = sorted(figures.results.plan["levels"])
    cells = {level: ladder.shared(_cells_of(figures.results, level), rungs) for level in levels}
    found = []
    for low, up, adds in steps:
        for level in levels:
            ratios = _ratios(figures, list(pairs(cells[level], low, up)), valid)
            if ratio := ratios.get("output_throughput"):
                found.append({"from": low, "to": up, "adds": adds, "level": level, "ratio": ratio})
    return found


def _cell_summary(cell: CellResult, figures: Figures) -> JSON:
    cache = figures.results.memory.caches.get(cell.target)
    sampled = cache_figures(cache, [(cell.start_ns, cell.end_ns)]) if cache else None
    known = figures.steady.get(cell.index)
    return {
        "index": cell.index,
        "target": cell.target,
        "level": cell.level,
        "repeat": cell.repeat,
        "search": cell.search,
        "start_ns": cell.start_ns,
        "end_ns": cell.end_ns,
        "complete": cell.complete,
        "requests": len(cell.requests),
        "failed": stats.errors_by_kind(cell.requests.error),
        "window_ns": known.window if known else None,
        "output_throughput": known.output_throughput if known else None,
        "goodput": figures.rate(cell, "goodput") if known else None,
        "attainment": _attainment(figures, [cell]) if known else None,
        "drift": figures.drifts.get(cell.index),
        "memory_samples_per_second": _sampling_rate(cell, figures.results.timeline),
        "kv_samples": {name: sampled[name] for name in ("samples_per_second", "missed", "broken")} if sampled else None,
        "client": cell.client,
        "prefix_cache": cell.prefix_cache,
    }


def _sampling_rate(cell: CellResult, timeline: pa.Table | None) -> float | None:
    """How often the monitor sampled the memory of a GPU, or without one of the server under load, per second."""
    if timeline is None or cell.end_ns <= cell.start_ns:
        return None
    within = pc.and_(pc.greater_equal(timeline["time_ns"], cell.start_ns), pc.less(timeline["time_ns"], cell.end_ns))
    device = timeline.filter(pc.and_(within, pc.equal(timeline["metric"], "gpu_memory_used_bytes")))
    if device.num_rows:
        samples = device.num_rows / pc.count_distinct(device["gpu"]).as_py()
    else:
        own = pc.and_(pc.equal(timeline["metric"], "host_rss_bytes"), pc.equal(timeline["server"], cell.target))
        samples = pc.sum(pc.and_(own, within)).as_py() or 0
    return float(samples / ((cell.end_ns - cell.start_ns) / 1e9))
