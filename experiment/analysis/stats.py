"""From requests to figures: exact percentiles, throughput in the steady window, paired ratios with intervals.

Aggregates and nothing else: what this returns is rendered elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import ndtri, stdtrit

from experiment.analysis.requests import ERRORS, UNKNOWN, Flags, Floats, Longs, Requests

Verdict = Literal["faster", "slower", "no detectable difference", "invalid"]
Window = tuple[int, int]


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
    """How many times better the second server is than the first, with a 95 % interval where there is one.

    There is no value where the first never had any of a rate.
    """

    value: float | None
    low: float | None
    high: float | None
    verdict: Verdict


def ttft(requests: Requests) -> Floats:
    """Time to first token of each request: its first chunk minus its sent time; NaN where there is none."""
    return _seconds(requests.sent_ns, requests.first_ns, requests.answered & (requests.first_ns != UNKNOWN))


def offered_rate(requests: Requests) -> float | None:
    """Measured requests that were due per second, from the first to the last; None in a closed loop or of one."""
    due = np.sort(requests.scheduled_ns[requests.measured & (requests.scheduled_ns != UNKNOWN)])
    return float((len(due) - 1) / ((due[-1] - due[0]) / 1e9)) if len(due) > 1 and due[-1] > due[0] else None


def tpot(requests: Requests) -> Floats:
    """Time per output token after the first: (E2E - TTFT) / (n - 1); NaN for fewer than two tokens."""
    known = requests.answered & (requests.first_ns != UNKNOWN) & (requests.output_tokens >= 2)
    return np.asarray(_seconds(requests.first_ns, requests.last_ns, known) / np.maximum(requests.output_tokens - 1, 1))


def e2e(requests: Requests) -> Floats:
    """End-to-end latency: last output token minus sent time; NaN where there is none."""
    return _seconds(requests.sent_ns, requests.last_ns, requests.answered & (requests.last_ns != UNKNOWN))


def response(requests: Requests) -> Floats:
    """Response time: last output token minus scheduled time; NaN in a closed loop, which has no schedule."""
    known = requests.answered & (requests.last_ns != UNKNOWN) & (requests.scheduled_ns != UNKNOWN)
    return _seconds(requests.scheduled_ns, requests.last_ns, known)


def normalized(requests: Requests) -> Floats:
    """Response time over output tokens, in seconds per token, as PagedAttention (SOSP'23, section 6.1) has it.

    In a closed loop, where a request is due when it is sent, it is E2E over output tokens.
    """
    open_loop = requests.scheduled_ns != UNKNOWN
    took = np.where(open_loop, response(requests), e2e(requests))
    return np.where(requests.output_tokens > 0, took / np.maximum(requests.output_tokens, 1), np.nan)


def _seconds(since_ns: Longs, until_ns: Longs, known: Flags) -> Floats:
    return np.where(known, (until_ns - since_ns) / 1e9, np.nan)


LATENCIES: dict[str, Callable[[Requests], Floats]] = {
    "ttft_seconds": ttft,
    "tpot_seconds": tpot,
    "e2e_seconds": e2e,
    "response_seconds": response,
}
# What is lower for the better server; of each a mean over the requests that both servers answered is compared.
COMPARED = LATENCIES | {"normalized_latency": normalized}


def summarize(values: Floats) -> Summary | None:
    """Exact percentiles of all values that are not NaN; None when there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    p50, p90, p99 = (float(p) for p in np.percentile(known, [50, 90, 99]))
    return Summary(len(known), float(np.mean(known)), p50, p90, p99)


def steady_window(requests: Requests) -> Window | None:
    """The time in ns from the first measured request until the load falls below its level, or the last measured ends.

    Before it the load comes up, after it the load goes down: both are cut from the numerator and the denominator. So is
    the time in which not all servers were under load that were to be so together.
    """
    if not requests.measured.any():
        return None
    last_sent = requests.sent_ns.max()
    after = requests.end_ns[requests.end_ns > last_sent]
    load_falls = after.min() if len(after) else last_sent
    start, end = requests.sent_ns[requests.measured].min(), requests.end_ns[requests.measured].max()
    first, last = requests.shared_ns or (start, end)
    return int(max(start, first)), int(min(load_falls, end, last))


def tokens_over_time(requests: Requests, window: Window, parts: int = 1) -> Floats:
    """Output tokens in each of so many equal parts of a window (start, end]; failed requests count as none."""
    start, end = window
    found = np.zeros(parts)
    for chunks in requests.chunks():
        good = np.repeat(requests.answered[chunks.rows], chunks.end - chunks.begin)
        inside = good & (chunks.ns > start) & (chunks.ns <= end)
        part = (chunks.ns[inside] - start - 1) * parts // (end - start)
        found += np.bincount(part, chunks.tokens[inside], parts)
    return found


def output_throughput(requests: Requests) -> float | None:
    """Output tokens inside the steady window over its length, in tokens per second; failed requests count as none."""
    window = steady_window(requests)
    if window is None or window[1] <= window[0]:
        return None
    return float(tokens_over_time(requests, window)[0] / ((window[1] - window[0]) / 1e9))


def errors_by_kind(errors: Longs) -> dict[str, int]:
    """Number of failed requests of each kind, from the `error` column of requests."""
    kinds, counts = np.unique(errors, return_counts=True)
    return {ERRORS[kind]: count for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True) if kind != UNKNOWN}


def meets(requests: Requests, limits: Mapping[Any, float]) -> Flags:
    """Which requests met every limit; a failed one never does, nor one whose latency is not known.

    A request of one token has no time per output token after the first, so that it cannot be over that limit.
    """
    met = requests.answered & (requests.last_ns != UNKNOWN)
    for metric, limit in limits.items():
        with np.errstate(invalid="ignore"):
            within = COMPARED[metric](requests) <= limit
        met &= within | ((requests.output_tokens == 1) if metric == "tpot_seconds" else False)
    return np.asarray(met)


def attainment(requests: Requests, limits: Mapping[str, float]) -> float | None:
    """Share of the measured requests that met every limit; None when nothing was measured."""
    return float(meets(requests, limits)[requests.measured].mean()) if requests.measured.any() else None


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of so many requests, as if each were independent (Wilson, JASA 22, 1927).

    Requests that wait in the same queue are not, so that the truth is wider.
    """
    z2 = float(ndtri(0.975)) ** 2
    middle, reach = share + z2 / (2 * count), np.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count)
    low, high = (float(middle + way * reach) / (1 + z2 / count) for way in (-1, 1))
    return max(0.0, low), min(1.0, high)


def goodput(requests: Requests, limits: Mapping[str, float]) -> float | None:
    """Requests that ended inside the steady window over its length (1/s), times the share of measured within limits.

    The share is of the measured alone, as those before them met a server that was not yet under load; the rate is of
    all, as those too take their part of the server while they end.
    """
    window, share = steady_window(requests), attainment(requests, limits)
    if window is None or window[1] <= window[0] or share is None:
        return None
    inside = (requests.end_ns > window[0]) & (requests.end_ns <= window[1])
    return float(share * inside.sum() / ((window[1] - window[0]) / 1e9))


def paired(first: Requests, second: Requests, metric: str) -> Floats:
    """Values of both servers for each measured request that both answered, shape (pairs, 2).

    Requests pair by their index.
    """
    one, other = (_values(side, metric) for side in (first, second))
    _, at, there = np.intersect1d(one[0], other[0], return_indices=True)
    return np.column_stack([one[1][at], other[1][there]])


def _values(requests: Requests, metric: str) -> tuple[Longs, Floats]:
    """Indices of the measured requests that have a value of the metric, and these."""
    values = COMPARED[metric](requests)
    known = requests.measured & ~np.isnan(values)
    return requests.index[known], values[known]


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


def ratio_with_none(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """What can be said of pairs of rates some of which are 0, of which there is no mean ratio: that of the means.

    There is a verdict where one server has none in any of two repeats or more, and the other has some in each.
    """
    means = [sum(side) / len(side) for side in (first, second)]
    verdict: Verdict = "no detectable difference"
    if len(first) > 1 and any(means):
        if not any(second) and all(first):
            verdict = "slower"
        elif not any(first) and all(second):
            verdict = "faster"
    return Ratio(means[1] / means[0] if means[0] else None, None, None, verdict)


def verdict(low: float, high: float) -> Verdict:
    """What an interval of a ratio says of the second server."""
    if low > 1:
        return "faster"
    return "slower" if high < 1 else "no detectable difference"


def different_work(first: Requests, second: Requests, *, one_goes_on: bool = False) -> list[int]:
    """Indices of the requests that did not get the same prompt and output token counts on both servers.

    Where `one_goes_on`, as the faster does until its time is over, what comes after the other's last is passed over.
    """
    indices = np.union1d(first.index, second.index)
    if one_goes_on:
        indices = indices[indices <= min(first.index.max(initial=-1), second.index.max(initial=-1))]
    sides = [_work(requests, indices) for requests in (first, second)]
    different = (sides[0] != sides[1]).any(axis=1) | (sides[0] == UNKNOWN).any(axis=1)
    return [int(index) for index in indices[different]]


def _work(requests: Requests, indices: Longs) -> Longs:
    """Prompt and output tokens by index, shape (indices, 2); UNKNOWN for a request that is not there."""
    found = np.full((len(indices), 2), UNKNOWN, dtype=np.int64)
    there = np.isin(requests.index, indices)
    at = np.searchsorted(indices, requests.index[there])
    found[at] = np.column_stack([requests.prompt_tokens, requests.output_tokens])[there]
    return found
