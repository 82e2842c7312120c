"""What a sample is, and the rings of fixed size that keep the recent ones."""

import logging
import math
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

STAMPS = 2
MAX_LEFT_OUT = 1000


class Instant(NamedTuple):
    """One moment on two clocks: CLOCK_MONOTONIC and wall time, both in ns."""

    time_ns: int
    wall_ns: int


Clock = Callable[[], Instant]
Cells = NDArray[np.float64]


def now() -> Instant:
    """Read both clocks of this host."""
    return Instant(time.monotonic_ns(), time.time_ns())


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
    """

    def __init__(self, capacity: int, width: int, clock: Clock = now) -> None:
        self.capacity = capacity
        self.columns: dict[Series, int] = {}
        self.left_out: set[Series] = set()
        self._width = width
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        self._cells: Cells = np.full((capacity, STAMPS + width), math.nan)
        self._stamps = self._cells.view(np.int64)
        self._bytes = self._cells.data.cast("B")
        self._row = struct.Struct(f"{STAMPS}q{width}d")

    @property
    def size_bytes(self) -> int:
        """Memory that the ring takes, full or not."""
        return self._cells.nbytes

    def column(self, series: Series) -> int | None:
        """Answer the column of a series, a new one for a new series; None when there is none left."""
        column = self.columns.get(series)
        if column is None and len(self.columns) < self._width:
            column = self.columns[series] = len(self.columns)
        elif column is None and series not in self.left_out and len(self.left_out) < MAX_LEFT_OUT:
            self.left_out.add(series)
            log.warning("%s is left out: all %d columns of its kind are taken", series, self._width)
        return column

    def put(self, values: Sequence[float]) -> None:
        """Stamp a row with the present moment and keep it; it has a value, or NaN, for each column."""
        with self._lock:
            at = self._clock()
            self._row.pack_into(self._bytes, self._count % self.capacity * self._row.size, *at, *values)
            self._count += 1

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
        views = self._views(self.find(since_ns, first, end), end)
        most = [np.fmax.reduce(view[:, STAMPS:], axis=0) for view in views if len(view)]
        return self._named(np.fmax.reduce(most).tolist()) if most else {}

    def _named(self, values: Sequence[float]) -> Readings:
        # A copy, because a sampler may add a column meanwhile.
        pairs = zip(self.columns.copy(), values, strict=False)
        return {series: value for series, value in pairs if not math.isnan(value)}

    def _views(self, first: int, end: int) -> list[Cells]:
        start, stop = first % self.capacity, end % self.capacity
        if first >= end or start < stop:
            return [self._cells[start : stop if first < end else start]]
        return [self._cells[start:], self._cells[:stop]]


class Timeline:
    """The rings by name; rows are read through `monitor.window`."""

    def __init__(self, clock: Clock = now) -> None:
        self.rings: dict[str, Ring] = {}
        self._clock = clock

    def ring(self, name: str, capacity: int, width: int) -> Ring:
        """Add a ring; its name is new."""
        ring = Ring(capacity, width, self._clock)
        # A new dict, because readers may be going through the old one.
        self.rings = self.rings | {name: ring}
        return ring

    @property
    def size_bytes(self) -> int:
        """Memory that all rings take, full or not."""
        return sum(ring.size_bytes for ring in self.rings.values())
