"""Whether a cell was steady: figures of its window, and the trend of its throughput and of its TTFT inside it.

The window is cut into PARTS, each at least as long as a request takes from its first token to its last, so that
neighbours are nearly independent; nothing is said of a cell that is too short for that, or that has a part in which no
request was sent. A line is fitted to the means of the parts. A cell has drifted where the line rises or falls by more
than CHANGE of the mean over the window and the t-test of its slope says that this is not chance. Small trends, which a
long enough cell always shows, do not count.

Apart from that a cell of an open loop is too short for latencies where requests wait for their first token for more
than WAIT of the window on average: a queue has grown, or comes and goes more slowly than the window is long, so that
what waits in it has no mean yet. Of queues that grow this shows only those of rates far beyond what the server can do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from experiment.analysis import stats
from experiment.analysis.requests import UNKNOWN, Flags, Floats, Requests
from experiment.analysis.results import JSON
from experiment.analysis.stats import Window

PARTS = 10
CHANGE = 0.3
# How likely by chance a trend may be, shared by all that are tested. Parts of a queue are not quite independent: played
# servers that are steady, closed loops and queues at up to 90 % of their capacity, were found to drift in at most 5 %.
CHANCE = 0.01
WAIT = 0.25


@dataclass(frozen=True)
class Trend:
    """By how much a fitted line changes over the window, as a share of the mean, and how likely that is by chance."""

    change: float
    chance: float


@dataclass(frozen=True)
class Steady:
    """The steady window of a cell in ns, its output tokens per second, and the trends that could be judged.

    `waited` is the mean TTFT in an open loop as a share of the window, zero in a closed loop, where requests wait for a
    server that others keep busy on purpose.
    """

    window: Window | None
    output_throughput: float | None
    trends: dict[str, Trend]
    waited: float = 0.0


def measure(requests: Requests) -> Steady:
    """Find the window of a cell and what happened inside it; reads all chunks once."""
    window = stats.steady_window(requests)
    if window is None or window[1] <= window[0]:
        return Steady(window, None, {})
    tokens = stats.tokens_over_time(requests, window, PARTS)
    throughput = float(tokens.sum() / ((window[1] - window[0]) / 1e9))
    return Steady(window, throughput, dict(_trends(requests, window, tokens)), _waited(requests, window))


def drifts(cells: Mapping[int, Steady]) -> dict[int, dict[str, float]]:
    """By how much what has drifted in which cell, as shares of the mean; the cells are all that are judged together."""
    tests = sum(len(cell.trends) for cell in cells.values())
    found = {}
    for index, cell in cells.items():
        against = {
            metric: trend.change
            for metric, trend in cell.trends.items()
            if abs(trend.change) > CHANGE and trend.chance * tests < CHANCE
        }
        if against:
            found[index] = against
    return found


def short(cells: Mapping[int, Steady]) -> dict[int, float]:
    """In which cells requests waited too long beside the window, as shares of it."""
    return {index: cell.waited for index, cell in cells.items() if cell.waited > WAIT}


def has_mean(figures: JSON) -> bool:
    """Whether latencies of a level and target have a mean: no repeat drifted or was too short for what waited in it."""
    return not figures.get("unstable") and not figures.get("short")


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
    sending = window
    if (scheduled := _scheduled(requests)).any():
        # What is measured in an open loop ends with the last of these; the window goes on until they are answered.
        sending = window[0], min(window[1], int(requests.sent_ns[scheduled].max()) + 1)
    known = requests.measured & requests.answered & (requests.first_ns != UNKNOWN)
    took = (requests.last_ns - requests.first_ns)[known]
    if not len(took) or took.mean() * PARTS > sending[1] - sending[0]:
        return
    waits = _means(requests, sending)
    if not np.isnan(waits).any():
        yield "output_throughput", trend(tokens)
        yield "ttft_seconds", trend(waits)


def _scheduled(requests: Requests) -> Flags:
    """The measured requests that had a time at which they were due, as all have in an open loop."""
    return np.asarray(requests.measured & (requests.scheduled_ns != UNKNOWN))


def _waited(requests: Requests, window: Window) -> float:
    waits = stats.ttft(requests)[_scheduled(requests)]
    waits = waits[~np.isnan(waits)]
    return float(waits.mean() / ((window[1] - window[0]) / 1e9)) if len(waits) else 0.0


def _means(requests: Requests, window: Window) -> Floats:
    """Mean TTFT of the measured requests sent in each part of the window; NaN where none was."""
    values, (start, end) = stats.ttft(requests), window
    sent = requests.sent_ns
    chosen = requests.measured & ~np.isnan(values) & (sent >= start) & (sent < end)
    part = (sent[chosen] - start) * PARTS // (end - start)
    counts, sums = np.bincount(part, minlength=PARTS), np.bincount(part, values[chosen], PARTS)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
