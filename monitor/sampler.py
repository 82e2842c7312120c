"""Ticks on an absolute schedule, the threads that take them, and the budget of CPU for all of them together."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from monitor.timeline import CLOCKS, STALE_NS, Clocks

log = logging.getLogger(__name__)

SECOND = 1_000_000_000
# How long the CPU of sampling is added up before it is judged: a look at new processes is soon over.
REVIEW_NS = 5 * SECOND
# Seconds for which an allowance of CPU is kept.
BURST_SECONDS = 5.0
# Reviews in a row that must leave room before a slowed source goes faster again, and how much room.
CALM_REVIEWS = 6
ROOM = 0.8


class Sampler(threading.Thread):
    """A thread that takes a step, waits as many seconds as it yields, and so on.

    Everything that can block has a sampler of its own, so that a GPU that hangs or a dear reading of /proc delays no
    other.
    """

    def __init__(self, name: str, steps: Iterator[float]) -> None:
        # A daemon, because a thread stuck in the driver must not keep the program alive.
        super().__init__(name=name, daemon=True)
        self.steps = steps
        self._stopping = threading.Event()
        self._cpu_clock: int | None = None
        self._cpu_seconds = 0.0

    def stop(self) -> None:
        """End the thread, or leave it behind after two seconds if it is stuck."""
        self._stopping.set()
        self.join(timeout=2)

    def alive(self) -> bool:
        """Tell whether samples are being taken."""
        return self.is_alive()

    @property
    def cpu_seconds(self) -> float:
        """CPU that the thread has used until now, also while it is stuck."""
        if self._cpu_clock is not None:
            # The thread may end between the question and the answer.
            with suppress(OSError):
                self._cpu_seconds = time.clock_gettime(self._cpu_clock)
        return self._cpu_seconds

    def run(self) -> None:
        """Sample until stopped."""
        go_first()
        self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            for seconds in self.steps:
                if seconds < 0.2:
                    # Wakes up for less CPU than an event does.
                    time.sleep(seconds)
                    if self._stopping.is_set():
                        return
                elif self._stopping.wait(min(seconds, threading.TIMEOUT_MAX)):
                    return
        finally:
            self._cpu_seconds, self._cpu_clock = time.thread_time(), None


def within(
    max_cpu: float, most: float, steps: Iterator[float], cpu_clock: Callable[[], float] = time.thread_time
) -> Iterator[float]:
    """Wait longer after steps that take more than a share of a core, but no longer than `most` seconds."""
    before = cpu_clock()
    for seconds in steps:
        after = cpu_clock()
        yield max(seconds, min((after - before) * (1 / max_cpu - 1), most))
        before = after


def go_first() -> None:
    """Ask Linux to run this thread before other processes, where it may (root or CAP_SYS_NICE).

    Servers that spin while they wait, as vLLM's do, would else leave gaps of seconds in the samples of a machine with
    few cores. What the samples miss is counted, see Schedule.
    """
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


class Governor:
    """Divides the rate of schedules so that they keep within a share of a core; `what` they sample is for the log.

    Each kind of sampling has its own, so that one that is dear takes nothing from the others.
    """

    def __init__(self, max_cpu: float, hz: int, what: str = "") -> None:
        self.divider = 1
        self._max_cpu = max_cpu
        self._hz = hz
        self._what = what
        self._calm = 0
        self._before: tuple[int, float] | None = None
        self._said = False

    def review(self, time_ns: int, cpu_seconds: float) -> None:
        """See the CPU that the schedules have used until now, and judge it after REVIEW_NS."""
        before = self._before
        if before and time_ns < before[0] + REVIEW_NS:
            return
        self._before = time_ns, cpu_seconds
        if before:
            self.decide((cpu_seconds - before[1]) * SECOND / (time_ns - before[0]))

    def decide(self, share: float) -> None:
        """Halve the rate after too much CPU (share of a core); double it after many reviews with room."""
        if share > self._max_cpu:
            self._calm = 0
            if self.divider * 2 <= self._hz:
                self.divider *= 2
                if not self._said:
                    self._said = True
                    log.warning("%s: sampled less often for now, to keep within --max-cpu", self._what)
        elif self.divider > 1 and 2 * share <= ROOM * self._max_cpu:
            self._calm += 1
            if self._calm == CALM_REVIEWS:
                self._calm = 0
                self.divider //= 2
        else:
            self._calm = 0


class Allowance:
    """CPU that a kind of work may take: it comes in at a share of a core, and some seconds' worth is kept for bursts.

    Work is allowed while any is left, and may so overdraw it by what it takes once. Threads share one without a lock:
    a rare lost count does no harm.
    """

    def __init__(self, max_cpu: float, cpu_clock: Callable[[], float] = time.thread_time) -> None:
        self.used = 0.0
        self._max_cpu = max_cpu
        self._cpu_clock = cpu_clock
        self._left, self._time_ns = max_cpu * BURST_SECONDS, 0

    def left(self, time_ns: int) -> bool:
        """Tell whether work may be done now."""
        come_in = (time_ns - self._time_ns) / SECOND * self._max_cpu
        self._left, self._time_ns = min(self._left + come_in, self._max_cpu * BURST_SECONDS), time_ns
        return self._left > 0

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Count what the thread uses meanwhile."""
        begun = self._cpu_clock()
        try:
            yield
        finally:
            seconds = self._cpu_clock() - begun
            self.used += seconds
            self._left -= seconds


class Schedule:
    """Calls `tick` `hz` times a second, counted from the start; it is told its lateness (s) and answers success.

    A tick that finds nothing to read, as there is no device for now, answers None: then a sample was missed.

    A tick that begins late is not moved on the schedule; those that were missed by then are skipped and counted, never
    made up. A tick that is late by L with `behind` missed ones stands for all of them: they were late by L, L - 1 / hz,
    L - 2 / hz and so on. With a governor ticks are left out on purpose; what remains is on the same grid.
    """

    def __init__(
        self,
        hz: int,
        tick: Callable[[float], bool | None],
        governor: Governor | None = None,
        clocks: Clocks = CLOCKS,
    ) -> None:
        self.wanted_hz = hz
        self.lateness = 0.0
        self.behind = 0
        self.samples = 0
        self.missed = 0
        self.success_ns: int | None = None
        self.success_wall_ns: int | None = None
        self.tick = tick
        self._governor = governor
        self._clocks = clocks
        self._broken = False
        # When the last tick began; when one began a second before, and one before that, and how many there were then.
        self._last_ns = 0
        self._marks = ((0, 0), (0, 0))

    @property
    def hz(self) -> float:
        """Ticks a second that were taken over the last one or two seconds, or in as long as one hangs."""
        (begun_ns, samples), _ = self._marks
        end_ns, hangs_ns = self._last_ns, self._clocks.time_ns() - self._last_ns
        rate = (self.samples - samples) * SECOND / (end_ns - begun_ns) if samples and end_ns > begun_ns else 0.0
        return min(rate, SECOND / hangs_ns) if hangs_ns > 2 * SECOND else rate

    def steps(self) -> Iterator[float]:
        """Tick when it is time; yield the seconds until the next time."""
        clock, wall_clock, hz = self._clocks.time_ns, self._clocks.wall_ns, self.wanted_hz
        start = clock()
        number, due, divider = 0, start, 1
        governor = self._governor or Governor(1.0, hz)
        marked = 0
        while True:
            time_ns = clock()
            if time_ns < due:
                yield (due - time_ns) / SECOND
                continue
            passed = max(number, (time_ns - start) * hz // SECOND)
            self.lateness = (time_ns - due) / SECOND
            self.behind = (passed - number) // divider
            self.missed += self.behind
            self._last_ns = time_ns
            taken = self._take()
            if taken is None:
                self.missed += 1
            else:
                self.samples += 1
            if taken:
                self.success_ns, self.success_wall_ns = time_ns, wall_clock()
            if time_ns - marked >= SECOND:
                marked = time_ns
                mark = (time_ns, self.samples)
                self._marks = (self._marks[1] if self._marks[1][1] else mark, mark)
            divider = governor.divider
            number = (passed // divider + 1) * divider
            due = start + number * SECOND // hz
            yield max(0, due - clock()) / SECOND

    def _take(self) -> bool | None:
        try:
            return self.tick(self.lateness)
        except Exception:
            # Whatever it is, the source is down until a tick goes well again.
            if not self._broken:
                self._broken = True
                log.exception("%s: a sample failed, no more is said of it", threading.current_thread().name)
            return False


@dataclass
class Source:
    """What /metrics tells about one thing that is sampled: its main schedule, and all threads that it takes.

    One that is known to be lost is down at once, and until it was read again; `lost_ns` is when that was last found.
    """

    name: str
    main: Schedule
    samplers: Sequence[Sampler] = ()
    lost: bool = False
    lost_ns: int = 0

    def up(self, now_ns: int) -> bool:
        """Tell whether it was read well of late."""
        success_ns = self.main.success_ns
        return not self.lost and success_ns is not None and success_ns > max(self.lost_ns, now_ns - STALE_NS - 1)

    @property
    def wanted_hz(self) -> int:
        """Samples a second that were asked for."""
        return self.main.wanted_hz

    @property
    def hz(self) -> float:
        """Samples a second that were taken over the last one or two seconds."""
        return self.main.hz

    @property
    def samples(self) -> int:
        """Samples taken so far, good or not."""
        return self.main.samples

    @property
    def missed(self) -> int:
        """Samples that were not taken before the next was due, or because there was no device to read."""
        return self.main.missed

    @property
    def lateness(self) -> float:
        """How late the last sample began (seconds)."""
        return self.main.lateness

    @property
    def success_wall_ns(self) -> int | None:
        """Wall time of the last sample that went well."""
        return self.main.success_wall_ns
