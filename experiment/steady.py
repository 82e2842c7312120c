"""Whether a cell was steady: figures of its window, and the trend of its throughput and of its TTFT inside it.

The window is cut into parts that are each at least as long as a request takes, so that neighbours are nearly
independent, and a line is fitted to the means of the parts. A cell has drifted where the line rises or falls by more
than CHANGE of the mean over the window and the t-test of its slope says that this is not chance. Small trends, which
a long enough cell always shows, do not count; in a cell that is too short for PARTS parts nothing is said.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from experiment import stats
from experiment.requests import Floats, Requests
from experiment.stats import Window

CHANGE = 0.2
# How often a run without a drift may be said to have one; the cells and both metrics share it.
FALSE_ALARMS = 0.05
# The numbers of parts to choose from: the most whose parts are long enough. Each divides the first.
PARTS = (40, 20, 10, 8)


@dataclass(frozen=True)
class Trend:
    """By how much a fitted line changes over the window, as a share of the mean, and how likely that is by chance."""

    change: float
    chance: float


@dataclass(frozen=True)
class Steady:
    """The steady window of a cell in ns, its output tokens per second, and the trends that could be judged."""

    window: Window | None
    output_throughput: float | None
    trends: dict[str, Trend]


def measure(requests: Requests) -> Steady:
    """Find the window of a cell and what happened inside it; reads all chunks once."""
    window = stats.steady_window(requests)
    if window is None or window[1] <= window[0]:
        return Steady(window, None, {})
    tokens = stats.tokens_over_time(requests, window, PARTS[0])
    throughput = float(tokens.sum() / ((window[1] - window[0]) / 1e9))
    return Steady(window, throughput, dict(_trends(requests, window, tokens)))


def drifts(cells: Mapping[int, Steady]) -> dict[int, str]:
    """What has drifted in which cell; the cells are all that are judged together."""
    tests = sum(len(cell.trends) for cell in cells.values())
    found = {}
    for index, cell in cells.items():
        against = [
            f"{metric} {'rose' if trend.change > 0 else 'fell'} by {abs(trend.change):.0%}"
            for metric, trend in cell.trends.items()
            if abs(trend.change) > CHANGE and trend.chance * tests < FALSE_ALARMS
        ]
        if against:
            found[index] = ", ".join(against)
    return found


def trend(values: Floats) -> Trend:
    """Fit a line to values at equal distances; the test is Student's, of the slope."""
    at = np.arange(len(values), dtype=np.float64)
    spread = values.std()
    if not spread or not values.mean():
        return Trend(0.0, 1.0)
    r = float(np.clip(np.corrcoef(at, values)[0, 1], -1, 1))
    change = r * spread / at.std() * len(values) / abs(values.mean())
    free = len(values) - 2
    t = r * np.sqrt(free / max(1 - r * r, 1e-300))
    return Trend(float(change), float(2 * stdtr(free, -abs(t))))


def _trends(requests: Requests, window: Window, tokens: Floats) -> Iterator[tuple[str, Trend]]:
    length = (window[1] - window[0]) / 1e9
    took = stats.e2e(requests)[requests.measured]
    took = took[~np.isnan(took)]
    longest = length / took.mean() if len(took) else 0.0
    parts = next((parts for parts in PARTS if parts <= longest), None)
    if parts is None:
        return
    yield "output_throughput", trend(tokens.reshape(parts, -1).sum(axis=1))
    waits = _means(requests, window, parts)
    if not np.isnan(waits).any():
        yield "ttft_seconds", trend(waits)


def _means(requests: Requests, window: Window, parts: int) -> Floats:
    """Mean TTFT of the measured requests sent in each part of the window; NaN where none was."""
    values, (start, end) = stats.ttft(requests), window
    sent = requests.sent_ns
    chosen = requests.measured & ~np.isnan(values) & (sent >= start) & (sent < end)
    part = (sent[chosen] - start) * parts // (end - start)
    counts, sums = np.bincount(part, minlength=parts), np.bincount(part, values[chosen], parts)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
