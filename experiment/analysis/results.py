"""A result folder: reads what a run left, and writes it as tables. It judges nothing."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from experiment.analysis import requests, stats
from experiment.analysis.memory import Memory, cache_table, gather
from experiment.analysis.requests import Requests, shifted
from experiment.run import kv
from loadtest import records
from loadtest.records import Record

JSON = dict[str, Any]

# The columns of a record, and before them the cell that it belongs to.
CELL_COLUMNS = {"cell": pa.int64(), "level": pa.float64(), "repeat": pa.int64()}
RECORDS_SCHEMA = pa.schema([*CELL_COLUMNS.items(), *records.SCHEMA])


# What the plan of a run says that was made when there were two targets and closed loops alone.
OLD_PLAN: JSON = {
    "targets": [{"name": "hf", "kind": "hf"}, {"name": "vllm", "kind": "vllm"}],
    "arrival": "closed",
    "limits": {},
    "together": False,
}


class ResultError(Exception):
    """The folder is not a result folder, or cannot be read; the message says why."""


@dataclass(frozen=True)
class CellResult:
    """One cell as it was run: who, how loaded, when (CLOCK_MONOTONIC ns), its requests and the client's self-check.

    `level` is a number of requests in flight, or in an open loop a rate in requests per second. A cell of the `search`
    for the saturation belongs to no level, and is stopped early when it cannot meet the limits any more.
    `prefix_cache` has the `state` of the server's before the cell (off, reset, on or unknown), and how many tokens of
    the cell's prompts it looked for there (`queries`) and found (`hits`), None where the server does not say.
    """

    index: int
    target: str
    level: float
    repeat: int
    search: bool
    stopped_early: bool
    planned_requests: int
    start_ns: int
    end_ns: int
    complete: bool
    requests: Requests
    path: Path
    client: JSON | None
    prefix_cache: JSON

    @property
    def records(self) -> list[Record]:
        """All records, read anew each time: for a few of them, and not for a million."""
        return list(records.read(self.path)) if self.path.exists() else []


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
    if not (folder / "cells").is_dir():
        raise ResultError(f"{folder}: cells/ is missing, of which all figures are made; its report may be there still")
    plan = {**OLD_PLAN, "levels": plan.get("concurrency"), **plan}
    with damage_named(folder / "environment.json"):
        parts = _parts(environment)
    shifts = {part["boot_id"]: part["shift_ns"] for part in parts}
    cells = [_load_cell(path.parent, shifts) for path in (folder / "cells").glob("*/cell.json")]
    cells.sort(key=lambda cell: cell.index)
    cells = _together(cells) if plan["together"] else cells
    timeline, samples = [], defaultdict(list)
    for part in parts:
        shift = partial(shifted, shift_ns=part["shift_ns"])
        timeline += [
            shift(_load_samples(path)) for path in sorted((folder / f"timeline{part['suffix']}").glob("*.arrow"))
        ]
        for target, table in _load_kv(folder / f"kv{part['suffix']}").items():
            samples[target].append(shift(table))
    with damage_named(folder):
        table = _by_target(pa.concat_tables(timeline).unify_dictionaries(), plan) if timeline else None
        caches = {target: pa.concat_tables(tables) for target, tables in samples.items()}
        sent = {target: [cell.requests for cell in cells if cell.target == target] for target in targets(plan)}
        memory = gather(table, caches, sent)
    return Results(folder, plan, environment, status, cells, table, memory)


def goes_on(plan: JSON) -> bool:
    """Whether the cells of a run may have more requests than were planned, as they last for a time."""
    return bool(plan["arrival"] == "closed" and plan.get("min_seconds") and not plan.get("requests"))


def _read_json(path: Path) -> JSON:
    with damage_named(path):
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, got {type(value).__name__}")
        return value


def _parts(environment: JSON) -> list[JSON]:
    """The parts of a run: in which start of the machine each ran, and what puts its times on one axis.

    CLOCK_MONOTONIC begins anew with each start. What is added to its times puts them as far from those of the first
    part as the wall clock says, so that parts do not overlap; within a cell nothing depends on it.
    """
    begun = environment.get("parts") or [{"boot_id": "", "wall_minus_monotonic_ns": 0}]
    first = {"boot_id": begun[0]["boot_id"], "shift_ns": 0, "suffix": ""}
    found = [first]
    for number, part in enumerate(begun[1:], 2):
        known = next((one["shift_ns"] for one in found if one["boot_id"] == part["boot_id"]), None)
        moved = part["wall_minus_monotonic_ns"] - begun[0]["wall_minus_monotonic_ns"]
        shift = moved if known is None else known
        found.append({"boot_id": part["boot_id"], "shift_ns": shift, "suffix": f"-{number}"})
    return found


def _load_cell(folder: Path, shifts: Mapping[str, int]) -> CellResult:
    cell = _read_json(folder / "cell.json")
    cell = {"level": cell.get("concurrency"), "search": False, **cell}
    path, client = folder / "records.arrow", folder / "client.json"
    with damage_named(folder / "cell.json"):
        shift = shifts[cell["boot_id"]] if "boot_id" in cell else 0
    with damage_named(path):
        kept = requests.load(path, shift) if path.exists() else requests.of([])
        last_ns = int(kept.end_ns.max(initial=0))
    with damage_named(folder / "cell.json"):
        names = ("index", "target", "level", "repeat", "search", "planned_requests", "complete")
        start_ns = cell["start_ns"] + shift
        return CellResult(
            **{name: cell[name] for name in names},
            stopped_early=cell.get("stopped_early", False),
            start_ns=start_ns,
            end_ns=cell["end_ns"] + shift if cell["end_ns"] else max(last_ns, start_ns),
            requests=kept,
            path=path,
            client=_read_json(client) if client.exists() else None,
            prefix_cache=_prefix_cache(cell),
        )


def _prefix_cache(cell: JSON) -> JSON:
    """What cell.json has of the prefix cache of the cell's own server; a run of an earlier version says less."""
    state = (cell.get("prefix_cache") or {}).get(cell["target"], "unknown")
    counted = cell.get("prefix_tokens") or {}
    return {"state": state, "queries": counted.get("queries"), "hits": counted.get("hits")}


def _together(cells: Sequence[CellResult]) -> list[CellResult]:
    """Cells that ran at the same time: measured is only what was sent while all of their servers were under load."""
    groups: dict[tuple[float, int], list[CellResult]] = defaultdict(list)
    for cell in cells:
        groups[cell.level, cell.repeat].append(cell)
    shared = {key: _shared_ns([cell.requests for cell in group]) for key, group in groups.items()}
    return [replace(cell, requests=_within(cell.requests, shared[cell.level, cell.repeat])) for cell in cells]


def _shared_ns(group: Sequence[Requests]) -> tuple[int, int]:
    """The time that the steady windows of some cells have in common; it is empty where they have none."""
    windows = [stats.steady_window(one) or (0, 0) for one in group]
    start = max(window[0] for window in windows)
    return start, max(start, min(window[1] for window in windows))


def _within(one: Requests, shared_ns: tuple[int, int]) -> Requests:
    start, end = shared_ns
    return replace(one, measured=one.measured & (one.sent_ns >= start) & (one.sent_ns < end), shared_ns=shared_ns)


def _load_samples(path: Path) -> pa.Table:
    with damage_named(path), pa.ipc.open_stream(path.read_bytes()) as reader:
        return reader.read_all()


def _by_target(timeline: pa.Table, plan: JSON) -> pa.Table:
    """The monitor's samples with the servers that it knows by another name called by their targets'."""
    others = {target["server"]: target["name"] for target in plan["targets"] if target.get("server")}
    if not others:
        return timeline
    known = named = timeline["server"].cast(pa.string())
    for server, target in others.items():
        named = pc.if_else(pc.equal(known, server), target, named)
    return timeline.set_column(timeline.schema.get_field_index("server"), "server", named)


def _load_kv(folder: Path) -> dict[str, pa.Table]:
    found = {}
    for path in sorted(folder.glob("*.arrow")):
        with damage_named(path):
            found[path.stem] = kv.read(path)
    return found


def write_tables(results: Results) -> None:
    """Write all records, the whole timeline and all samples of the KV caches as Parquet."""
    _write_records(results)
    if results.timeline is not None:
        pq.write_table(results.timeline, results.folder / "timeline.parquet")
    if results.memory.caches:
        pq.write_table(cache_table(results.memory), results.folder / "kv.parquet")


def _write_records(results: Results) -> None:
    """Write all records block by block, so that no more of them than a block are in memory.

    The load test knows a target by the kind of its server; here it has the plan's name, which tells several apart.
    """
    cells = [cell for cell in results.cells if len(cell.requests)]
    if not cells:
        return
    # Stamps that ascend take little room as differences; dictionaries are for texts.
    encoding = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in ("chunk_ns", "chunk_tokens")}
    texts = [field.name for field in RECORDS_SCHEMA if pa.types.is_string(field.type)]
    options: JSON = {"use_dictionary": texts, "column_encoding": encoding, "write_statistics": False}
    with pq.ParquetWriter(results.folder / "records.parquet", RECORDS_SCHEMA, **options) as writer:
        for cell in cells:
            for table in requests.blocks(cell.requests.read(), records.SCHEMA.names):
                values = {"cell": cell.index, "level": cell.level, "repeat": cell.repeat, "target": cell.target}
                whole = {name: table[name] for name in records.SCHEMA.names}
                whole |= {
                    name: pa.repeat(pa.scalar(value, RECORDS_SCHEMA.field(name).type), table.num_rows)
                    for name, value in values.items()
                }
                writer.write_table(pa.table(whole, RECORDS_SCHEMA))


def targets(plan: JSON) -> list[str]:
    """Names of the targets in the order of the plan; the first is the baseline."""
    return [target["name"] for target in plan["targets"]]


def pairs(cells: Sequence[CellResult], first: str, second: str) -> Iterator[tuple[CellResult, CellResult]]:
    """The cells of two targets in each repeat of a level that both ran."""
    by_key = {(cell.repeat, cell.target): cell for cell in cells}
    for repeat in sorted({cell.repeat for cell in cells}):
        one, other = (by_key.get((repeat, target)) for target in (first, second))
        if one and other:
            yield one, other
