"""One GPU or MIG device: what is sampled of it, into which rings, and what becomes of errors."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pynvml

from monitor.nvml import DEAR, FAST, LOST, SLOW, UNSUPPORTED, Call, Device, Memory, Reader, count_xids
from monitor.processes import Processes
from monitor.sampler import SECOND, Sampler, Schedule, Source
from monitor.timeline import Ring, Series, Timeline

log = logging.getLogger(__name__)

UNATTRIBUTED = "unattributed"
MAX_SERVERS = 16
PROCESSES_HZ, SLOW_HZ, DEAR_HZ = 100, 20, 1
UNKNOWN_BYTES = 2**64 - 1
NO_MEMORY: Memory = (math.nan, math.nan, math.nan, math.nan)
# Lines about one call, so that one that flaps does not fill the log.
MAX_LINES = 20

Answer = TypeVar("Answer")
Running = Iterable[tuple[int, int, int, int]]


@dataclass(frozen=True)
class Rates:
    """How often the memory is sampled (hertz), within which share of a core, and for how many seconds it is kept."""

    hz: int
    max_cpu: float
    seconds: int

    @property
    def processes_hz(self) -> int:
        """How often the processes are sampled."""
        return min(self.hz, PROCESSES_HZ)


class Gpu:
    """Samples one GPU or MIG device, while it is there.

    `device` is None while it is lost: then nothing is read, and its series are absent.
    """

    def __init__(self, device: Device, timeline: Timeline, processes: Processes, rates: Rates) -> None:
        self.gpu = device.gpu
        self.identity = device
        self.device: Device | None = None
        self.errors: Counter[str] = Counter()
        self.samplers: list[Sampler] = []
        self._xids: Counter[int] = Counter()
        self._said: dict[str, list[str]] = {}
        self._rings: list[Ring] = []
        schedules = [
            make(timeline, processes, rates)
            for tier, make in (("fast", self._fast), ("slow", self._slow), ("dear", self._dear))
            if tier in device.tiers
        ]
        self.source = Source(f"gpu{self.gpu}", schedules[0], tuple(schedules[1:]))
        self.attach(device)

    def attach(self, device: Device) -> None:
        """Sample the device from now on."""
        self.identity = self.device = device

    def detach(self) -> None:
        """Sample nothing, and show nothing, until there is a device again."""
        self.device = None
        for ring in self._rings:
            ring.clear()

    def attempt(self, name: str, device: Device, call: Callable[[], Answer]) -> Answer | None:
        """Make a call, unless the device does not support it; None when there is no answer."""
        if name in device.unsupported:
            return None
        try:
            answer = call()
        except pynvml.NVMLError as error:
            self._failed(name, device, error)
            return None
        if self.source.lost and self.device is device:
            self.source.lost = False
            self.say("device", "back")
        if name in device.failing:
            device.failing.remove(name)
            self.say(name, "answers again")
        return answer

    def _failed(self, name: str, device: Device, error: pynvml.NVMLError) -> None:
        if self.device is not device:
            # NVML is being opened anew.
            return
        if error.value in UNSUPPORTED:
            device.unsupported.add(name)
            self.say(name, "not supported, its series stay absent")
            return
        self.errors[name] += 1
        if error.value in LOST:
            self.source.lost, self.source.lost_ns = True, time.monotonic_ns()
            self.say("device", f"lost, NVML says: {error}; it is looked for every few seconds")
            self.detach()
        elif name not in device.failing:
            device.failing.add(name)
            self.say(name, f"fails, NVML says: {error}; its series are absent meanwhile")

    def say(self, name: str, text: str) -> None:
        """Log what has changed about a call or the device, once and not for ever."""
        said = self._said.setdefault(name, [])
        if said[-1:] != [text] and len(said) < MAX_LINES:
            said.append(text)
            last = "; no more is said of it" if len(said) == MAX_LINES else ""
            log.warning("GPU %s: %s: %s%s", self.gpu, name, text, last)

    def _fast(self, timeline: Timeline, processes: Processes, rates: Rates) -> Schedule:
        fast = Fast(self, timeline, processes, rates)
        return self._sampled("fast", Schedule(rates.hz, fast.tick, rates.max_cpu), fast.rings)

    def _slow(self, timeline: Timeline, _: Processes, rates: Rates) -> Schedule:
        hz = min(rates.hz, SLOW_HZ)
        ring = timeline.ring(f"gpu{self.gpu}-slow", rates.seconds * hz, 12)
        self.errors.update(dict.fromkeys(SLOW, 0))
        return self._sampled("slow", Schedule(hz, partial(self._read, SLOW, ring)), [ring])

    def _dear(self, timeline: Timeline, _: Processes, rates: Rates) -> Schedule:
        ring = timeline.ring(f"gpu{self.gpu}-dear", rates.seconds * DEAR_HZ, 24)
        calls = DEAR | {"xid": partial(count_xids, counts=self._xids)}
        self.errors.update(dict.fromkeys(calls, 0))
        return self._sampled("dear", Schedule(DEAR_HZ, partial(self._read, calls, ring)), [ring])

    def _sampled(self, tier: str, schedule: Schedule, rings: list[Ring]) -> Schedule:
        self._rings += rings
        self.samplers.append(Sampler(f"gpu{self.gpu}-{tier}", schedule.steps()))
        return schedule

    def _read(self, calls: Mapping[str, Call], ring: Ring, _: float) -> bool:
        device = self.device
        if device is None:
            return False
        readings = {}
        for name, call in calls.items():
            for (metric, detail), value in (self.attempt(name, device, partial(call, device)) or {}).items():
                readings[Series(metric, gpu=self.gpu, detail=detail)] = value
        if self.device is device:
            ring.append(readings)
        return bool(readings)


class Fast:
    """Reads the memory, and less often the processes, with as little work as Python allows.

    The parts, of each server and `unattributed`, add up to what the device has in use.
    """

    def __init__(self, gpu: Gpu, timeline: Timeline, processes: Processes, rates: Rates) -> None:
        self._gpu = gpu
        self._processes = processes
        self._memory_ring = timeline.ring(f"gpu{gpu.gpu}-memory", rates.seconds * rates.hz, 5)
        self._parts_ring = timeline.ring(f"gpu{gpu.gpu}-processes", rates.seconds * rates.processes_hz, MAX_SERVERS + 1)
        self.rings = [self._memory_ring, self._parts_ring]
        for part in ("used", "free", "reserved", "total"):
            self._memory_ring.column(Series(f"gpu_memory_{part}_bytes", gpu=gpu.gpu))
        self._memory_ring.column(Series("monitor_sample_lateness_seconds", detail=f"gpu{gpu.gpu}"))
        self._rest = self._part(UNATTRIBUTED)
        self._no_parts = [math.nan] * (MAX_SERVERS + 1)
        gpu.errors.update(dict.fromkeys(FAST, 0))
        self._device: Device | None = None
        self._reader: Reader | None = None
        self._columns: dict[int, int] = {}
        self._generation = -1
        # A tenth less, so that a tick that is a little early is not passed over.
        self._every_ns = SECOND * 9 // 10 // rates.processes_hz
        self._next_ns = 0

    def tick(self, lateness: float) -> bool:
        """Read the device; answer whether that went well."""
        device = self._gpu.device
        if device is None:
            return False
        if device is not self._device or self._reader is None:
            self._device, self._reader = device, Reader(device.handle)
        memory = self._gpu.attempt("memory", device, self._reader.memory)
        if self._gpu.device is not device:
            return False
        well = memory is not None
        time_ns = time.monotonic_ns()
        if time_ns >= self._next_ns:
            self._next_ns = time_ns + self._every_ns
            running = self._gpu.attempt("processes", device, self._reader.processes)
            if running is not None:
                well = well or "memory" in device.unsupported
                memory = self._put_parts(device, self._reader, running, memory)
            elif self._gpu.device is device:
                self._parts_ring.clear()
        if self._gpu.device is device:
            self._memory_ring.put((*(memory or NO_MEMORY), lateness))
        return well

    def _put_parts(self, device: Device, reader: Reader, running: Running, memory: Memory | None) -> Memory | None:
        """Keep what each server has, and the rest; answer the memory that they add up to."""
        parts, known = self._parts(running)
        if memory and known > memory[0]:
            # They have grown since the device was read.
            memory = self._gpu.attempt("memory", device, reader.memory)
        if memory:
            parts[self._rest] = max(0.0, memory[0] - known)
        if self._gpu.device is device:
            self._parts_ring.put(parts)
        return memory

    def _parts(self, running: Running) -> tuple[list[float], float]:
        """Sum the memory (bytes) by server, and that of all servers whose memory is known.

        The memory of a process may be unknown (under MIG, in WSL, without permission): then its server's is absent,
        not zero.
        """
        if self._generation != self._processes.generation:
            self._generation, self._columns = self._processes.generation, {}
        sums: dict[int, float] = {}
        for pid, size, _, _ in running:
            column = self._columns.get(pid)
            if column is None:
                column = self._columns[pid] = self._part(self._processes.server_of(pid))
            if column != self._rest:
                sums[column] = sums.get(column, 0.0) + (math.nan if size == UNKNOWN_BYTES else size)
        row, known = self._no_parts.copy(), 0.0
        for column, total in sums.items():
            row[column] = total
            known += 0.0 if math.isnan(total) else total
        return row, known

    def _part(self, server: str | None) -> int:
        """Answer the column of a server; that of the rest for what is of no server, or of one too many."""
        series = Series("gpu_process_memory_bytes", server or UNATTRIBUTED, self._gpu.gpu)
        column = self._parts_ring.column(series)
        return self._rest if column is None else column
