"""Recorded traffic: when requests came and how long they were, from the public traces of three kinds.

- Azure LLM inference, CSV (https://github.com/Azure/AzurePublicDataset): TIMESTAMP, ContextTokens, GeneratedTokens.
- BurstGPT, CSV (https://github.com/HPMLL/BurstGPT): Timestamp in seconds, Request tokens, Response tokens; the columns
  Session ID and Elapsed time of its second release are not used.
- Mooncake, JSONL (https://github.com/kvcache-ai/Mooncake): timestamp in ms, input_length, output_length, hash_ids.
"""

import csv
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from loadtest.options import Options
from loadtest.work.lines import (
    CsvLine,
    FieldError,
    LeaveOutError,
    Row,
    check_enough,
    csv_lines,
    csv_row,
    entries,
    finite,
    json_lines,
    json_row,
    open_stamp,
    whole,
)

# Tokens that one hash id of a Mooncake trace stands for.
BLOCK_TOKENS = 512


class Arrival(NamedTuple):
    """One line of a trace: seconds of the trace's own clock, and tokens."""

    seconds: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass
class Trace:
    """Requests in the order in which they came, offsets in seconds from the first, and what was left out and why."""

    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    input_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    output_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    hash_ids: list[tuple[int, ...]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def read(options: Options) -> Trace:
    """Read the file that `options.trace` names: as many lines as the run sends, all if it has no end.

    Left out and counted are BurstGPT's failures, whose output is empty, and where the lengths are sent too (workload
    trace) what does not fit into `max_context`.
    Raises ValueError with file, line and field for a bad line, and for a file that is none of the three kinds or has
    too few requests.
    """
    return _read(options, open_stamp("trace", options.trace))


@lru_cache(maxsize=1)
def _read(options: Options, _stamp: tuple[int, int]) -> Trace:
    path, trace = Path(options.trace), Trace()
    rows, parse = _kind(path, options.max_context if options.workload == "trace" else math.inf)
    for arrival in islice(entries(path, rows, parse, options.skip_bad_lines, trace.skipped), options.total):
        trace.seconds.append(arrival.seconds)
        trace.input_tokens.append(arrival.input_tokens)
        trace.output_tokens.append(arrival.output_tokens)
        if arrival.hash_ids:
            trace.hash_ids.append(arrival.hash_ids)
    check_enough(path, len(trace.seconds), options.total, trace.skipped)
    first = trace.seconds[0]
    trace.seconds = array("d", (seconds - first for seconds in trace.seconds))
    return trace


Rows = Iterator[tuple[str, CsvLine | bytes]]
Parse = Callable[[CsvLine | bytes], Arrival]


def _kind(path: Path, max_context: float) -> tuple[Rows, Parse]:
    """Tell the kind of a trace by its first line; returns its rows and what reads one."""
    with path.open("rb") as file:
        head = file.readline().decode("utf-8-sig", errors="replace").strip()
    if head.startswith("{"):
        return iter(json_lines(path)), _fitting("timestamp", _mooncake, max_context)
    columns = set(next(csv.reader([head]), []))
    for needed, read_row in CSV_KINDS.items():
        if columns >= set(needed):
            return iter(csv_lines(path)), _fitting(needed[0], read_row, max_context)
    kinds = " or ".join(",".join(needed) for needed in CSV_KINDS)
    raise ValueError(f"{path}: line 1: header: {head[:80]!r}: expected {kinds}, or JSON lines of a Mooncake trace")


def _fitting(time_field: str, read_row: Callable[[Row], Arrival], max_context: float) -> Parse:
    """Let pass what can be sent; an arrival before the last one is a bad line."""
    last = float("-inf")

    def parse(raw: CsvLine | bytes) -> Arrival:
        nonlocal last
        arrival = read_row(json_row(raw) if isinstance(raw, bytes) else csv_row(raw))
        if arrival.seconds < last:
            raise FieldError(time_field, arrival.seconds, f"a time in seconds not before that of a line above, {last}")
        last = arrival.seconds
        if arrival.input_tokens + arrival.output_tokens > max_context:
            raise LeaveOutError(f"more than max_context ({max_context} tokens)")
        return arrival

    return parse


def _azure(row: Row) -> Arrival:
    value = row.get("TIMESTAMP")
    try:
        time = datetime.fromisoformat(str(value))
        # The trace of 2023 names no time zone.
        seconds = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise FieldError("TIMESTAMP", value, "a time such as 2023-11-16 18:15:46.6805900") from None
    return Arrival(seconds, whole(row, "ContextTokens", 1), whole(row, "GeneratedTokens", 1))


def _burstgpt(row: Row) -> Arrival:
    seconds, prompt = finite(row, "Timestamp"), whole(row, "Request tokens")
    output = whole(row, "Response tokens")
    if not prompt or not output:
        raise LeaveOutError("failed when it was recorded")
    return Arrival(seconds, prompt, output)


def _mooncake(row: Row) -> Arrival:
    prompt, output = whole(row, "input_length", 1), whole(row, "output_length", 1)
    blocks = -(-prompt // BLOCK_TOKENS)
    ids = row.get("hash_ids")
    if not isinstance(ids, list) or len(ids) != blocks or not all(type(one) is int and one >= 0 for one in ids):
        expected = f"a list of {blocks} whole numbers, one for each {BLOCK_TOKENS} tokens of input_length"
        raise FieldError("hash_ids", ids, expected)
    return Arrival(finite(row, "timestamp") / 1000, prompt, output, tuple(ids))


CSV_KINDS: dict[tuple[str, ...], Callable[[Row], Arrival]] = {
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): _azure,
    ("Timestamp", "Request tokens", "Response tokens"): _burstgpt,
}
