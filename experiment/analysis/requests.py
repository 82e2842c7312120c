"""The requests of a cell as columns, and their chunks block by block: a million requests fit where records would not.

What is computed from chunks is reduced block by block, so that no more of them than a block are in memory at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from loadtest import records
from loadtest.records import ErrorKind, Record, TokenSource

Longs = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Batches = Callable[[], Iterable[pa.RecordBatch]]

# What stands for a number that is not known: no time, no count and no token is negative.
UNKNOWN = -1
ERRORS: tuple[str, ...] = get_args(ErrorKind)
SOURCES: tuple[str, ...] = get_args(TokenSource)
# A block ends with the batch that fills it; so many chunks take 16 MB with their tokens.
BLOCK_ROWS, BLOCK_CHUNKS = 16_384, 1_000_000
_NUMBERS = ("index", "scheduled_ns", "sent_ns", "end_ns", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Chunks:
    """The output chunks of requests that follow each other: chunk `begin[i]` to `end[i]` are those of request `i`.

    `rows` says which requests they are. `ns` and `tokens` have a value for each chunk; where the server does not say
    how many tokens a chunk holds, the tokens of the request are spread evenly.
    """

    rows: slice
    begin: Longs
    end: Longs
    ns: Longs
    tokens: Floats


@dataclass(frozen=True)
class Requests:
    """The requests of a cell, with an element for each in every column; UNKNOWN where a number is not known.

    `first_ns` and `last_ns` are the stamps of the first and the last chunk. `error` is a position in ERRORS, or UNKNOWN
    for a request that was answered, and `token_source` one in SOURCES: who counted its output tokens. `read` yields all
    record batches, each time it is called. Where several servers were under load together, `shared_ns` is the time in
    which all were; else it is None.
    """

    index: Longs
    scheduled_ns: Longs
    sent_ns: Longs
    end_ns: Longs
    prompt_tokens: Longs
    output_tokens: Longs
    first_ns: Longs
    last_ns: Longs
    measured: Flags
    error: Longs
    token_source: Longs
    read: Batches
    shared_ns: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def answered(self) -> Flags:
        """Which requests did not fail."""
        return np.asarray(self.error == UNKNOWN)

    def chunks(self) -> Iterator[Chunks]:
        """Yield the chunks of all requests, block by block."""
        row = 0
        for table in blocks(self.read(), ["chunk_ns", "chunk_tokens"]):
            rows = slice(row, row + table.num_rows)
            yield _chunks(table, rows, self.output_tokens[rows])
            row = rows.stop


def load(path: Path, shift_ns: int = 0) -> Requests:
    """Read the columns of a file of records, their times moved by `shift_ns`; raises ValueError for another file."""
    return _gather(lambda: (shifted(batch, shift_ns) for batch in records.batches(path, mapped=False)))


Table = TypeVar("Table", pa.RecordBatch, pa.Table)


def shifted(table: Table, shift_ns: int) -> Table:
    """Move all times of CLOCK_MONOTONIC in a table, those in lists too."""
    for at, name in enumerate(table.schema.names) if shift_ns else ():
        if not name.endswith("_ns") or name == "wall_ns":
            continue
        column = table.column(at)
        moved = _moved(column, shift_ns) if isinstance(column, pa.Array) else _moved_chunks(column, shift_ns)
        table = table.set_column(at, table.schema.field(at), moved)
    return table


def _moved_chunks(column: pa.ChunkedArray, shift_ns: int) -> pa.ChunkedArray:
    return pa.chunked_array([_moved(chunk, shift_ns) for chunk in column.chunks], column.type)


def _moved(array: pa.Array, shift_ns: int) -> pa.Array:
    if pa.types.is_list(array.type):
        values = pc.add(array.values, shift_ns)
        return pa.ListArray.from_arrays(array.offsets, values, mask=array.is_null() if array.null_count else None)
    return pc.add(array, shift_ns)


def of(rows: Sequence[Record]) -> Requests:
    """The columns of records that are in memory."""
    columns = [pa.array([getattr(row, one.name) for row in rows], one.type) for one in records.SCHEMA]
    return _gather(lambda: [pa.record_batch(columns, records.SCHEMA)])


def blocks(batches: Iterable[pa.RecordBatch], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Put small batches together to tables of a size that is fast to work on."""
    kept: list[pa.RecordBatch] = []
    rows = chunks = 0
    for batch in batches:
        kept.append(batch.select(columns))
        rows += batch.num_rows
        chunks += len(batch.column("chunk_ns").values)
        if rows >= BLOCK_ROWS or chunks >= BLOCK_CHUNKS:
            yield pa.Table.from_batches(kept).combine_chunks()
            kept, rows, chunks = [], 0, 0
    if kept:
        yield pa.Table.from_batches(kept).combine_chunks()


def _gather(read: Batches) -> Requests:
    parts = [_columns(table) for table in blocks(read(), records.SCHEMA.names)]
    parts = parts or [_columns(records.SCHEMA.empty_table())]
    columns: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    measured = columns.pop("measured").astype(np.bool_)
    return Requests(**columns, measured=measured, read=read)


def _columns(table: pa.Table) -> dict[str, Longs]:
    for name in ("index", "phase", "sent_ns", "end_ns", "chunk_ns", "chunk_tokens"):
        if table[name].null_count:
            raise ValueError(f"{name}: null: every record has one")
    found = {name: _numbers(table[name]) for name in _NUMBERS}
    begin, end, ns = _lists(table["chunk_ns"])
    some = end > begin
    for name, at in (("first_ns", begin), ("last_ns", end - 1)):
        found[name] = np.full(len(begin), UNKNOWN, dtype=np.int64)
        found[name][some] = ns[at[some]]
    found["measured"] = pc.equal(table["phase"], "measured").to_numpy().astype(np.int64)
    found["error"] = _numbers(pc.index_in(table["error"], value_set=pa.array(ERRORS)))
    source = pc.index_in(table["token_source"], value_set=pa.array(SOURCES))
    found["token_source"] = _numbers(pc.fill_null(source, SOURCES.index("unknown")))
    unheard = table["error"].filter(pa.array(found["error"] == UNKNOWN)).drop_null()
    if len(unheard):
        raise ValueError(f"error: {unheard[0].as_py()!r}: expected one of {', '.join(ERRORS)}")
    return found


def _numbers(column: pa.ChunkedArray) -> Longs:
    return np.asarray(pc.fill_null(column.cast(pa.int64()), UNKNOWN).to_numpy(), dtype=np.int64)


def _lists(column: pa.ChunkedArray) -> tuple[Longs, Longs, Longs]:
    """Where each list begins and ends, and the values of all."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if not len(array):
        return (np.empty(0, dtype=np.int64),) * 3
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.to_numpy()[offsets[0] : offsets[-1]]
    return offsets[:-1] - offsets[0], offsets[1:] - offsets[0], values


def _chunks(table: pa.Table, rows: slice, output_tokens: Longs) -> Chunks:
    begin, end, ns = _lists(table["chunk_ns"])
    token_begin, token_end, given = _lists(table["chunk_tokens"])
    count, told = end - begin, token_end - token_begin
    if ((told > 0) & (told != count)).any():
        raise ValueError("chunk_tokens: expected as many as chunk_ns has stamps, or none")
    if len(given) == len(ns):
        return Chunks(rows, begin, end, ns, given.astype(np.float64))
    each = np.maximum(output_tokens, 0) / np.maximum(count, 1)
    tokens = np.repeat(each, count)
    tokens[np.repeat(told > 0, count)] = given
    return Chunks(rows, begin, end, ns, tokens)
