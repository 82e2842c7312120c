"""A result folder: reads what a run left, and writes it as tables. It judges nothing."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from experiment import kv
from experiment.memory import Memory, cache_table, gather
from experiment.plan import TARGETS
from loadtest import records
from loadtest.records import Record

JSON = dict[str, Any]

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


def pairs(cells: Sequence[CellResult]) -> Iterator[tuple[CellResult, CellResult]]:
    """The two cells of each repeat of a level, the first target's first."""
    by_key = {(cell.repeat, cell.target): cell for cell in cells}
    for repeat in sorted({cell.repeat for cell in cells}):
        first, second = (by_key.get((repeat, target)) for target in TARGETS)
        if first and second:
            yield first, second
