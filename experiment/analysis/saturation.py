"""The search for the highest rate at which a server meets its limits. It is pure: who asks runs the cells.

A rate counts as met only while no lower rate was missed, so that answers which contradict each other, as near the
boundary they do, give the lower rate and never a longer search.
"""

from math import sqrt

GROWTH = 2.0


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
    def result(self) -> tuple[float | None, str]:
        """The highest rate that met the limits, None when no rate did, and how sure that is."""
        met, missed = self._met(), self._missed()
        if not self._told:
            return None, "no rate was tried"
        if not met:
            return None, f"no rate met the limits; the lowest tried was {missed:g} requests/s"
        if not missed:
            return met, f"every rate tried met the limits; the highest tried was {met:g} requests/s"
        how = "" if self._is_exact() else f", further apart than {self._precision:.0%}: the search ended early"
        against = [rate for rate, good in self._told if good and rate > missed]
        noise = f"; {max(against):g} met them too, which does not count above a rate that did not" if against else ""
        return met, f"{met:g} requests/s met the limits and {missed:g} did not{how}{noise}"

    def _missed(self) -> float | None:
        return min((rate for rate, met in self._told if not met), default=None)

    def _met(self) -> float | None:
        missed = self._missed() or float("inf")
        return max((rate for rate, met in self._told if met and rate < missed), default=None)

    def _is_exact(self) -> bool:
        met, missed = self._met(), self._missed()
        return bool(met and missed and missed <= met * (1 + self._precision))
