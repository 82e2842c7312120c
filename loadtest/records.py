"""The record of one request: what every table, chart and verdict is computed from.

Times are CLOCK_MONOTONIC in nanoseconds. A failed request is a record with an `error`, never a zero, never a lost row.
A file of records is an Arrow IPC stream, which grows batch by batch and reads back when it was cut off.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa

ErrorKind = Literal[
    "connect", "timeout", "http_4xx", "http_5xx", "reset", "truncated", "sse_error", "malformed", "cancelled"
]
# Where the number of output tokens comes from: the server's usage, the token ids in the chunks, or, as a fallback,
# max_tokens when the server says that the output ended there.
TokenSource = Literal["usage", "token_ids", "max_tokens", "unknown"]
# What stamped the chunks: the kernel when they arrived, or this process when it read them.
StampSource = Literal["kernel", "user"]


# Only `measured` requests enter statistics; the others bring the load up and keep it up until the measured have ended.
Phase = Literal["warmup", "measured", "drain"]

SCHEMA = pa.schema(
    [("index", pa.int64()), ("target", pa.string()), ("phase", pa.string()), ("worker", pa.int64())]
    + [(name, pa.int64()) for name in ("max_tokens", "scheduled_ns", "sent_ns", "end_ns", "status", "retries")]
    + [(name, pa.int64()) for name in ("prompt_tokens", "output_tokens")]
    + [(name, pa.string()) for name in ("token_source", "finish_reason", "stamp_source")]
    + [(name, pa.list_(pa.int64())) for name in ("chunk_ns", "chunk_tokens")]
    + [(name, pa.string()) for name in ("error", "error_detail")]
)
# What a stream of Arrow's begins with; after it a file that ends too soon was cut off, and is not damaged.
STREAM_BEGINS = b"\xff\xff\xff\xff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request as the client saw it.

    `index` is its place in the request list, so that records of two servers pair up. `scheduled_ns` is None in a
    closed loop. `sent_ns` is that of the first try when there were `retries`. `chunk_ns` holds a stamp per output
    chunk, `chunk_tokens` the tokens in each (empty when the server does not say).
    """

    index: int
    target: str
    phase: Phase
    max_tokens: int
    sent_ns: int
    end_ns: int
    worker: int = 0
    retries: int = 0
    scheduled_ns: int | None = None
    status: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    token_source: TokenSource = "unknown"
    stamp_source: StampSource = "user"
    finish_reason: str | None = None
    chunk_ns: list[int] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    error: ErrorKind | None = None
    error_detail: str | None = None

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token: first chunk with an output token minus sent time."""
        return None if self.error or not self.chunk_ns else (self.chunk_ns[0] - self.sent_ns) / 1e9

    @property
    def e2e_seconds(self) -> float | None:
        """End-to-end latency: last output token minus sent time."""
        return None if self.error or not self.chunk_ns else (self.chunk_ns[-1] - self.sent_ns) / 1e9

    @property
    def tpot_seconds(self) -> float | None:
        """Time per output token after the first: (E2E - TTFT) / (n - 1); None for fewer than two tokens."""
        if self.error or not self.chunk_ns or not self.output_tokens or self.output_tokens < 2:
            return None
        return (self.chunk_ns[-1] - self.chunk_ns[0]) / 1e9 / (self.output_tokens - 1)

    @property
    def late_seconds(self) -> float | None:
        """Send lateness: sent minus scheduled time; None in a closed loop."""
        return None if self.scheduled_ns is None else (self.sent_ns - self.scheduled_ns) / 1e9


FIELDS = [one.name for one in fields(Record)]


def moved(record: Record, offset_ns: int) -> Record:
    """The record with all its times on a clock that is `offset_ns` ahead of the one that stamped it."""
    return replace(
        record,
        scheduled_ns=None if record.scheduled_ns is None else record.scheduled_ns + offset_ns,
        sent_ns=record.sent_ns + offset_ns,
        end_ns=record.end_ns + offset_ns,
        chunk_ns=[stamp + offset_ns for stamp in record.chunk_ns],
    )


def number_in(batch: bytes) -> int:
    """Number of records in one batch of a stream."""
    rows: int = pa.ipc.read_record_batch(pa.py_buffer(batch), SCHEMA).num_rows
    return rows


def to_bytes(records: Iterable[Record], offset_ns: int = 0) -> bytes:
    """One batch of a stream, with times by a clock that is `offset_ns` ahead of the one that stamped the records."""
    rows = [moved(record, offset_ns) for record in records] if offset_ns else list(records)
    columns = [pa.array([getattr(row, name) for row in rows], SCHEMA.field(name).type) for name in SCHEMA.names]
    return bytes(pa.record_batch(columns, SCHEMA).serialize())


class RecordFile:
    """A new file of records that grows batch by batch; raises FileExistsError, and OSError when the disk is full."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb", buffering=0)
        self.write(bytes(SCHEMA.serialize()))

    def write(self, batch: bytes) -> None:
        """Append a batch."""
        left = memoryview(batch)
        while left:  # a write may take a part only
            left = left[self._file.write(left) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def batches(path: Path, mapped: bool = True) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file; one that was cut short by a kill is left out. Raises ValueError for another file.

    A file that is `mapped` is not copied, but all that was read of it stays in memory until the end.
    """
    with pa.memory_map(str(path)) if mapped else pa.OSFile(str(path)) as file:
        if not file.size():
            return
        if file.read_buffer(len(STREAM_BEGINS)).to_pybytes() != STREAM_BEGINS[: file.size()]:
            raise ValueError("not a file of records")
        file.seek(0)
        try:
            reader = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:  # killed inside the schema
            return
        if reader.schema != SCHEMA:
            raise ValueError(f"other columns than a record has: {', '.join(reader.schema.names)}")
        while True:
            try:
                yield reader.read_next_batch()
            except (StopIteration, pa.ArrowInvalid, OSError):
                return


def count(path: Path) -> int:
    """Number of records in a file."""
    return sum(batch.num_rows for batch in batches(path))


def count_by_target(path: Path) -> Counter[str]:
    """Number of records of each target in a file."""
    found: Counter[str] = Counter()
    for batch in batches(path, mapped=False):
        found.update(batch.column("target").to_pylist())
    return found


def read(path: Path) -> Iterator[Record]:
    """Yield the records of a file."""
    for batch in batches(path):
        for row in zip(*(batch.column(name).to_pylist() for name in FIELDS), strict=True):
            yield Record(**dict(zip(FIELDS, row, strict=True)))
