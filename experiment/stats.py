"""From records to figures: exact percentiles, throughput in the steady window, paired ratios with intervals.

Aggregates and nothing else: what this returns is rendered elsewhere.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from loadtest.records import Record

Verdict = Literal["faster", "slower", "no detectable difference", "invalid"]
Floats = NDArray[np.float64]

LATENCIES: dict[str, Callable[[Record], float | None]] = {
    "ttft_seconds": lambda record: record.ttft_seconds,
    "tpot_seconds": lambda record: record.tpot_seconds,
    "e2e_seconds": lambda record: record.e2e_seconds,
}


@dataclass(frozen=True)
class Summary:
    """Distribution of a latency over the measured requests of a server at one level, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Ratio:
    """How many times better the second server is than the first, with a 95 % interval where there is one."""

    value: float
    low: float | None
    high: float | None
    verdict: Verdict


def measured(records: Sequence[Record]) -> list[Record]:
    """The records that enter statistics; a failed one is among them, and has no latency."""
    return [record for record in records if record.phase == "measured"]


def summarize(values: Sequence[float]) -> Summary | None:
    """Exact percentiles of all values; None when there are none."""
    if not values:
        return None
    p50, p90, p99 = (float(p) for p in np.percentile(values, [50, 90, 99]))
    return Summary(len(values), float(np.mean(values)), p50, p90, p99)


def steady_window(records: Sequence[Record]) -> tuple[int, int] | None:
    """The time in ns from the first measured request until the load falls below its level, or the last measured ends.

    Before it the load comes up, after it the load goes down: both are cut from the numerator and the denominator.
    """
    chosen = measured(records)
    if not chosen:
        return None
    last_sent = max(record.sent_ns for record in records)
    load_falls = min((record.end_ns for record in records if record.end_ns > last_sent), default=last_sent)
    return min(record.sent_ns for record in chosen), min(load_falls, max(record.end_ns for record in chosen))


def output_throughput(records: Sequence[Record]) -> float | None:
    """Output tokens inside the steady window over its length, in tokens per second; failed requests count as none."""
    window = steady_window(records)
    if window is None or window[1] <= window[0]:
        return None
    tokens = sum(_tokens_within(record, *window) for record in records if not record.error)
    return tokens / ((window[1] - window[0]) / 1e9)


def _tokens_within(record: Record, start_ns: int, end_ns: int) -> float:
    # Where the server does not say how many tokens each chunk holds, they are spread evenly over the chunks.
    each = (record.output_tokens or 0) / max(1, len(record.chunk_ns))
    counts: Sequence[float] = record.chunk_tokens or [each] * len(record.chunk_ns)
    return sum(count for stamp, count in zip(record.chunk_ns, counts, strict=True) if start_ns < stamp <= end_ns)


def errors_by_kind(records: Sequence[Record]) -> dict[str, int]:
    """Number of failed requests of each kind."""
    return dict(Counter(record.error for record in records if record.error))


def paired(first: Sequence[Record], second: Sequence[Record], metric: str) -> Floats:
    """Values of both servers for each request that both answered, shape (pairs, 2); records pair by their index."""
    read = LATENCIES[metric]
    others = {record.index: read(record) for record in second}
    pairs = [(a, b) for r in first if (a := read(r)) is not None and (b := others.get(r.index)) is not None]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def ratio_of_means(pairs: Floats) -> float | None:
    """Mean of the first server's values over that of the second, of pairs as `paired` gives; None where one is zero."""
    first, second = pairs.mean(axis=0).tolist() if len(pairs) else (0.0, 0.0)
    return first / second if first and second else None


def ratio_of_pairs(ratios: Sequence[float]) -> Ratio:
    """Geometric mean of the ratios of pairs of runs, and where there are two its 95 % interval.

    It is Student's, over the logarithms. What happens to a machine happens to all requests of a run, so these are not
    as many observations; and a bootstrap of so few values as there are pairs would be too narrow.
    """
    logs = np.log(ratios)
    value = float(np.exp(logs.mean()))
    if len(logs) < 2:
        return Ratio(value, None, None, "no detectable difference")
    reach = stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / np.sqrt(len(logs))
    low, high = (float(np.exp(logs.mean() + way * reach)) for way in (-1, 1))
    return Ratio(value, low, high, verdict(low, high))


def verdict(low: float, high: float) -> Verdict:
    """What an interval of a ratio says of the second server."""
    if low > 1:
        return "faster"
    return "slower" if high < 1 else "no detectable difference"


def different_work(first: Sequence[Record], second: Sequence[Record]) -> list[int]:
    """Indices of the requests that did not get the same prompt and output token counts on both servers."""

    def work(records: Sequence[Record]) -> dict[int, tuple[int | None, int | None]]:
        return {record.index: (record.prompt_tokens, record.output_tokens) for record in records}

    a, b = work(first), work(second)
    return sorted(index for index in a.keys() | b.keys() if a.get(index) != b.get(index) or None in a.get(index, ()))
