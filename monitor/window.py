"""A window of the timeline as Arrow: batch by batch, all of it or the extremes of each step."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monitor.timeline import STAMPS, Ring, Series

SCHEMA = pa.schema(
    [
        ("time_ns", pa.int64()),
        ("wall_ns", pa.int64()),
        ("metric", pa.dictionary(pa.int32(), pa.string())),
        ("server", pa.dictionary(pa.int32(), pa.string())),
        ("gpu", pa.string()),
        ("detail", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float64()),
    ]
)
# Ticks of one ring in a batch: so few that no step of the work keeps the interpreter from the samplers for long.
BATCH_TICKS = 2048

Longs = NDArray[np.int64]


class Rows(NamedTuple):
    """Values with their moments (CLOCK_MONOTONIC and wall time, ns) and series, as positions in a list of those."""

    time_ns: Longs
    wall_ns: Longs
    series: Longs
    value: NDArray[np.float64]

    def pick(self, which: NDArray[np.bool_] | Longs) -> "Rows":
        """Answer some of the rows, by a mask or by positions."""
        return Rows._make(column[which] for column in self)


@dataclass
class Cursor:
    """How far a ring has been read: the numbers of the next row and of the end; `series` is that of each column."""

    ring: Ring
    series: Longs
    next: int
    end: int

    def settle(self) -> int:
        """Pass over rows that newer ones have overwritten; answer when the next one was stamped."""
        while True:
            self.next = max(self.next, self.ring.bounds()[0])
            time_ns = self.ring.time_ns(self.next)
            if self.next >= self.ring.bounds()[0]:
                return time_ns

    def take(self, until_ns: int) -> Rows:
        """Read on up to a moment."""
        first, self.next = self.next, self.ring.find(until_ns, self.next, self.end)
        cells = self.ring.rows(first, self.next)
        tick, column = np.nonzero(~np.isnan(cells[:, STAMPS : STAMPS + len(self.series)]))
        stamps = cells.view(np.int64)[:, :STAMPS]
        return Rows(stamps[tick, 0], stamps[tick, 1], self.series[column], cells[tick, STAMPS + column])


def stream(rings: Mapping[str, Ring], since_ns: int, until_ns: int, step_ns: int | None = None) -> Iterator[bytes]:
    """Yield the rows with since_ns <= time_ns < until_ns, oldest first, as an Arrow IPC stream, piece by piece.

    With `step_ns`, of each series and each step of that many ns only the rows of its smallest and its largest value.
    """
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in batches(rings, since_ns, until_ns, step_ns):
            writer.write_batch(batch)
            yield sink.getvalue()
            sink.seek(0)
            sink.truncate()
    yield sink.getvalue()


def table(rings: Mapping[str, Ring], since_ns: int, until_ns: int, step_ns: int | None = None) -> pa.Table:
    """Answer what `stream` yields as one table."""
    return pa.Table.from_batches(batches(rings, since_ns, until_ns, step_ns), SCHEMA)


def batches(
    rings: Mapping[str, Ring], since_ns: int, until_ns: int, step_ns: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield what `stream` does, as batches that share their dictionaries."""
    names, cursors = _open(rings, since_ns, until_ns)
    columns = _Columns(names)
    pieces = _pieces(cursors, until_ns)
    for rows in _extremes(pieces, step_ns) if step_ns else pieces:
        yield columns.batch(rows)


def thin(rows: Rows, step_ns: int) -> Rows:
    """Keep, of each series and each step, the rows of the smallest and the largest value, in the order of time.

    Thinning what was thinned before, with more rows, is as good as thinning all at once.
    """
    step = rows.time_ns // step_ns
    order = np.lexsort((rows.value, rows.series, step))
    changes = (np.diff(step[order]) != 0) | (np.diff(rows.series[order]) != 0)
    first = np.concatenate(([True], changes))[: len(order)]
    last = np.concatenate((changes, [True]))[: len(order)]
    return rows.pick(np.sort(order[first | last]))


def _open(rings: Mapping[str, Ring], since_ns: int, until_ns: int) -> tuple[list[Series], list[Cursor]]:
    positions: dict[Series, int] = {}
    cursors = []
    for ring in rings.values():
        first, end = ring.bounds()
        first = ring.find(since_ns, first, end)
        # After the bounds, so that every column of the rows is known; one that changes its series has no value in them.
        columns = sorted(ring.columns.items(), key=itemgetter(1))
        series = [positions.setdefault(series, len(positions)) for series, _ in columns]
        cursors.append(Cursor(ring, np.array(series, np.int64), first, ring.find(until_ns, first, end)))
    return list(positions), cursors


def _pieces(cursors: list[Cursor], until_ns: int) -> Iterator[Rows]:
    """Yield the rows in the order of time, of each ring at most BATCH_TICKS at once."""
    while True:
        moments = [(cursor.settle(), cursor) for cursor in cursors if cursor.next < cursor.end]
        unread = [cursor for _, cursor in moments if cursor.next < cursor.end]
        if not unread:
            return
        oldest = min(time_ns for time_ns, _ in moments)
        full = (
            cursor.ring.time_ns(cursor.next + BATCH_TICKS)
            for cursor in unread
            if cursor.next + BATCH_TICKS < cursor.end
        )
        edge = max(oldest + 1, min(full, default=until_ns))
        rows = _together(*(cursor.take(edge) for cursor in unread))
        yield rows.pick(np.argsort(rows.time_ns, kind="stable"))


def _extremes(pieces: Iterator[Rows], step_ns: int) -> Iterator[Rows]:
    """Thin pieces; what belongs to the last step of one waits for the next, which may go on with it."""
    waiting: Rows | None = None
    for piece in pieces:
        rows = _together(waiting, piece) if waiting else piece
        rows = thin(rows, step_ns)
        if len(rows.time_ns):
            open_step = rows.time_ns // step_ns == rows.time_ns[-1] // step_ns
            waiting = rows.pick(open_step)
            yield rows.pick(~open_step)
    if waiting:
        yield waiting


def _together(*pieces: Rows) -> Rows:
    return Rows._make(map(np.concatenate, zip(*pieces, strict=True)))


class _Columns:
    """Turns rows into record batches with the same dictionaries each time, as a stream of Arrow IPC wants them."""

    def __init__(self, names: list[Series]) -> None:
        self._gpu = pa.array([series.gpu for series in names], pa.string())
        self._words = [
            pa.array([getattr(series, field) for series in names], pa.string()).dictionary_encode()
            for field in ("metric", "server", "detail")
        ]

    def batch(self, rows: Rows) -> pa.RecordBatch:
        metric, server, detail = (words.take(pa.array(rows.series)) for words in self._words)
        gpu = self._gpu.take(pa.array(rows.series))
        return pa.record_batch([rows.time_ns, rows.wall_ns, metric, server, gpu, detail, rows.value], schema=SCHEMA)
