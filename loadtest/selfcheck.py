"""What the load generator measures of itself, and whether its figures can be believed."""

import os
import time
from collections import Counter
from collections.abc import Iterable

import gevent

from loadtest.live.tally import Distribution

LAG_PROBE_SECONDS = 0.005
# A shorter run is mostly its own start and end.
LEAST_SECONDS = 1.0


def go_first() -> bool:
    """Ask Linux to run this thread before others; False where it may not (root or CAP_SYS_NICE may).

    vLLM's processes spin with sched_yield while they wait for each other. With few cores that delays a normal client by
    hundreds of milliseconds, which would be reported as the server's latency.
    """
    if not hasattr(os, "sched_setscheduler"):
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        return False
    return True


class SelfCheck:
    """Measures this process's CPU share, its loop's lag, its send lateness and its load, from `begin` to `finish`."""

    def __init__(self) -> None:
        self._goes_first = go_first()
        self._probe = gevent.spawn(self._watch)
        self._report: dict[str, object] = {}
        self.begin()

    def begin(self) -> None:
        """Forget what was measured so far: the warm-up."""
        self._lags, self._recent_lags, self._late = Distribution(), Distribution(), Distribution()
        self._chunks: Counter[int] = Counter()
        self._started = self._recent_started = time.monotonic()
        self._cpu = self._recent_cpu = time.process_time()

    def sent(self, late_seconds: float | None) -> None:
        """Count how late a request was sent; None in a closed loop, where nothing can be late."""
        if late_seconds is not None:
            self._late.add(late_seconds)

    def received(self, chunk_ns: Iterable[int]) -> None:
        """Count chunks by the second in which they came."""
        self._chunks.update(stamp // 1_000_000_000 for stamp in chunk_ns)

    def recent(self) -> tuple[float, float]:
        """CPU share of one core, and p99 of the loop's lag in seconds, since the last call."""
        now, cpu = time.monotonic(), time.process_time()
        share = (cpu - self._recent_cpu) / max(1e-9, now - self._recent_started)
        lags = self._recent_lags.percentiles(0.99) or [0.0]
        self._recent_started, self._recent_cpu, self._recent_lags = now, cpu, Distribution()
        return share, lags[0]

    def finish(self) -> dict[str, object]:
        """CPU share of one core, chunks in the busiest second, percentiles of lag and lateness (s; None: closed loop).

        They are right to 1 %. The CPU share of less than LEAST_SECONDS is None: it says nothing of the load.
        What comes after the first call is not measured.
        """
        if self._report:
            return self._report
        self._probe.kill()
        wall = time.monotonic() - self._started
        self._report = {
            "pid": os.getpid(),
            "wall_seconds": wall,
            "goes_first": self._goes_first,
            "cpu_share": (time.process_time() - self._cpu) / wall if wall >= LEAST_SECONDS else None,
            "chunks_per_second_max": max(self._chunks.values(), default=0),
            **_percentiles("loop_lag", self._lags, 0.0),
            **_percentiles("send_lateness", self._late, None),
        }
        return self._report

    def _watch(self) -> None:
        due = time.monotonic()
        while True:
            due += LAG_PROBE_SECONDS
            gevent.sleep(max(0.0, due - time.monotonic()))
            # One lag for each time that a stall has missed, so that a long one counts for as long as it was.
            while (now := time.monotonic()) >= due:
                self._lags.add(now - due)
                self._recent_lags.add(now - due)
                due += LAG_PROBE_SECONDS
            due -= LAG_PROBE_SECONDS


def _percentiles(name: str, values: Distribution, nothing: float | None) -> dict[str, float | None]:
    found = values.percentiles(0.5, 0.99, 1) or (nothing, nothing, nothing)
    return {f"{name}_{at}_seconds": value for at, value in zip(("p50", "p99", "max"), found, strict=True)}
