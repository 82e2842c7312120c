"""`python -m benchmarks.analysis`: how long `headroom report` takes for a long run, and how much memory.

The run is made up, the same one each time, with all that a real one leaves: both servers at several levels, records in
batches as the load generator writes them, the monitor's timeline and the samples of both KV caches. The report is made
by a process of its own on two cores. Its memory is the most that was resident, which counts pages of mapped files too.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from experiment.environment import describe
from experiment.plan.plan import Plan
from experiment.run import kv
from loadtest.records import SCHEMA, RecordFile

JSON = dict[str, Any]
Longs = NDArray[np.int64]

SECOND = 10**9
CORES, SAMPLES_HZ, BATCH = 2, 10, 64
PROMPT, BLOCK = 64, 16
TARGETS = {"hf": 0.004, "vllm": 0.002}  # and seconds per token
MAIN = "from experiment.cli import main; main()"
# What a GPU machine's monitor samples, in its columns.
TIMELINE = pa.schema(
    [("time_ns", pa.int64()), ("wall_ns", pa.int64())]
    + [(name, pa.dictionary(pa.int32(), pa.string())) for name in ("metric", "server")]
    + [("gpu", pa.string()), ("detail", pa.dictionary(pa.int32(), pa.string())), ("value", pa.float64())]
)
SERIES = [("gpu_memory_used_bytes", None, "0"), ("gpu_memory_reserved_bytes", None, "0")] + [
    (metric, server, gpu)
    for server in TARGETS
    for metric, gpu in (("gpu_process_memory_bytes", "0"), ("host_rss_bytes", None), ("host_pss_bytes", None))
]
CLIENT: JSON = {
    "complete": True,
    "valid": True,
    "reasons": [],
    "goes_first": True,
    "cpu_share": 0.1,
    "loop_lag_p99_seconds": 0.001,
    "send_lateness_p99_seconds": None,
}


@dataclass(frozen=True)
class Cell:
    """A cell of the run that is made up; `requests` is how many it has."""

    index: int
    target: str
    level: int
    repeat: int
    requests: int
    start_ns: int

    @property
    def path(self) -> Path:
        """Its folder in that of the run."""
        return Path("cells") / f"{self.index:02d}-{self.target}-c{self.level}-r{self.repeat}"


@dataclass(frozen=True)
class Result:
    """What the report took; the sizes are in bytes."""

    requests: int
    chunks: int
    cells: int
    records_bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    page_bytes: int


def make(folder: Path, requests: int, chunks: int, levels: Sequence[int], repeats: int) -> int:
    """Make the folder of a run of so many requests in all; returns the number of cells."""
    kinds = [(level, repeat + 1, target) for level in levels for repeat in range(repeats) for target in TARGETS]
    now = 1000 * SECOND
    cells = []
    for index, (level, repeat, target) in enumerate(kinds, 1):
        cell = Cell(index, target, level, repeat, requests // len(kinds), now)
        now = write_cell(folder / cell.path, cell, chunks) + SECOND
        cells.append((cell, now))
    write_timeline(folder, 1000 * SECOND, now)
    write_kv(folder, cells, chunks)
    plan = Plan(repeats=repeats).model_dump(mode="json")
    kept: JSON = {"targets": [{"name": name, "kind": name, "args": ""} for name in TARGETS], "arrival": "closed"}
    kept |= {"levels": list(levels), "limits": {"ttft_seconds": 0.2, "tpot_seconds": 0.01}, "attainment": 0.99}
    for name, value in (
        ("plan", plan | kept),
        ("environment", describe()),
        ("status", {"state": "complete", "reason": None}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return len(kinds)


def write_cell(folder: Path, cell: Cell, chunks: int) -> int:
    """Write the records of a cell and what is said of it; returns its end."""
    draw = np.random.default_rng([cell.level, cell.repeat, *cell.target.encode()])
    file, end = RecordFile(folder / "records.arrow"), cell.start_ns
    step = TARGETS[cell.target] * SECOND
    for first in range(0, cell.requests, BATCH):
        index = np.arange(first, min(first + BATCH, cell.requests))
        # Each of the users takes every `level`th request, and begins a little after the one before.
        sent = cell.start_ns + (index / cell.level * 1.1 * chunks * step).astype(np.int64)
        gaps = draw.gamma(20, step / 20, (len(index), chunks))
        stamps = sent[:, None] + np.cumsum(gaps, axis=1).astype(np.int64)
        file.write(bytes(batch(cell, index, sent, stamps).serialize()))
        end = max(end, int(stamps[:, -1].max()))
    file.close()
    state = asdict(cell) | {"seed": 1, "search": False, "planned_requests": cell.requests, "complete": True}
    state |= {"prefix_cache": {cell.target: "off"}}
    (folder / "cell.json").write_text(json.dumps(state | {"end_ns": end}))
    (folder / "client.json").write_text(json.dumps(CLIENT))
    return end


def batch(cell: Cell, index: Longs, sent: Longs, stamps: Longs) -> pa.RecordBatch:
    """A batch of records as the load generator writes it: one token in each chunk."""
    rows, chunks = stamps.shape
    warmup, drain = index < cell.level, index >= cell.requests - cell.level
    offsets = np.arange(0, rows * chunks + 1, chunks, dtype=np.int32)
    found: JSON = {
        "index": index,
        "sent_ns": sent,
        "end_ns": stamps[:, -1] + 1000,
        "phase": np.where(warmup, "warmup", np.where(drain, "drain", "measured")),
        "chunk_ns": pa.ListArray.from_arrays(offsets, stamps.ravel()),
        "chunk_tokens": pa.ListArray.from_arrays(offsets, np.ones(rows * chunks, dtype=np.int64)),
    }
    same = {"target": cell.target, "worker": 0, "max_tokens": chunks, "status": 200, "retries": 0}
    same |= {"prompt_tokens": PROMPT, "output_tokens": chunks, "token_source": "usage", "finish_reason": "length"}
    same |= {"stamp_source": "kernel", "scheduled_ns": None, "error": None, "error_detail": None}
    columns = [found[f.name] if f.name in found else pa.array([same[f.name]] * rows, f.type) for f in SCHEMA]
    return pa.record_batch(columns, SCHEMA)


def write_timeline(folder: Path, start: int, end: int) -> None:
    """Write what the monitor sampled from start to end, a file for each hundred seconds or so as a run does."""
    draw = np.random.default_rng(1)
    (folder / "timeline").mkdir()
    for since in range(start, end, 100 * SECOND):
        times = np.arange(since, min(since + 100 * SECOND, end), SECOND // SAMPLES_HZ)
        parts = [series(times, metric, server, gpu, draw) for metric, server, gpu in SERIES]
        table = pa.concat_tables(parts).unify_dictionaries()
        path = folder / "timeline" / f"{since:020d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TIMELINE) as writer:
            writer.write_table(table)


def series(times: Longs, metric: str, server: str | None, gpu: str | None, draw: np.random.Generator) -> pa.Table:
    """Samples of one metric of a server or a GPU."""
    texts = {"metric": metric, "server": server, "gpu": gpu, "detail": None}
    columns = {"time_ns": times, "wall_ns": times, "value": draw.uniform(2**30, 2**31, len(times))}
    columns |= {name: pa.array([text] * len(times), TIMELINE.field(name).type) for name, text in texts.items()}
    return pa.table([columns[name] for name in TIMELINE.names], TIMELINE)


def write_kv(folder: Path, cells: Sequence[tuple[Cell, int]], chunks: int) -> None:
    """Write the samples of both KV caches: each server's while it was under load."""
    (folder / "kv").mkdir()
    for target in TARGETS:
        with pa.OSFile(str(folder / "kv" / f"{target}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, kv.SCHEMA) as to:
            for cell, end in cells:
                if cell.target == target:
                    to.write_batch(kv_batch(cell, np.arange(cell.start_ns, end, kv.LOADED_NS), chunks))


def kv_batch(cell: Cell, times: Longs, chunks: int) -> pa.RecordBatch:
    """Samples of a server that holds a half of each output, in blocks where it is vLLM."""
    live, longest = cell.level * (PROMPT + chunks // 2), cell.level * (PROMPT + chunks)
    blocks = -(-live // (BLOCK * cell.level)) * BLOCK * cell.level
    row: JSON = {"skipped": 0, "running": cell.level, "waiting": 0, "unit": "tokens", "bytes_per_token": 4096}
    row |= {"capacity": 2**20}
    if cell.target == "hf":
        row |= {"allocated": longest, "live": live, "reserved": longest - live, "padding": 0, "finished": 0}
        row |= {"fragmentation": 0}
    else:
        row |= {"allocated": blocks, "preemptions": 0, "block_size": BLOCK, "prefix_caching": False}
    given = {"asked_ns": times, "answered_ns": times + 1_000_000}
    columns = [
        given[f.name] if f.name in given else pa.array([row.get(f.name)] * len(times), f.type) for f in kv.SCHEMA
    ]
    return pa.record_batch(columns, kv.SCHEMA)


def measure(folder: Path, requests: int, chunks: int, cells: int) -> Result:
    """Make the report in a process of its own; raises RuntimeError when that fails."""
    started = time.monotonic()
    # A new program, so that nothing of this one counts as its memory.
    command = [sys.executable, "-c", MAIN, "report", str(folder)]
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=quiet)
    _, status, used = os.wait4(child, 0)
    seconds = time.monotonic() - started
    if status:
        raise RuntimeError(f"headroom report {folder}: exit code {os.waitstatus_to_exitcode(status)}")
    written = sum(path.stat().st_size for path in folder.glob("cells/*/records.arrow"))
    page = (folder / "report.html").stat().st_size
    cpu = used.ru_utime + used.ru_stime
    return Result(requests, chunks, cells, written, seconds, cpu, used.ru_maxrss * 1024, page)


def line(result: Result) -> str:
    """A row of the table."""
    return (
        f"{result.requests:>10,}{result.chunks:>8}{result.cells:>7}{result.records_bytes / 2**30:>13.2f}"
        f"{result.seconds:>9.1f}{result.cpu_seconds:>9.1f}{result.peak_bytes / 2**30:>10.2f}"
        f"{result.page_bytes / 2**20:>10.2f}"
    )


def beyond(result: Result, max_seconds: float, max_gb: float) -> Iterator[str]:
    """What of a report is over its limit, in words."""
    if result.seconds > max_seconds:
        yield f"{result.requests:,} requests took {result.seconds:.1f} s: at most {max_seconds:g} (--max-seconds)"
    if result.peak_bytes > max_gb * 1e9:
        yield f"{result.requests:,} requests took {result.peak_bytes / 1e9:.2f} GB: at most {max_gb:g} (--max-gb)"


def main() -> int:
    """Run the benchmark; 1 when the report failed, or a report took longer or more memory than it may."""
    parser = argparse.ArgumentParser(prog="benchmarks.analysis", description=(__doc__ or "").partition("\n")[0])
    numbers: Callable[[str], list[int]] = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--requests", type=numbers, default="1000000", metavar="N,...", help="requests of each run")
    parser.add_argument("--chunks", type=int, default=200, metavar="N", help="chunks of a request")
    parser.add_argument("--levels", type=numbers, default="16,64,256", metavar="N,...", help="requests in flight")
    parser.add_argument("--repeats", type=int, default=4, metavar="N", help="repeats of each level")
    parser.add_argument("--max-seconds", type=float, default=60, metavar="S", help="a report takes at most so long")
    parser.add_argument("--max-gb", type=float, default=2, metavar="GB", help="and at most so much memory, in 10^9 B")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to keep the runs; default: nowhere")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the figures as JSON")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    results: list[Result] = []
    print("  requests  chunks  cells  records GiB  seconds    CPU s  peak GiB  page MiB")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for requests in given.requests:
            folder = Path(name) / f"{requests}"
            cells = make(folder, requests, given.chunks, given.levels, given.repeats)
            try:
                results.append(measure(folder, requests, given.chunks, cells))
            except RuntimeError as error:
                print(f"benchmarks.analysis: {error}", file=sys.stderr)
                return 1
            print(line(results[-1]), flush=True)
    if given.out:
        found = describe() | {"results": [asdict(result) for result in results]}
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    over = [told for result in results for told in beyond(result, given.max_seconds, given.max_gb)]
    for told in over:
        print(f"benchmarks.analysis: {told}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
