"""What a sample is, and the bounded memory that keeps the recent ones."""

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("time_ns", pa.int64()),
        ("wall_ns", pa.int64()),
        ("metric", pa.dictionary(pa.int32(), pa.string())),
        ("server", pa.dictionary(pa.int32(), pa.string())),
        ("gpu", pa.int16()),
        ("value", pa.float64()),
    ]
)


class Instant(NamedTuple):
    """One moment on two clocks: CLOCK_MONOTONIC and wall time, both in ns."""

    time_ns: int
    wall_ns: int


Clock = Callable[[], Instant]


def now() -> Instant:
    """Read both clocks of this host."""
    return Instant(time.monotonic_ns(), time.time_ns())


class Series(NamedTuple):
    """What a value measures; `server` is None for values of a device, `gpu` is None for values of the host."""

    metric: str
    server: str | None = None
    gpu: int | None = None


Readings = dict[Series, float]


@dataclass(frozen=True, slots=True)
class Tick:
    """The readings of one sampler at one moment, as positions in the timeline's list of series and their values."""

    at: Instant
    series: "array[int]"
    values: "array[float]"


class Timeline:
    """The recent ticks of every sampler, each in a ring of its own.

    Ticks are stamped here, under one lock: once a reader has seen a moment, nothing older appears later.
    """

    def __init__(self, ticks_per_sampler: int, clock: Clock = now) -> None:
        self._clock = clock
        self._capacity = ticks_per_sampler
        self._lock = threading.Lock()
        self._positions: dict[Series, int] = {}
        self._rings: dict[str, deque[Tick]] = {}

    def append(self, sampler: str, readings: Readings) -> None:
        """Stamp the readings with the present moment and keep them; the sampler's oldest tick makes room."""
        with self._lock:
            positions = (self._positions.setdefault(series, len(self._positions)) for series in readings)
            tick = Tick(self._clock(), array("I", positions), array("d", readings.values()))
            self._rings.setdefault(sampler, deque(maxlen=self._capacity)).append(tick)

    def latest(self) -> dict[str, tuple[Instant, Readings]]:
        """Answer the newest tick of each sampler."""
        with self._lock:
            names = list(self._positions)
            newest = {sampler: ring[-1] for sampler, ring in self._rings.items()}
        return {
            sampler: (tick.at, {names[i]: value for i, value in zip(tick.series, tick.values, strict=True)})
            for sampler, tick in newest.items()
        }

    def window(self, since_ns: int, until_ns: int) -> pa.Table:
        """Answer the rows with since_ns <= time_ns < until_ns, oldest first, in the columns of SCHEMA."""
        with self._lock:
            names = list(self._positions)
            ticks = [tick for ring in self._rings.values() for tick in ring]
        inside = (tick for tick in ticks if since_ns <= tick.at.time_ns < until_ns)
        return _table(sorted(inside, key=attrgetter("at")), names)


def _table(ticks: list[Tick], names: list[Series]) -> pa.Table:
    rows_per_tick = [len(tick.values) for tick in ticks]
    positions = pa.array(np.frombuffer(b"".join(tick.series for tick in ticks), dtype=np.uintc))
    columns = [
        np.repeat(np.array([tick.at.time_ns for tick in ticks], dtype=np.int64), rows_per_tick),
        np.repeat(np.array([tick.at.wall_ns for tick in ticks], dtype=np.int64), rows_per_tick),
        _words(series.metric for series in names).take(positions),
        _words(series.server for series in names).take(positions),
        pa.array([series.gpu for series in names], pa.int16()).take(positions),
        np.frombuffer(b"".join(tick.values for tick in ticks), dtype=np.float64),
    ]
    return pa.table(columns, schema=SCHEMA)


def _words(words: Iterable[str | None]) -> pa.DictionaryArray:
    return pa.array(list(words), pa.string()).dictionary_encode()
