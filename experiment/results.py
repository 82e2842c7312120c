"""A result folder: reads what a run left, analyses it and writes tables. Everything comes from the records alone."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from experiment import kv, stats
from experiment.memory import Memory, cache_figures, cache_table, gather
from experiment.plan import TARGETS
from loadtest import records
from loadtest.records import Record

JSON = dict[str, Any]

# Past these the load generator itself shapes the latencies it reports.
MAX_CLIENT_CPU_SHARE = 0.8
MAX_CLIENT_LAG_P99_SECONDS = 0.010


# The columns of a record, and before them the cell that it belongs to.
RECORDS_SCHEMA = pa.schema([(name, pa.int64()) for name in ("cell", "concurrency", "repeat")] + list(records.SCHEMA))


class ResultError(Exception):
    """The folder is not a result folder, or cannot be read; the message says why."""


@dataclass(frozen=True)
class CellResult:
    """One cell as it was run: who, how loaded, when (CLOCK_MONOTONIC ns), its records and the client's self-check."""

    index: int
    target: str
    concurrency: int
    repeat: int
    planned_requests: int
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
    memory: Memory

    @property
    def partial(self) -> bool:
        """Whether the run did not come to its planned end."""
        return bool(self.status["state"] != "complete")


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into a ResultError that names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise ResultError(f"{path}: not the folder of a run: {error.filename} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise ResultError(f"{path}: damaged: {type(error).__name__}: {error}") from None


def load(folder: Path) -> Results:
    """Read a result folder; raises ResultError, OSError."""
    plan, environment, status = (_read_json(folder / f"{name}.json") for name in ("plan", "environment", "status"))
    cells = [_load_cell(path.parent) for path in sorted((folder / "cells").glob("*/cell.json"))]
    timeline = [_load_samples(path) for path in sorted((folder / "timeline").glob("*.arrow"))]
    with damage_named(folder):
        table = pa.concat_tables(timeline).unify_dictionaries() if timeline else None
        memory = gather(table, _load_kv(folder / "kv"), {target: _records_of(cells, target) for target in TARGETS})
    return Results(folder, plan, environment, status, cells, table, memory)


def _read_json(path: Path) -> JSON:
    with damage_named(path):
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, got {type(value).__name__}")
        return value


def _load_cell(folder: Path) -> CellResult:
    cell = _read_json(folder / "cell.json")
    path, client = folder / "records.arrow", folder / "client.json"
    with damage_named(path):
        kept = list(records.read(path)) if path.exists() else []
        last_ns = max((record.end_ns for record in kept), default=0)
    with damage_named(folder / "cell.json"):
        names = ("index", "target", "concurrency", "repeat", "planned_requests", "start_ns", "complete")
        return CellResult(
            **{name: cell[name] for name in names},
            end_ns=cell["end_ns"] or max(last_ns, cell["start_ns"]),
            records=kept,
            client=_read_json(client) if client.exists() else None,
        )


def _load_samples(path: Path) -> pa.Table:
    with damage_named(path), pa.ipc.open_stream(path.read_bytes()) as reader:
        return reader.read_all()


def _load_kv(folder: Path) -> dict[str, pa.Table]:
    found = {}
    for path in sorted(folder.glob("*.arrow")):
        with damage_named(path):
            found[path.stem] = kv.read(path)
    return found


def _records_of(cells: Sequence[CellResult], target: str) -> list[Record]:
    return [record for cell in cells if cell.target == target for record in cell.records]


def write_tables(results: Results) -> None:
    """Write all records, the whole timeline and all samples of the KV caches as Parquet."""
    rows = [
        {"cell": cell.index, "concurrency": cell.concurrency, "repeat": cell.repeat, **asdict(record)}
        for cell in results.cells
        for record in cell.records
    ]
    if rows:
        pq.write_table(pa.Table.from_pylist(rows, RECORDS_SCHEMA), results.folder / "records.parquet")
    if results.timeline is not None:
        pq.write_table(results.timeline, results.folder / "timeline.parquet")
    if results.memory.caches:
        pq.write_table(cache_table(results.memory), results.folder / "kv.parquet")


def analyse(results: Results) -> JSON:
    """Compute everything that a report shows; the keys are those of summary.json."""
    gates = list(_gates(results))
    valid = all(gate["passed"] for gate in gates)
    levels = [_level(results, level, valid) for level in sorted(results.plan["concurrency"])]
    levels = [level for level in levels if level["targets"]]
    return {
        "headline": _headline(levels, valid, results.partial),
        "state": results.status["state"],
        "reason": results.status["reason"],
        "valid": valid,
        "gates": gates,
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
    spread = (
        f" ({min(ratio['repeats']):.2f} to {max(ratio['repeats']):.2f} in the repeats)" if ratio["repeats"][1:] else ""
    )
    sentence = (
        f"At concurrency {level['concurrency']} vLLM made {ratio['value']:.2f} times{spread} "
        f"the output tokens per second of HF: {ratio['second']:,.0f} against {ratio['first']:,.0f}."
    )
    if partial:
        sentence = f"Partial run. {sentence}"
    return sentence if valid else f"{sentence} The comparison is not valid: see which rule failed."


def _level(results: Results, concurrency: int, valid: bool) -> JSON:
    cells = [cell for cell in results.cells if cell.concurrency == concurrency and cell.complete]
    by_target = {target: [cell for cell in cells if cell.target == target] for target in TARGETS}
    targets = {target: _target_summary(own) | _memory(results, own) for target, own in by_target.items() if own}
    return {"concurrency": concurrency, "targets": targets, "ratios": _ratios(list(_pairs(cells)), valid)}


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


def _pairs(cells: Sequence[CellResult]) -> Iterator[tuple[CellResult, CellResult]]:
    """The two cells of each repeat of a level, the first target's first."""
    by_key = {(cell.repeat, cell.target): cell for cell in cells}
    for repeat in sorted({cell.repeat for cell in cells}):
        first, second = (by_key.get((repeat, target)) for target in TARGETS)
        if first and second:
            yield first, second


def _ratios(pairs: Sequence[tuple[CellResult, CellResult]], valid: bool) -> JSON:
    """How the second server compares with the first, over the repeats that both ran; above 1 it is better."""
    ratios: JSON = {}
    for metric in stats.LATENCIES:
        repeats = [stats.paired(stats.measured(a.records), stats.measured(b.records), metric) for a, b in pairs]
        if ratio := stats.latency_ratio(repeats):
            ratios[metric] = asdict(ratio) | ({} if valid else {"verdict": "invalid"})
    speeds = [(stats.output_throughput(a.records), stats.output_throughput(b.records)) for a, b in pairs]
    known = [(a, b) for a, b in speeds if a and b]
    if known:
        first, second = (sum(side) / len(known) for side in zip(*known, strict=True))
        each = [b / a for a, b in known]
        ratios["output_throughput"] = {"value": second / first, "first": first, "second": second, "repeats": each}
    return ratios


def _gates(results: Results) -> Iterator[JSON]:
    """The rules that make a comparison valid, each with what was found; evidence that is missing fails a rule."""
    planned = [
        (level, repeat + 1) for level in results.plan["concurrency"] for repeat in range(results.plan["repeats"])
    ]
    whole = {(c.concurrency, c.repeat, c.target): c for c in results.cells if c.complete and _has_all_records(c)}
    missing = [
        f"{target} at concurrency {level}, repeat {repeat}"
        for level, repeat in planned
        for target in TARGETS
        if (level, repeat, target) not in whole
    ]
    found = f"missing or short: {'; '.join(missing)}" if missing else f"{len(whole)} of {len(planned) * len(TARGETS)}"
    yield _gate("every planned cell was run, and each of its requests has a record", not missing, found)

    failed = stats.errors_by_kind([record for cell in results.cells for record in cell.records])
    detail = ", ".join(f"{count} {kind}" for kind, count in failed.items()) or "none failed"
    yield _gate("every request was answered", not failed, detail)

    different, compared = [], 0
    for level in results.plan["concurrency"]:
        for first, second in _pairs([cell for cell in whole.values() if cell.concurrency == level]):
            compared += len(first.records)
            unequal = stats.different_work(first.records, second.records)
            different += [f"concurrency {level} repeat {first.repeat} request {index}" for index in unequal]
    detail = f"{compared} pairs, equal prompt and output tokens" if not different else "; ".join(different[:20])
    yield _gate("both servers did the same work", compared > 0 and not different, detail if compared else "no pairs")
    yield from _client_gates(results.cells)


def _has_all_records(cell: CellResult) -> bool:
    return len({record.index for record in cell.records}) == len(cell.records) == cell.planned_requests


def _client_gates(cells: Sequence[CellResult]) -> Iterator[JSON]:
    clients = [cell.client for cell in cells if cell.client]
    silent = [str(cell.index) for cell in cells if not cell.client]
    unknown = f"no self-check in cell {', '.join(silent)}" if silent else "no cells" if not cells else ""
    cpu = max((client["cpu_share"] for client in clients), default=0.0)
    yield _gate(
        f"the load generator used at most {MAX_CLIENT_CPU_SHARE:.0%} of a core",
        not unknown and cpu <= MAX_CLIENT_CPU_SHARE,
        unknown or f"at most {cpu:.0%}",
    )
    lag = max((client["loop_lag_p99_seconds"] for client in clients), default=0.0)
    yield _gate(
        f"its event loop was late by at most {MAX_CLIENT_LAG_P99_SECONDS * 1e3:.0f} ms (p99)",
        not unknown and lag <= MAX_CLIENT_LAG_P99_SECONDS,
        unknown or f"at most {lag * 1e3:.1f} ms{_hint(clients)}",
    )


def _hint(clients: Sequence[JSON]) -> str:
    if all(client["goes_first"] for client in clients):
        return ""
    return "; Linux did not let it run before the servers: root and CAP_SYS_NICE may"


def _gate(rule: str, passed: bool, found: str) -> JSON:
    return {"rule": rule, "passed": passed, "found": found}


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
