"""A result folder: reads what a run left, analyses it and writes tables. Everything comes from the records alone."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiment import stats
from experiment.plan import TARGETS
from loadtest import records
from loadtest.records import Record

JSON = dict[str, Any]

# Past these the load generator itself shapes the latencies it reports.
MAX_CLIENT_CPU_SHARE = 0.8
MAX_CLIENT_LAG_P99_SECONDS = 0.010


class ResultError(Exception):
    """The folder is not a result folder, or cannot be read; the message says why."""


@dataclass(frozen=True)
class CellResult:
    """One cell as it was run: who, how loaded, when (CLOCK_MONOTONIC ns), its records and the client's self-check."""

    index: int
    target: str
    concurrency: int
    repeat: int
    start_ns: int
    end_ns: int
    complete: bool
    records: list[Record]
    client: JSON | None


@dataclass(frozen=True)
class Results:
    """All that a run left."""

    folder: Path
    plan: JSON
    environment: JSON
    status: JSON
    cells: list[CellResult]
    timeline: pa.Table | None

    @property
    def partial(self) -> bool:
        """Whether the run did not come to its planned end."""
        return bool(self.status["state"] != "complete")


def load(folder: Path) -> Results:
    """Read a result folder; raises ResultError."""
    try:
        plan, environment, status = (
            json.loads((folder / name).read_text()) for name in ("plan.json", "environment.json", "status.json")
        )
        cells = [_load_cell(path.parent) for path in sorted((folder / "cells").glob("*/cell.json"))]
    except FileNotFoundError as error:
        raise ResultError(f"{folder}: not the folder of a run: {error.filename} is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ResultError(f"{folder}: a file of the run is damaged: {error}") from None
    return Results(folder, plan, environment, status, cells, _load_timeline(folder / "timeline"))


def _load_cell(folder: Path) -> CellResult:
    cell = json.loads((folder / "cell.json").read_text())
    path, client = folder / "records.jsonl", folder / "client.json"
    kept = list(records.read(path)) if path.exists() else []
    last_ns = max((record.end_ns for record in kept), default=cell["start_ns"])
    return CellResult(
        **{name: cell[name] for name in ("index", "target", "concurrency", "repeat", "start_ns", "complete")},
        end_ns=cell["end_ns"] or last_ns,
        records=kept,
        client=json.loads(client.read_text()) if client.exists() else None,
    )


def _load_timeline(folder: Path) -> pa.Table | None:
    pieces = []
    for path in sorted(folder.glob("*.arrow")):
        with pa.ipc.open_stream(path.read_bytes()) as reader:
            pieces.append(reader.read_all())
    return pa.concat_tables(pieces).unify_dictionaries() if pieces else None


def write_tables(results: Results) -> None:
    """Write all records and the whole timeline as Parquet."""
    rows = [
        {"cell": cell.index, "concurrency": cell.concurrency, "repeat": cell.repeat, **asdict(record)}
        for cell in results.cells
        for record in cell.records
    ]
    if rows:
        pq.write_table(pa.Table.from_pylist(rows), results.folder / "records.parquet")
    if results.timeline is not None:
        pq.write_table(results.timeline, results.folder / "timeline.parquet")


def analyse(results: Results) -> JSON:
    """Compute everything that a report shows; the keys are those of summary.json."""
    levels = [_level(results, level) for level in results.plan["concurrency"]]
    levels = [level for level in levels if level["targets"]]
    gates = list(_gates(results))
    valid = all(gate["passed"] for gate in gates)
    return {
        "headline": _headline(levels, valid, results.partial),
        "state": results.status["state"],
        "reason": results.status["reason"],
        "valid": valid,
        "gates": gates,
        "levels": levels,
        "cells": [_cell_summary(cell) for cell in results.cells],
    }


def _headline(levels: Sequence[JSON], valid: bool, partial: bool) -> str:
    """One sentence on the highest level that both servers ran."""
    compared = [level for level in levels if level["ratios"].get("output_throughput", {}).get("value")]
    if not compared:
        return "No comparison: there is no level that both servers ran to its end."
    level = compared[-1]
    first, second = (level["targets"][target]["output_throughput_mean"] for target in TARGETS)
    sentence = (
        f"At concurrency {level['concurrency']} vLLM made {level['ratios']['output_throughput']['value']:.2f} times "
        f"the output tokens per second of HF: {second:,.0f} against {first:,.0f}."
    )
    if partial:
        sentence = f"Partial run. {sentence}"
    return sentence if valid else f"{sentence} The comparison is not valid: see which rule failed."


def _level(results: Results, concurrency: int) -> JSON:
    cells = [cell for cell in results.cells if cell.concurrency == concurrency and cell.complete]
    by_target = {target: [cell for cell in cells if cell.target == target] for target in TARGETS}
    targets = {target: _target_summary(own) for target, own in by_target.items() if own}
    return {"concurrency": concurrency, "targets": targets, "ratios": _ratios(cells, targets)}


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


def _pairs(cells: Sequence[CellResult]) -> Iterator[tuple[CellResult, CellResult]]:
    """The two cells of each repeat of a level, the first target's first."""
    by_key = {(cell.repeat, cell.target): cell for cell in cells}
    for repeat in sorted({cell.repeat for cell in cells}):
        first, second = (by_key.get((repeat, target)) for target in TARGETS)
        if first and second:
            yield first, second


def _ratios(cells: Sequence[CellResult], targets: JSON) -> JSON:
    pairs = list(_pairs(cells))
    if not pairs:
        return {}
    valid = not any(_broken_pair(first, second) for first, second in pairs)
    ratios: JSON = {}
    for metric in stats.LATENCIES:
        ratio = stats.latency_ratio(
            np.concatenate(
                [stats.paired(stats.measured(a.records), stats.measured(b.records), metric) for a, b in pairs]
            )
        )
        ratios[metric] = asdict(ratio) | ({} if valid else {"verdict": "invalid"}) if ratio else None
    first, second = (targets[target]["output_throughput_mean"] for target in TARGETS)
    each = zip(*(targets[target]["output_throughput"] for target in TARGETS), strict=False)
    ratios["output_throughput"] = {
        "value": second / first if first and second else None,
        "repeats": [b / a for a, b in each if a and b],
        "valid": valid,
    }
    return ratios


def _broken_pair(first: CellResult, second: CellResult) -> bool:
    a, b = stats.measured(first.records), stats.measured(second.records)
    return bool(stats.different_work(a, b)) or any(record.error for record in (*a, *b))


def _gates(results: Results) -> Iterator[JSON]:
    """The rules that make a comparison valid, each with what was found."""
    planned = len(results.plan["concurrency"]) * results.plan["repeats"] * len(TARGETS)
    done = sum(cell.complete for cell in results.cells)
    yield _gate("every planned cell was run", done == planned, f"{done} of {planned}")

    failed = stats.errors_by_kind([record for cell in results.cells for record in cell.records])
    detail = ", ".join(f"{count} {kind}" for kind, count in failed.items()) or "none failed"
    yield _gate("every request was answered", not failed, detail)

    different, compared = [], 0
    for level in results.plan["concurrency"]:
        for first, second in _pairs([cell for cell in results.cells if cell.concurrency == level and cell.complete]):
            compared += len(first.records)
            found = stats.different_work(first.records, second.records)
            different += [f"concurrency {level} repeat {first.repeat} request {index}" for index in found]
    detail = f"{compared} pairs, equal prompt and output tokens" if not different else "; ".join(different[:20])
    yield _gate("both servers did the same work", compared > 0 and not different, detail if compared else "no pairs")

    clients = [cell.client for cell in results.cells if cell.client]
    cpu = max((client["cpu_share"] for client in clients), default=None)
    lag = max((client["loop_lag_p99_seconds"] for client in clients), default=None)
    yield _gate(
        f"the load generator used at most {MAX_CLIENT_CPU_SHARE:.0%} of a core",
        cpu is not None and cpu <= MAX_CLIENT_CPU_SHARE,
        "not known" if cpu is None else f"at most {cpu:.0%}",
    )
    yield _gate(
        f"its event loop was late by at most {MAX_CLIENT_LAG_P99_SECONDS * 1e3:.0f} ms (p99)",
        lag is not None and lag <= MAX_CLIENT_LAG_P99_SECONDS,
        "not known" if lag is None else f"at most {lag * 1e3:.1f} ms{_hint(clients)}",
    )


def _hint(clients: Sequence[JSON]) -> str:
    if all(client["goes_first"] for client in clients):
        return ""
    return "; Linux did not let it run before the servers: root and CAP_SYS_NICE may"


def _gate(rule: str, passed: bool, found: str) -> JSON:
    return {"rule": rule, "passed": passed, "found": found}


def _cell_summary(cell: CellResult) -> JSON:
    window = stats.steady_window(cell.records) if cell.complete else None
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
        "client": cell.client,
    }
