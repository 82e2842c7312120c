"""What a sample is, and the rings of fixed size that keep the recent ones."""

import logging
import math
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

STAMPS = 2
# For how long a value holds: then it is told no more, and a source that has no newer one is not up.
STALE_NS = 5_000_000_000
# Blocks of rows in a ring whose maxima are kept: each is of two seconds when the ring is of 30 minutes, at any rate.
BLOCKS = 1024
# Series that are remembered as left out, and lines that are logged about them.
MAX_LEFT_OUT, MAX_LINES = 1000, 20


Cells = NDArray[np.float64]


@dataclass(frozen=True)
class Clocks:
    """The clocks that sampling goes by, both in ns: CLOCK_MONOTONIC, and wall time to tell people."""

    time_ns: Callable[[], int] = time.monotonic_ns
    wall_ns: Callable[[], int] = time.time_ns


CLOCKS = Clocks()


class Series(NamedTuple):
    """What a value measures; `gpu` is "0", or "0/1" for MIG device 1 of GPU 0; None is what does not apply."""

    metric: str
    server: str | None = None
    gpu: str | None = None
    detail: str | None = None


Readings = dict[Series, float]


class Ring:
    """The last `capacity` ticks of one source and tier, each of `width` values, in memory that is taken at once.

    A row is two stamps and a value for each column, NaN where there is none. One lock is held for the microseconds of
    stamping and writing a row, and by readers only to ask how many there are: once a reader has seen a moment, nothing
    older appears later, and no reader holds up a sampler.

    `stale_ns` is for how long a row holds. A column whose values have all been overwritten is given to the next new
    series, so that servers may come and go.
    """

    def __init__(self, capacity: int, width: int, clocks: Clocks = CLOCKS, stale_ns: int = STALE_NS) -> None:
        self.capacity = capacity
        self.stale_ns = stale_ns
        # Never changed in place, because readers may be going through it.
        self.columns: dict[Series, int] = {}
        # When each series that found no column was last left out (CLOCK_MONOTONIC, ns), the latest last.
        self.left_out: dict[Series, int] = {}
        self._width = width
        self._time_ns, self._wall_ns = clocks.time_ns, clocks.wall_ns
        self._lock = threading.Lock()
        self._count = 0
        self._cells: Cells = np.full((capacity, STAMPS + width), math.nan)
        self._stamps = self._cells.view(np.int64)
        self._bytes = self._cells.data.cast("B")
        row = struct.Struct(f"{STAMPS}q{width}d")
        self._pack, self._row_size = row.pack_into, row.size
        # The maxima of each block of rows that is full, with one block to spare for those that are read meanwhile.
        self.block = -(-capacity // BLOCKS)
        self._maxima: Cells = np.full((-(-capacity // self.block) + 1, width), math.nan)
        self._blocks = 0
        # By column, the number of rows when it was given to its series; infinite for those that are not given again.
        self._given = [0.0] * width
        self._searched = 0
        self._lines = 0

    @property
    def size_bytes(self) -> int:
        """Memory that the ring takes, full or not."""
        return self._cells.nbytes + self._maxima.nbytes

    def column(self, series: Series) -> int | None:
        """Answer the column of a series, one that is free for a new series; None when there is none."""
        column = self.columns.get(series)
        if column is not None:
            return column
        column = len(self.columns) if len(self.columns) < self._width else self._free()
        if column is None:
            self._leave_out(series)
            return None
        self._given[column] = self._count
        self.left_out.pop(series, None)
        self.columns = {other: taken for other, taken in self.columns.items() if taken != column} | {series: column}
        return column

    def keep(self, series: Series) -> int:
        """Answer the column of a series that no other will be given; raises ValueError when there is none left."""
        column = self.column(series)
        if column is None:
            raise ValueError(f"{series}: all {self._width} columns are taken")
        self._given[column] = math.inf
        return column

    def _free(self) -> int | None:
        """Find a column that was given before the oldest row and has no value in any; at most once in each block."""
        if self._count < self._searched + self.block:
            return None
        self._searched = self._count
        first, end = self.bounds()
        empty = np.isnan(self._most(first, end)) & (np.array(self._given) < first)
        return int(empty.argmax()) if empty.any() else None

    def _leave_out(self, series: Series) -> None:
        if self.left_out.pop(series, None) is None and self._lines < MAX_LINES:
            self._lines += 1
            last = "; no more is said of it" if self._lines == MAX_LINES else ""
            log.warning("%s is left out: all %d columns of its kind are taken%s", series, self._width, last)
        self.left_out[series] = self._time_ns()
        if len(self.left_out) > MAX_LEFT_OUT:
            del self.left_out[next(iter(self.left_out))]

    def put(self, values: Sequence[float]) -> None:
        """Stamp a row with the present moment and keep it; it has a value, or NaN, for each column."""
        with self._lock:
            count = self._count
            at = count % self.capacity * self._row_size
            self._pack(self._bytes, at, self._time_ns(), self._wall_ns(), *values)
            self._count = count = count + 1
        if count % self.block == 0:
            block = count // self.block - 1
            self._maxima[block % len(self._maxima)] = self._most_of_rows(count - self.block, count)
            self._blocks = block + 1

    def append(self, readings: Mapping[Series, float]) -> None:
        """Keep readings as a row; series that find no column are left out."""
        row = [math.nan] * self._width
        for series, value in readings.items():
            column = self.column(series)
            if column is not None:
                row[column] = value
        self.put(row)

    def clear(self) -> None:
        """Say from now on that nothing is known, until the next row."""
        self.put([math.nan] * self._width)

    def bounds(self) -> tuple[int, int]:
        """Answer the numbers of the oldest row kept and of the next to come; rows are numbered from the start."""
        with self._lock:
            return max(0, self._count - self.capacity), self._count

    def time_ns(self, number: int) -> int:
        """Answer when a row was stamped (CLOCK_MONOTONIC)."""
        return int(self._stamps[number % self.capacity, 0])

    def find(self, time_ns: int, first: int, end: int) -> int:
        """Answer the number of the first row, of those from `first` up to `end`, that is not before a moment."""
        return first + bisect_left(range(first, end), time_ns, key=self.time_ns)

    def rows(self, first: int, end: int) -> Cells:
        """Copy rows; those that newer ones have overwritten meanwhile are missing from the front."""
        copy = np.concatenate(self._views(first, end))
        return copy[max(0, self.bounds()[0] - first) :]

    def latest(self, since_ns: int = 0) -> Readings:
        """Answer the values of the newest row; empty when it is from before `since_ns`."""
        with self._lock:
            if not self._count or self.time_ns(self._count - 1) < since_ns:
                return {}
            values = self._cells[(self._count - 1) % self.capacity, STAMPS:].tolist()
        return self._named(values)

    def peaks(self, since_ns: int) -> Readings:
        """Answer the largest value of each series since a moment."""
        first, end = self.bounds()
        return self._named(self._most(self.find(since_ns, first, end), end).tolist())

    def _most(self, first: int, end: int) -> Cells:
        """Answer the largest value of each column in some rows: of whole blocks from what is kept of them."""
        begin, stop = -(-first // self.block), min(self._blocks, end // self.block)
        if begin >= stop:
            return self._most_of_rows(first, end)
        blocks = self._maxima[np.arange(begin, stop) % len(self._maxima)]
        edges = self._most_of_rows(first, begin * self.block), self._most_of_rows(stop * self.block, end)
        most: Cells = np.fmax.reduce(np.vstack((*edges, blocks)), axis=0)
        return most

    def _most_of_rows(self, first: int, end: int) -> Cells:
        most = np.full(self._width, math.nan)
        for view in self._views(first, end):
            most = np.fmax(most, np.fmax.reduce(view[:, STAMPS:], axis=0, initial=math.nan))
        return most

    def _named(self, values: Sequence[float]) -> Readings:
        pairs = ((series, values[column]) for series, column in self.columns.items())
        return {series: value for series, value in pairs if not math.isnan(value)}

    def _views(self, first: int, end: int) -> list[Cells]:
        start, stop = first % self.capacity, end % self.capacity
        if first >= end or start < stop:
            return [self._cells[start : stop if first < end else start]]
        return [self._cells[start:], self._cells[:stop]]


class Timeline:
    """The rings by name; rows are read through `monitor.window`."""

    def __init__(self, clocks: Clocks = CLOCKS) -> None:
        self.rings: dict[str, Ring] = {}
        self._clocks = clocks

    def ring(self, name: str, capacity: int, width: int, stale_ns: int = STALE_NS) -> Ring:
        """Add a ring; its name is new."""
        ring = Ring(capacity, width, self._clocks, stale_ns)
        # A new dict, because readers may be going through the old one.
        self.rings = self.rings | {name: ring}
        return ring

    def left_out(self, since_ns: int = 0) -> int:
        """Answer how many series have found no column since a moment (CLOCK_MONOTONIC)."""
        moments = (moment for ring in self.rings.values() for moment in ring.left_out.copy().values())
        return sum(moment >= since_ns for moment in moments)

    @property
    def size_bytes(self) -> int:
        """Memory that all rings take, full or not."""
        return sum(ring.size_bytes for ring in self.rings.values())
