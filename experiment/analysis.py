"""From what a run left to all figures of its report. Everything comes from the records alone."""

from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc

from experiment import gates, stats
from experiment.memory import cache_figures
from experiment.plan import TARGETS
from experiment.results import JSON, CellResult, Results, pairs


def analyse(results: Results) -> JSON:
    """Compute everything that a report shows; the keys are those of summary.json."""
    judged = list(gates.judge(results))
    valid = all(gate["passed"] for gate in judged)
    levels = [_level(results, level, valid) for level in sorted(results.plan["concurrency"])]
    levels = [level for level in levels if level["targets"]]
    return {
        "headline": _headline(levels, valid, results.partial),
        "state": results.status["state"],
        "reason": results.status["reason"],
        "valid": valid,
        "gates": judged,
        "levels": levels,
        "cells": [_cell_summary(cell, results) for cell in results.cells],
    }


def _headline(levels: Sequence[JSON], valid: bool, partial: bool) -> str:
    """One sentence on the highest level that both servers ran."""
    compared = [level for level in levels if level["ratios"].get("output_throughput")]
    if not compared:
        return "No comparison: there is no level that both servers ran to its end."
    level = compared[-1]
    ratio = level["ratios"]["output_throughput"]
    interval = "" if ratio["low"] is None else f" (95 % interval {ratio['low']:.2f} to {ratio['high']:.2f})"
    sentence = (
        f"At concurrency {level['concurrency']} vLLM made {ratio['value']:.2f} times{interval} "
        f"the output tokens per second of HF: {ratio['second']:,.0f} against {ratio['first']:,.0f}."
    )
    if valid and interval and ratio["verdict"] == "no detectable difference":
        sentence += " That is no detectable difference."
    if partial:
        sentence = f"Partial run. {sentence}"
    return sentence if valid else f"{sentence} The comparison is not valid: see which rule failed."


def _level(results: Results, concurrency: int, valid: bool) -> JSON:
    cells = [cell for cell in results.cells if cell.concurrency == concurrency and cell.complete]
    by_target = {target: [cell for cell in cells if cell.target == target] for target in TARGETS}
    targets = {target: _target_summary(own) | _memory(results, own) for target, own in by_target.items() if own}
    return {"concurrency": concurrency, "targets": targets, "ratios": _ratios(list(pairs(cells)), valid)}


def _target_summary(cells: Sequence[CellResult]) -> JSON:
    chosen = [record for cell in cells for record in stats.measured(cell.records)]
    summary: JSON = {
        "requests": len(chosen),
        "failed": stats.errors_by_kind(chosen),
        "output_throughput": [stats.output_throughput(cell.records) for cell in cells],
    }
    known = [value for value in summary["output_throughput"] if value is not None]
    summary["output_throughput_mean"] = sum(known) / len(known) if known else None
    for metric, read in stats.LATENCIES.items():
        distribution = stats.summarize([value for record in chosen if (value := read(record)) is not None])
        summary[metric] = asdict(distribution) if distribution else None
    return summary


def _memory(results: Results, cells: Sequence[CellResult]) -> JSON:
    """What each layer of memory held while the cells of one server and level were at their load."""
    windows = [window for cell in cells if (window := stats.steady_window(cell.records))]
    return {"memory": results.memory.figures(cells[0].target, windows)}


def _ratios(pairs: Sequence[tuple[CellResult, CellResult]], valid: bool) -> JSON:
    """How the second server compares with the first, over the repeats that both ran; above 1 it is better."""
    found: JSON = {}
    for metric in stats.LATENCIES:
        repeats = [stats.paired(stats.measured(a.records), stats.measured(b.records), metric) for a, b in pairs]
        found[metric] = {"repeats": [ratio for values in repeats if (ratio := stats.ratio_of_means(values))]}
    speeds = [(stats.output_throughput(a.records), stats.output_throughput(b.records)) for a, b in pairs]
    known = [(a, b) for a, b in speeds if a and b]
    first, second = (sum(side) / len(known) for side in zip(*known, strict=True)) if known else (None, None)
    found["output_throughput"] = {"repeats": [b / a for a, b in known], "first": first, "second": second}
    return {
        metric: ratio | asdict(stats.ratio_of_pairs(ratio["repeats"])) | ({} if valid else {"verdict": "invalid"})
        for metric, ratio in found.items()
        if ratio["repeats"]
    }


def _cell_summary(cell: CellResult, results: Results) -> JSON:
    window = stats.steady_window(cell.records) if cell.complete else None
    cache = results.memory.caches.get(cell.target)
    sampled = cache_figures(cache, [(cell.start_ns, cell.end_ns)]) if cache else None
    return {
        "index": cell.index,
        "target": cell.target,
        "concurrency": cell.concurrency,
        "repeat": cell.repeat,
        "start_ns": cell.start_ns,
        "end_ns": cell.end_ns,
        "complete": cell.complete,
        "requests": len(cell.records),
        "failed": stats.errors_by_kind(cell.records),
        "window_ns": window,
        "output_throughput": stats.output_throughput(cell.records) if cell.complete else None,
        "memory_samples_per_second": _sampling_rate(cell, results.timeline),
        "kv_samples": {name: sampled[name] for name in ("samples_per_second", "missed", "broken")} if sampled else None,
        "client": cell.client,
    }


def _sampling_rate(cell: CellResult, timeline: pa.Table | None) -> float | None:
    """How often the monitor sampled the memory of the server under load during its cell, per second."""
    if timeline is None or cell.end_ns <= cell.start_ns:
        return None
    own = pc.and_(pc.equal(timeline["metric"], "host_rss_bytes"), pc.equal(timeline["server"], cell.target))
    within = pc.and_(pc.greater_equal(timeline["time_ns"], cell.start_ns), pc.less(timeline["time_ns"], cell.end_ns))
    return float(pc.sum(pc.and_(own, within)).as_py() or 0) / ((cell.end_ns - cell.start_ns) / 1e9)
