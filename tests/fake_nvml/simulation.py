"""Samples the GPUs of a script in simulated time: clock and fake NVML stand still between two ticks."""

import ctypes
import heapq
import os
from itertools import count, repeat
from pathlib import Path
from random import Random

from monitor.gpu import Rates
from monitor.gpus import Gpus
from monitor.processes import Processes
from monitor.sampler import SECOND, Sampler
from monitor.timeline import Clocks, Timeline
from tests.fake_nvml.fake import Script

WALL_NS = 10**18
# The wait inside NVML, which in simulated time is none. A lost GPU is looked for before it ends: what came with the
# loss is then left to be counted when NVML is closed.
EVENTS_WAIT = 10.0


class Simulation:
    """GPUs whose threads are run in turn, each when it wants to be woken up; time 0 is that of the script.

    LD_LIBRARY_PATH and FAKE_NVML_SCRIPT are those of the fake NVML. Threads wake up late by less than `late_ns`.
    """

    def __init__(self, script: Script, rates: Rates, late_ns: int = 0) -> None:
        script.save()
        library = ctypes.CDLL("libnvidia-ml.so.1")
        self.script = script
        self._clock = ctypes.c_longlong.in_dll(library, "fake_nvml_now")
        self._changed = ctypes.c_int.in_dll(library, "fake_nvml_changed")
        self._opened = ctypes.c_long.in_dll(library, "fake_nvml_opened")
        # Zero would be no simulated time.
        self._clock.value = 1
        clocks = Clocks(self.now_ns, lambda: self.now_ns() + WALL_NS)
        self.timeline = Timeline(clocks)
        self.processes = Processes(self.now_ns)
        self.gpus = Gpus(self.timeline, self.processes, rates, clocks)
        self._late = map(Random(1).randrange, repeat(late_ns)) if late_ns else repeat(0)
        self._order = count()
        self._waiting: list[tuple[int, int, Sampler]] = []
        self._known: set[Sampler] = set()

    def now_ns(self) -> int:
        """The time."""
        return self._clock.value

    def opened(self) -> int:
        """How often NVML was opened."""
        return self._opened.value

    def change(self) -> None:
        """Let a changed script take effect."""
        self.script.save()
        self._changed.value = 1

    def run(self, until: float) -> "Simulation":
        """Go on until a moment (seconds)."""
        until_ns = round(until * SECOND)
        self._follow()
        while True:
            due_ns, _, sampler = self._waiting[0]
            if due_ns > until_ns:
                self._clock.value = until_ns
                return self
            self._clock.value = max(due_ns, self.now_ns())
            wait = next(sampler.steps)
            if sampler.name == "gpus-events":
                wait = EVENTS_WAIT
            due_ns = self.now_ns() + round(wait * SECOND) + next(self._late)
            heapq.heapreplace(self._waiting, (due_ns, next(self._order), sampler))
            if sampler.name == "gpus":
                # It may have found a GPU, or given one up.
                self._follow()

    def _follow(self) -> None:
        samplers = self.gpus.samplers()
        if len(samplers) != len(self._known) or not self._known.issuperset(samplers):
            new = [sampler for sampler in samplers if sampler not in self._known]
            self._known = set(samplers)
            self._waiting = [waiting for waiting in self._waiting if waiting[2] in self._known]
            self._waiting += [(self.now_ns(), next(self._order), sampler) for sampler in new]
            heapq.heapify(self._waiting)


def script() -> Script:
    """The script that the environment names."""
    return Script(Path(os.environ["FAKE_NVML_SCRIPT"]), origin_ns=0)
