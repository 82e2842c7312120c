"""The search for the highest rate at which a server meets its limits. It is pure: who asks runs the cells.

A rate counts as met only while no lower rate was missed, so that answers which contradict each other, as near the
boundary they do, give the lower rate and never a longer search.
"""

from dataclasses import dataclass
from math import sqrt

GROWTH = 2.0


@dataclass(frozen=True)
class Found:
    """The highest rate that met the limits and the lowest that did not, None where there is none.

    `above` is a rate over that one that met them too, which does not count. The two are `exact` when they are no
    further apart than `precision`.
    """

    rate: float | None
    missed: float | None
    above: float | None
    exact: bool
    precision: float


class Search:
    """Doubles or halves the rate until one is met and one is missed, then halves the gap on a logarithmic scale.

    `start` is the first rate in requests per second; the search ends when the gap is at most `precision` of the rate
    that was met, or after `max_cells`. From a start within 128 times of the capacity 12 cells are enough for 5 %.
    Raises ValueError for a start or a precision that is not above 0, and for no cells.
    """

    def __init__(self, start: float, max_cells: int = 12, precision: float = 0.05):
        for name, value in (("start", start), ("max_cells", max_cells), ("precision", precision)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: {value!r}: expected a number above 0")
        self._start = start
        self._max_cells = max_cells
        self._precision = precision
        self._told: list[tuple[float, bool]] = []

    def tell(self, rate: float, met: bool) -> None:
        """Take the outcome of a cell; its rate need not be the one that was asked for."""
        self._told.append((rate, met))

    def next_rate(self) -> float | None:
        """The rate of the next cell, in requests per second; None when the search is over."""
        if len(self._told) >= self._max_cells or self._is_exact():
            return None
        met, missed = self._met(), self._missed()
        if met and missed:
            return sqrt(met * missed)
        if met:
            return met * GROWTH
        return missed / GROWTH if missed else self._start

    @property
    def result(self) -> Found:
        """What the search has found so far."""
        missed = self._missed()
        above = max((rate for rate, met in self._told if met and missed and rate > missed), default=None)
        return Found(self._met(), missed, above, self._is_exact(), self._precision)

    def _missed(self) -> float | None:
        return min((rate for rate, met in self._told if not met), default=None)

    def _met(self) -> float | None:
        missed = self._missed() or float("inf")
        return max((rate for rate, met in self._told if met and rate < missed), default=None)

    def _is_exact(self) -> bool:
        met, missed = self._met(), self._missed()
        return bool(met and missed and missed <= met * (1 + self._precision))
