"""What a load generator reports, held against the stamps of the reference server."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

JSON = dict[str, Any]
#: The mean ITL may be off by this share.
ITL_LIMIT = 0.01
#: Where the server is later than this, in seconds at p99, a load was not the one that was asked for.
LATENESS_LIMIT = 0.005
#: So many requests go first and are left out: a client's first request is slow, and would decide the p99 of a few.
WARM_UP = 8
#: Seconds over which the others are spread evenly.
ARRIVAL_SECONDS = 2.0


@dataclass(frozen=True)
class Seen:
    """One request as a client reports it, in seconds; `gaps` are between tokens, where it tells them.

    `key` is the id of the request or of the answer. It is empty where the client tells neither; then the place in the
    order of sending says which one it is.
    """

    key: str
    ttft: float
    itl: float
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Probe:
    """One load and how it went; times in seconds. Differences are those of one request or gap, without their sign."""

    streams: int
    failed: int
    cpu: float
    wall: float
    ttft_p99: float = float("nan")
    server_ttft_p99: float = float("nan")
    itl_mean: float = float("nan")
    server_itl_mean: float = float("nan")
    server_lateness_p99: float = float("nan")
    ttft_difference: tuple[float, float] | None = None
    gap_difference: tuple[float, float] | None = None
    itl_difference: tuple[float, float] | None = None

    def passes(self, limit: float) -> bool:
        """Whether all requests ended on schedule, with TTFT at p99 within the limit and mean ITL within ITL_LIMIT."""
        itl = abs(self.itl_mean / self.server_itl_mean - 1)
        right = abs(self.ttft_p99 - self.server_ttft_p99) <= limit and itl <= ITL_LIMIT
        return self.on_schedule and not self.failed and right

    @property
    def on_schedule(self) -> bool:
        """Whether the server sent what it was asked for when it was due; else the client was not tried."""
        return self.server_lateness_p99 <= LATENESS_LIMIT


@contextmanager
def reference(core: int, ttft_seconds: float, itl_seconds: float) -> Iterator[str]:
    """The reference server on a core of its own; gives its address."""
    options = ["--port", "0", "--ttft", str(ttft_seconds), "--itl", str(itl_seconds)]
    command = ["taskset", "-c", str(core), sys.executable, "-m", "loadtest.reference", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait(10)


def stamps(url: str, since: int | None = None) -> list[JSON]:
    """The server's summary and stamps; without a number the summary alone."""
    with urllib.request.urlopen(f"{url}/stamps?since={2**62 if since is None else since}") as answer:  # noqa: S310
        return [json.loads(line) for line in answer]


def compare(
    requests: int, seen: Sequence[Seen], sends: Sequence[JSON], cost: tuple[float, float], late: float
) -> Probe:
    """Hold what the client saw of all requests but the warm-up against what the server sent."""
    streams, failed = requests - WARM_UP, requests - len(seen)
    if failed or len(sends) != requests:
        return Probe(streams, max(failed, 1), *cost, server_lateness_p99=late)
    pairs = sorted(pair(seen, sends), key=lambda both: int(both[1]["number"]))[WARM_UP:]
    ttfts = np.array([[own.ttft, (sent["sent_ns"][0] - sent["received_ns"]) / 1e9] for own, sent in pairs])
    server_gaps = [np.diff(sent["sent_ns"]) / 1e9 for _, sent in pairs]
    itls = np.array([[own.itl, gaps.mean()] for (own, _), gaps in zip(pairs, server_gaps, strict=True)])
    whole = all(len(own.gaps) == len(gaps) for (own, _), gaps in zip(pairs, server_gaps, strict=True))
    own_gaps = np.concatenate([own.gaps for own, _ in pairs]) if whole else None
    ttft_p99, server_ttft_p99 = np.quantile(ttfts, 0.99, axis=0).tolist()
    itl_mean, server_itl_mean = itls.mean(axis=0).tolist()
    return Probe(
        *(streams, 0, *cost),
        *(ttft_p99, server_ttft_p99, itl_mean, server_itl_mean, late),
        differences(ttfts[:, 0], ttfts[:, 1]),
        differences(own_gaps, np.concatenate(server_gaps)) if own_gaps is not None else None,
        differences(itls[:, 0], itls[:, 1]),
    )


def pair(seen: Sequence[Seen], sends: Sequence[JSON]) -> list[tuple[Seen, JSON]]:
    """Each request of the client with the server's, by its id, by the id of the answer, or in the order of sending."""
    known = {sent["request_id"]: sent for sent in sends} | {f"cmpl-{sent['number']:012d}": sent for sent in sends}
    if all(own.key in known for own in seen):
        return [(own, known[own.key]) for own in seen]
    return list(zip(seen, sends, strict=True))


def differences(own: NDArray[np.float64], server: NDArray[np.float64]) -> tuple[float, float]:
    """How far apart they are, at p50 and p99."""
    low, high = np.quantile(np.abs(own - server), (0.5, 0.99)).tolist()
    return low, high
