"""What the load generator measures of itself, and whether its figures can be believed."""

import os
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

import gevent

from loadtest.live.tally import Distribution

LAG_PROBE_SECONDS = 0.005
# A loop that is later than a millisecond of epoll's timer and one of gathering may have read at once what came apart by
# more than a millisecond, which is what a stamp may be off.
LATE_NS, GATHER_NS = 2_000_000, 1_000_000
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
        self._shared = self._merged = 0
        # Begins and ends of the times in which the loop stood still (ns).
        self._stalls: array[int] = array("q")
        self._started = self._recent_started = time.monotonic()
        self._cpu = self._recent_cpu = time.process_time()

    def sent(self, late_seconds: float | None) -> None:
        """Count how late a request was sent; None in a closed loop, where nothing can be late."""
        if late_seconds is not None:
            self._late.add(late_seconds)

    def received(self, chunk_ns: Sequence[int], pieces: Iterable[tuple[int, bytes]]) -> None:
        """Count an answer's chunks by the second in which they came, and those that were read with a later one.

        `pieces` are those in which the server wrote the answer: several chunks in one piece are its own doing.
        """
        self._chunks.update(stamp // 1_000_000_000 for stamp in chunk_ns)
        if len(set(chunk_ns)) == len(chunk_ns):
            return
        written = Counter(stamp for stamp, _ in pieces)
        for stamp, number in Counter(chunk_ns).items():
            shared = max(0, min(number, written[stamp]) - 1)
            self._shared += shared
            self._merged += shared if self._stood_still(stamp) else 0

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
        `shared_stamp_share`: of all chunks those that the server wrote by themselves and that have the stamp of a later
        one, with which they were read. `merged_chunk_share`: those of them that were because this process stood still;
        the others may have been written, or have come over the network, at once.
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
            "shared_stamp_share": self._shared / max(1, self._chunks.total()),
            "merged_chunk_share": self._merged / max(1, self._chunks.total()),
            **_percentiles("loop_lag", self._lags, 0.0),
            **_percentiles("send_lateness", self._late, None),
        }
        return self._report

    def _watch(self) -> None:
        due = time.monotonic()
        while True:
            due += LAG_PROBE_SECONDS
            gevent.sleep(max(0.0, due - time.monotonic()))
            self._note_stall(round(due * 1e9), time.monotonic_ns())
            # One lag for each time that a stall has missed, so that a long one counts for as long as it was.
            while (now := time.monotonic()) >= due:
                self._lags.add(now - due)
                self._recent_lags.add(now - due)
                due += LAG_PROBE_SECONDS
            due -= LAG_PROBE_SECONDS

    def _note_stall(self, due_ns: int, now_ns: int) -> None:
        """Note since when the loop may have stood still, if it did: at the last look it went on."""
        if now_ns - due_ns > LATE_NS:
            last_ns = self._stalls[-1] if self._stalls else 0
            self._stalls.extend((max(last_ns, due_ns - round(LAG_PROBE_SECONDS * 1e9)), now_ns + GATHER_NS))

    def _stood_still(self, at_ns: int) -> bool:
        """Whether the loop did at a time."""
        return bisect_left(self._stalls, at_ns) % 2 == 1


def _percentiles(name: str, values: Distribution, nothing: float | None) -> dict[str, float | None]:
    found = values.percentiles(0.5, 0.99, 1) or (nothing, nothing, nothing)
    return {f"{name}_{at}_seconds": value for at, value in zip(("p50", "p99", "max"), found, strict=True)}
