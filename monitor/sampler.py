"""Readings on an absolute schedule, with what they cost, and the thread that takes them."""

import threading
import time
from collections.abc import Callable, Iterator
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
            if self._stopping.wait(min(seconds, threading.TIMEOUT_MAX)):
                return


def samples(task: Task, timeline: Timeline, hz: int, clock: Clock = now) -> Iterator[float]:
    """Append what the task reads to the timeline, `hz` times a second; yield the seconds until the next time."""
    period_ns = 1_000_000_000 // hz
    start_ns = due_ns = clock().time_ns
    while True:
        time_ns = clock().time_ns
        readings = task.read()
        readings[task.lateness] = (time_ns - due_ns) / 1e9
        readings[task.cpu] = task.cpu_clock()
        timeline.append(task.name, readings)
        due_ns = next_due(start_ns, period_ns, time_ns)
        yield (due_ns - clock().time_ns) / 1e9


def next_due(start_ns: int, period_ns: int, time_ns: int) -> int:
    """Answer the first moment of the schedule after time_ns; moments that have passed are skipped, never made up."""
    return start_ns + ((time_ns - start_ns) // period_ns + 1) * period_ns
