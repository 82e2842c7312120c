"""Result folders made by hand: what a run leaves, with figures that are easy to work out."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from experiment.plan.plan import Cell, Plan
from experiment.run import kv
from loadtest.keeper import summarize
from loadtest.records import Phase, Record, RecordFile, read, to_bytes
from monitor.timeline import Series
from monitor.window import SCHEMA

SECOND = 10**9
# What the load generator measured of itself, and its own verdict.
PROCESS: dict[str, Any] = {
    "worker": 0,
    "goes_first": True,
    "cpu_share": 0.1,
    "loop_lag_p99_seconds": 0.001,
    "send_lateness_p99_seconds": None,
    "chunks_per_second_max": 100,
    "shared_stamp_share": 0.0,
    "merged_chunk_share": 0.0,
    "requests_ended": {},
    "skipped_lines": {},
}
CLIENT = {"complete": True, **summarize([PROCESS], lost=[], calibrated=None)}
ENVIRONMENT = {
    "python": "3.11.0",
    "system": "Linux",
    "processor": "a processor",
    "cores": 2,
    "memory_bytes": 2**33,
    "packages": {"torch": "2.0"},
    "gpus": [],
    "gpu_reason": "none here",
}
PART = {"began": "2026-01-01T00:00:00Z", "boot_id": "a", "wall_minus_monotonic_ns": 0, "plan_sha256": "?"}
SPEEDS = {"hf": 1.0, "vllm": 2.0}
Speed = Callable[[Cell], float]


def make_plan(**options: Any) -> Plan:
    """A small plan; `concurrency` is its levels by another name."""
    small: dict[str, Any] = {"levels": [2], "requests_per_user": 1, "min_requests": 4, "repeats": 2}
    if "concurrency" in options:
        options["levels"] = options.pop("concurrency")
    return Plan(**(small | options))


def user_of(plan: Plan, target: str) -> str:
    """The load test's name for a target, which its records bear."""
    return "hf" if next(one for one in plan.targets if one.name == target).kind == "hf" else "vllm"


def make_record(**changes: Any) -> Record:
    fields: dict[str, Any] = {"index": 0, "target": "hf", "phase": "measured", "max_tokens": 4}
    fields |= {
        "sent_ns": 0,
        "end_ns": SECOND,
        "status": 200,
        "prompt_tokens": 7,
        "output_tokens": 4,
        "token_source": "usage",
    }
    return Record(**fields | changes)


def cell_records(plan: Plan, cell: Cell, speed: float = 1.0) -> list[Record]:
    """Requests of four tokens: one is sent each step of 1/speed s, and each takes as many steps as are in flight."""
    step = round(SECOND / speed)
    took = round(cell.level * step)
    first, measured = plan.warmup(cell.level), plan.measured(cell.level)

    def one(index: int) -> Record:
        phase: Phase = "warmup" if index < first else "measured" if index < first + measured else "drain"
        sent = cell.index * 1000 * SECOND + index * step
        stamps = [sent + took * part // 4 for part in (1, 2, 3, 4)]
        return make_record(
            index=index,
            target=user_of(plan, cell.target),
            phase=phase,
            sent_ns=sent,
            end_ns=sent + took,
            chunk_ns=stamps,
            chunk_tokens=[1, 1, 1, 1],
        )

    return [one(index) for index in range(plan.total(cell.level))]


def write_records(path: Path, records: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    file = RecordFile(path)
    file.write(to_bytes(records))
    file.close()


def change_records(folder: Path, cell: str, change: Callable[[list[Record]], list[Record]]) -> None:
    path = folder / "cells" / cell / "records.arrow"
    write_records(path, change(list(read(path))))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def timeline(rows: Mapping[Series, Sequence[float]], step_ns: int = SECOND) -> pa.Table:
    """What the monitor answers when it has sampled each series once a step."""
    ticks = range(max(map(len, rows.values())))
    found = [
        {"time_ns": tick * step_ns, "wall_ns": tick * step_ns, "value": values[tick], **series._asdict()}
        for tick in ticks
        for series, values in rows.items()
        if tick < len(values)
    ]
    return pa.Table.from_pylist(found, SCHEMA)


def kv_row(at_ns: int, **changes: Any) -> dict[str, Any]:
    """A sample of the HF server, which holds 10 tokens of 4,096 bytes, 6 of them live."""
    row: dict[str, Any] = {"asked_ns": at_ns, "answered_ns": at_ns, "skipped": 0, "running": 1, "waiting": 0}
    row |= {"unit": "tokens", "bytes_per_token": 4096}
    row |= {"capacity": 100, "allocated": 10, "live": 6, "reserved": 3, "padding": 1, "finished": 0, "fragmentation": 0}
    return row | changes


def paged_row(at_ns: int, **changes: Any) -> dict[str, Any]:
    """A sample of vLLM, which has one block of 16 tokens in use."""
    row: dict[str, Any] = {"asked_ns": at_ns, "answered_ns": at_ns, "skipped": 0, "running": 1, "waiting": 0}
    row |= {"unit": "tokens", "bytes_per_token": 4096, "preemptions": 0}
    row |= {"capacity": 1600, "allocated": 16, "block_size": 16, "cache_dtype": "auto", "prefix_caching": False}
    return row | changes


def kv_table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), kv.SCHEMA)


def write_kv(folder: Path) -> None:
    """Ten samples a second of each cell's server."""
    for target, make in (("hf", kv_row), ("vllm", paged_row)):
        cells = [json.loads(path.read_text()) for path in sorted(folder.glob(f"cells/*-{target}-*/cell.json"))]
        times = [ns for cell in cells for ns in range(cell["start_ns"], cell["end_ns"], SECOND // 10)]
        write_timeline(folder / "kv" / f"{target}.arrow", kv_table(*(make(ns) for ns in times)))


def write_timeline(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def make_folder(
    folder: Path, plan: Plan | None = None, *, speed: Speed = lambda cell: SPEEDS[cell.target], state: str = "complete"
) -> Path:
    """The folder of a run in which nothing went wrong, and vLLM was twice as fast."""
    plan = plan or make_plan()
    for cell in plan.cells():
        own = folder / "cells" / cell.name
        records = cell_records(plan, cell, speed(cell))
        write_records(own / "records.arrow", records)
        times = {"start_ns": records[0].sent_ns, "end_ns": records[-1].end_ns, "complete": True}
        planned = {"planned_requests": plan.total(cell.level), "boot_id": "a", "prefix_cache": {cell.target: "off"}}
        (own / "cell.json").write_text(json.dumps(asdict(cell) | planned | times))
        (own / "client.json").write_text(json.dumps(CLIENT))
    reason = None if state == "complete" else "it was stopped"
    (folder / "plan.json").write_text(json.dumps(plan.model_dump()))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | {"parts": [PART]}))
    (folder / "status.json").write_text(json.dumps({"state": state, "reason": reason}))
    return folder
