"""The record of one request: what every table, chart and verdict is computed from.

Times are CLOCK_MONOTONIC in nanoseconds. A failed request is a record with an `error`, never a zero, never a lost row.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TextIO

ErrorKind = Literal[
    "connect", "timeout", "http_4xx", "http_5xx", "reset", "truncated", "sse_error", "malformed", "cancelled"
]
# Where the number of output tokens comes from: the server's usage, the token ids in the chunks, or, as a fallback,
# max_tokens when the server says that the output ended there.
TokenSource = Literal["usage", "token_ids", "max_tokens", "unknown"]


# Only `measured` requests enter statistics; the others bring the load up and keep it up until the measured have ended.
Phase = Literal["warmup", "measured", "drain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request as the client saw it.

    `index` is its place in the request list, so that records of two servers pair up. `scheduled_ns` is None in a
    closed loop. `chunk_ns` holds a stamp per output chunk, `chunk_tokens` the tokens in each (empty when the server
    does not say).
    """

    index: int
    target: str
    phase: Phase
    max_tokens: int
    sent_ns: int
    end_ns: int
    scheduled_ns: int | None = None
    status: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    token_source: TokenSource = "unknown"
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


class RecordWriter:
    """Appends records to a file as lines of JSON, each on disk before the next request of the same user starts."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("x", encoding="utf-8")

    def append(self, record: Record) -> None:
        """Write one record; raises OSError when the disk is full."""
        self._file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> Iterator[Record]:
    """Yield the records of a file; a last line that was cut short by a kill is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield Record(**json.loads(line))
