"""Ticks on an absolute schedule, within a budget of CPU, and the thread that takes them."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

SECOND = 1_000_000_000
# A source is up while its last good tick is no older than this.
STALE_NS = 5 * SECOND
# Reviews, one a second, in a row that must leave room before a slowed source goes faster again, and how much room.
CALM_REVIEWS = 30
ROOM = 0.8


class Sampler:
    """A thread that takes a step, waits as many seconds as it yields, and so on.

    Everything that can block has a sampler of its own, so that a GPU that hangs or a dear reading of /proc delays no
    other.
    """

    def __init__(self, name: str, steps: Iterator[float]) -> None:
        self._steps = steps
        self._stopping = threading.Event()
        # A daemon, because a thread stuck in the driver must not keep the program alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to sample; can be called once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, or leave it behind after a second if it is stuck."""
        self._stopping.set()
        self._thread.join(timeout=1)

    def alive(self) -> bool:
        """Tell whether samples are being taken."""
        return self._thread.is_alive()

    def _run(self) -> None:
        for seconds in self._steps:
            if seconds < 0.2:
                # Wakes up for less CPU than an event does.
                time.sleep(seconds)
                if self._stopping.is_set():
                    return
            elif self._stopping.wait(min(seconds, threading.TIMEOUT_MAX)):
                return


class Governor:
    """Divides a rate so that a source keeps within its share of a core."""

    def __init__(self, max_cpu: float, most: int) -> None:
        self.divider = 1
        self._max_cpu = max_cpu
        self._most = most
        self._calm = 0

    def review(self, share: float) -> None:
        """Halve the rate after a second of too much CPU; double it after many that had room for that."""
        if share > self._max_cpu:
            self._calm = 0
            if self.divider * 2 <= self._most:
                self.divider *= 2
        elif self.divider > 1 and share * 2 <= ROOM * self._max_cpu:
            self._calm += 1
            if self._calm == CALM_REVIEWS:
                self._calm = 0
                self.divider //= 2
        else:
            self._calm = 0


class Schedule:
    """Calls `tick` `hz` times a second, counted from the start; it is told its lateness (s) and answers success.

    A tick that begins late is not moved on the schedule; those that were missed by then are skipped, never made up.
    With `max_cpu` (a share of a core) ticks are left out rather than take more; what remains is on the same grid.
    """

    def __init__(
        self,
        hz: int,
        tick: Callable[[float], bool],
        max_cpu: float | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.wanted_hz = hz
        self.lateness = 0.0
        self.cpu_seconds = 0.0
        self.success_ns: int | None = None
        self.tick = tick
        self._governor = Governor(max_cpu, hz) if max_cpu else None
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._slowed = False

    @property
    def hz(self) -> float:
        """The rate that it keeps now."""
        return self.wanted_hz / self._governor.divider if self._governor else self.wanted_hz

    def steps(self) -> Iterator[float]:
        """Tick when it is time; yield the seconds until the next time."""
        clock, hz = self._clock, self.wanted_hz
        start = reviewed = clock()
        number, due, divider = 0, start, 1
        while True:
            time_ns = clock()
            if time_ns < due:
                yield (due - time_ns) / SECOND
                continue
            self.lateness = (time_ns - due) / SECOND
            if self.tick(self.lateness):
                self.success_ns = time_ns
            if time_ns - reviewed >= SECOND:
                divider = self._review((time_ns - reviewed) / SECOND)
                reviewed = time_ns
            passed = max(number, (time_ns - start) * hz // SECOND)
            number = (passed // divider + 1) * divider
            due = start + number * SECOND // hz
            yield max(0, due - clock()) / SECOND

    def _review(self, seconds: float) -> int:
        before, self.cpu_seconds = self.cpu_seconds, self._cpu_clock()
        if not self._governor:
            return 1
        self._governor.review((self.cpu_seconds - before) / seconds)
        if self._governor.divider > 1 and not self._slowed:
            self._slowed = True
            log.warning(
                "%s needs more than --max-cpu at %d samples a second: it takes fewer for now, see "
                "headroom_monitor_sample_rate_hertz",
                threading.current_thread().name,
                self.wanted_hz,
            )
        return self._governor.divider


@dataclass
class Source:
    """What /metrics tells about one thing that is sampled: its main schedule, and the slower ones beside it.

    One that is known to be lost is down at once, and until it was read again; `lost_ns` is when that was last found.
    """

    name: str
    main: Schedule
    others: tuple[Schedule, ...] = ()
    lost: bool = False
    lost_ns: int = 0

    def up(self, time_ns: int) -> bool:
        """Tell whether it was read well of late."""
        success_ns = self.main.success_ns
        return not self.lost and success_ns is not None and success_ns > max(self.lost_ns, time_ns - STALE_NS - 1)

    @property
    def cpu_seconds(self) -> float:
        """CPU that its threads have used, to the last second."""
        return sum(schedule.cpu_seconds for schedule in (self.main, *self.others))
