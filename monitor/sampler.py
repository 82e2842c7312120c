"""A thread that takes readings on an absolute schedule and measures what that costs."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from monitor.timeline import Clock, Readings, Series, Timeline, now


@dataclass(frozen=True, slots=True)
class Task:
    """What a sampler reads, and the series that say how late it began and what CPU was used, both in seconds."""

    name: str
    read: Callable[[], Readings]
    lateness: Series
    cpu: Series
    cpu_clock: Callable[[], float] = time.thread_time


class Sampler:
    """Appends what its task reads to the timeline, `hz` times a second.

    Everything that can block has a sampler of its own, so that a GPU that hangs or a dear reading of /proc delays no
    other.
    """

    def __init__(self, task: Task, timeline: Timeline, hz: int, clock: Clock = now) -> None:
        self._task = task
        self._timeline = timeline
        self._period_ns = 1_000_000_000 // hz
        self._clock = clock
        self._stopping = threading.Event()
        # A daemon, because a thread stuck in the driver must not keep the program alive.
        self._thread = threading.Thread(target=self._run, name=task.name, daemon=True)

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

    def tick(self, lateness_ns: int) -> None:
        """Take one sample."""
        readings = self._task.read()
        readings[self._task.lateness] = lateness_ns / 1e9
        readings[self._task.cpu] = self._task.cpu_clock()
        self._timeline.append(self._task.name, readings)

    def _run(self) -> None:
        start_ns = due_ns = self._clock().time_ns
        while not self._stopping.wait((due_ns - self._clock().time_ns) / 1e9):
            time_ns = self._clock().time_ns
            self.tick(time_ns - due_ns)
            due_ns = next_due(start_ns, self._period_ns, time_ns)


def next_due(start_ns: int, period_ns: int, time_ns: int) -> int:
    """Answer the first moment of the schedule after time_ns; moments that have passed are skipped, never made up."""
    return start_ns + ((time_ns - start_ns) // period_ns + 1) * period_ns
