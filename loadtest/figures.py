"""What a run measured of each server, exactly, from its file of records: counts, throughput and latencies.

The file is read batch by batch: of a request a few numbers stay in memory, not its chunks. The window of throughputs is
that of the report of a comparison: from the first measured request until the load falls, or the last measured ends.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from loadtest.records import ErrorKind, batches

Longs = NDArray[np.int64]
Columns = dict[str, Longs]

UNKNOWN = -1
ERRORS = get_args(ErrorKind)
CUT_OFF = ERRORS.index("cancelled")
NUMBERS = ("max_tokens", "scheduled_ns", "sent_ns", "end_ns", "output_tokens")
COLUMNS = ["target", "phase", *NUMBERS, "error", "chunk_ns"]
BLOCK_BATCHES = 100
LATENCIES = {
    "ttft_seconds": "TTFT",
    "tpot_seconds": "TPOT",
    "e2e_seconds": "E2E",
    "response_seconds": "response time",
}
STATISTICS = ("mean", "p50", "p90", "p99")


def measure(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of each target; times in seconds, None for what there is none of.

    Each latency is of the measured requests that did not fail; a failed one counts in `requests` and `failed` alone.
    Of those that the end of the run `cut_off`, which did not fail either, the tokens that came are in the throughput.
    `short_answers`: of how many the output was not as long as asked for, although the end of text was to be ignored.
    """
    columns = _columns(path)
    windows = {target: window for target, rows in columns.items() if (window := _window(rows))}
    tokens = _tokens_inside(path, columns, windows)
    return {t: _of_target(rows, windows.get(t), tokens[t]) for t, rows in sorted(columns.items())}


def lines(targets: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The figures as text for people, with latencies in ms."""
    for name, one in targets.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in one["failed"].items())
        failed = f"{sum(one['failed'].values()):,} failed" + (f" ({kinds})" if kinds else "")
        cut_off = f", {one['cut_off']:,} cut off by the end of the run" if one["cut_off"] else ""
        yield f"{name}: {one['requests']:,} measured requests, {failed}{cut_off}"
        if one["output_throughput"] is not None:
            rates = f"{one['output_throughput']:,.1f} output tokens/s, {one['request_throughput']:,.2f} requests/s"
            yield f"  {rates} in {one['window_seconds']:.1f} s at full load"
        if known := {label: one[metric] for metric, label in LATENCIES.items() if one[metric]}:
            yield f"  {'ms':<13}" + "".join(f"{statistic:>12}" for statistic in STATISTICS)
            for label, found in known.items():
                yield f"  {label:<13}" + "".join(f"{found[statistic] * 1e3:>12,.2f}" for statistic in STATISTICS)
        if one["short_answers"]:
            yield f"  {one['short_answers']:,} answers were not as long as asked for: the server does not ignore_eos"


def _columns(path: Path) -> dict[str, Columns]:
    """Of each target's requests what the figures need; `row` is the place in the file."""
    parts: defaultdict[str, list[Columns]] = defaultdict(list)
    row = 0
    for batch in _blocks(path):
        found = _numbers_of(batch) | {"row": np.arange(row, row + batch.num_rows)}
        row += batch.num_rows
        targets = np.asarray(batch.column("target").to_pylist())
        for target in np.unique(targets).tolist():
            chosen = targets == target
            # Copies: a view would keep the whole batch in memory.
            parts[target].append({name: column[chosen] for name, column in found.items()})
    return {t: {name: np.concatenate([part[name] for part in some]) for name in some[0]} for t, some in parts.items()}


def _blocks(path: Path) -> Iterator[pa.RecordBatch]:
    """The columns that are read here, in batches of a size that is fast to work on."""
    small = batches(path, mapped=False)
    while some := [batch.select(COLUMNS) for batch in islice(small, BLOCK_BATCHES)]:
        yield from pa.Table.from_batches(some).combine_chunks().to_batches()


def _numbers_of(batch: pa.RecordBatch) -> Columns:
    found = {name: pc.fill_null(batch.column(name), UNKNOWN).to_numpy() for name in NUMBERS}
    chunks = batch.column("chunk_ns")
    begin, end = (ends.to_numpy() for ends in (chunks.offsets[:-1], chunks.offsets[1:]))
    stamps, some = chunks.values.to_numpy(), end > begin
    for name, at in (("first_ns", begin), ("last_ns", end - 1)):
        found[name] = np.full(batch.num_rows, UNKNOWN)
        found[name][some] = stamps[at[some]]
    kinds = pc.index_in(batch.column("error"), value_set=pa.array(ERRORS))
    found["error"] = pc.fill_null(kinds, UNKNOWN).to_numpy().astype(np.int64)
    found["measured"] = np.asarray(batch.column("phase").to_pylist()) == "measured"
    return found


def _window(rows: Columns) -> tuple[int, int] | None:
    measured = rows["measured"]
    if not measured.any():
        return None
    last_sent = rows["sent_ns"].max()
    after = rows["end_ns"][rows["end_ns"] > last_sent]
    falls = after.min() if len(after) else last_sent
    start, end = rows["sent_ns"][measured].min(), min(falls, rows["end_ns"][measured].max())
    return (int(start), int(end)) if end > start else None


def _tokens_inside(path: Path, columns: Mapping[str, Columns], windows: Mapping[str, tuple[int, int]]) -> Counter[str]:
    """Output tokens of each target in its window (start, end]; failed requests count as none.

    Of one that was cut off those count of which the server said how many are in each chunk.
    """
    found: Counter[str] = Counter()
    partial: dict[int, str] = {}  # those that only a look at their chunks can tell, by place in the file
    for target, (start, end) in windows.items():
        rows = columns[target]
        good = (rows["error"] == UNKNOWN) & (rows["output_tokens"] != UNKNOWN) & (rows["last_ns"] != UNKNOWN)
        whole = good & (rows["first_ns"] > start) & (rows["last_ns"] <= end)
        found[target] = int(rows["output_tokens"][whole].sum())
        some = good & ~whole | (rows["error"] == CUT_OFF) & (rows["last_ns"] != UNKNOWN)
        partly = some & (rows["first_ns"] <= end) & (rows["last_ns"] > start)
        partial |= dict.fromkeys(rows["row"][partly].tolist(), target)
    for target, stamps, tokens in _chunks(path, partial):
        start, end = windows[target]
        found[target] += tokens[(stamps > start) & (stamps <= end)].sum()
    return found


def _chunks(path: Path, wanted: Mapping[int, str]) -> Iterator[tuple[str, Longs, NDArray[np.float64]]]:
    """Target, stamps and tokens of the chunks of some requests, by place in the file.

    Where it is not known how many tokens a chunk held, those of the request are spread evenly.
    """
    places, first = iter(sorted(wanted)), 0
    place = next(places, None)
    for batch in batches(path) if place is not None else ():  # mapped: what is not wanted is not read
        while place is not None and place < first + batch.num_rows:
            row = batch.slice(place - first, 1).to_pylist()[0]
            stamps = np.array(row["chunk_ns"], dtype=np.int64)
            each = row["chunk_tokens"] or np.full(len(stamps), (row["output_tokens"] or 0) / len(stamps))
            yield wanted[place], stamps, np.asarray(each, dtype=np.float64)
            place = next(places, None)
        first += batch.num_rows


def _of_target(rows: Columns, window: tuple[int, int] | None, tokens: float) -> dict[str, Any]:
    measured, good, cut_off = rows["measured"], rows["error"] == UNKNOWN, rows["error"] == CUT_OFF
    kinds, counts = np.unique(rows["error"][measured & ~good & ~cut_off], return_counts=True)
    first, last, output = rows["first_ns"], rows["last_ns"], rows["output_tokens"]
    seconds = (window[1] - window[0]) / 1e9 if window else None
    inside = good & (last > window[0]) & (last <= window[1]) if window else np.zeros(0)
    answered = measured & good & (last != UNKNOWN)
    many, due = answered & (output >= 2), answered & (rows["scheduled_ns"] != UNKNOWN)
    return {
        "requests": int(measured.sum()),
        "failed": {ERRORS[kind]: count for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True)},
        "cut_off": int((measured & cut_off).sum()),
        "short_answers": int((measured & good & (output != UNKNOWN) & (output != rows["max_tokens"])).sum()),
        "window_seconds": seconds,
        "output_throughput": float(tokens / seconds) if seconds else None,
        "request_throughput": float(inside.sum() / seconds) if seconds else None,
        "ttft_seconds": _summary((first - rows["sent_ns"])[answered]),
        "tpot_seconds": _summary((last - first)[many] / (output[many] - 1)),
        "e2e_seconds": _summary((last - rows["sent_ns"])[answered]),
        "response_seconds": _summary((last - rows["scheduled_ns"])[due]),
    }


def _summary(ns: NDArray[Any]) -> dict[str, float] | None:
    """Mean and exact percentiles in seconds of times in ns; None when there are none."""
    if not len(ns):
        return None
    return dict(zip(STATISTICS, (np.array([ns.mean(), *np.percentile(ns, [50, 90, 99])]) / 1e9).tolist(), strict=True))
