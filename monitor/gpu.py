"""One GPU or MIG device: what is sampled of it, into which rings, and what becomes of errors."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pynvml

from monitor.nvml import DEAR, FAST, LOST, SLOW, UNSUPPORTED, Call, Device, Memory, Reader, Values
from monitor.processes import Processes
from monitor.sampler import CLOCKS, SECOND, Clocks, Governor, Sampler, Schedule, Source
from monitor.timeline import Ring, Series, Timeline

log = logging.getLogger(__name__)

UNATTRIBUTED = "unattributed"
MAX_SERVERS = 16
PROCESSES_HZ, SLOW_HZ, DEAR_HZ = 100, 20, 1
UNKNOWN_BYTES = 2**64 - 1
# In the order in which `Reader.memory` answers them.
MEMORY_PARTS = ("total", "reserved", "free", "used")
USED = MEMORY_PARTS.index("used")
NO_MEMORY: Memory = (math.nan, math.nan, math.nan, math.nan)
NONE_MISSED = math.nan
# Lines about one call, so that one that flaps does not fill the log.
MAX_LINES = 20
# A call that is not supported is tried again after so long; a device is lost when its main call fails for so long.
RETRY_NS, FAILING_NS = 60 * SECOND, 5 * SECOND
# A reason for lower clocks is taken to last until the next sample, if that comes within so long.
THROTTLED_NS = 2 * SECOND

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

    @property
    def slow_hz(self) -> int:
        """How often utilization, power, clocks, reasons for lower ones, and temperature are sampled."""
        return min(self.hz, SLOW_HZ)


@dataclass(frozen=True)
class Sampling:
    """What all GPUs are sampled with."""

    timeline: Timeline
    processes: Processes
    rates: Rates
    governor: Governor
    clocks: Clocks = CLOCKS


class Gpu:
    """Samples one GPU or MIG device, while it is there.

    `device` is None while it is lost: then nothing is read, and its series are absent. It is `expected` until the
    driver no longer lists it. `busy` tells of each thread whether it may be inside a call on the device.
    """

    def __init__(self, device: Device, sampling: Sampling) -> None:
        self.gpu = device.gpu
        self.identity = device
        self.device: Device | None = None
        self.expected = True
        self.gone_ns = 0
        self.errors: Counter[str] = Counter()
        self.throttled: dict[str, float] = {}
        self.samplers: list[Sampler] = []
        self.governed: list[Sampler] = []
        self.rings: list[Ring] = []
        self.busy: dict[str, bool] = {}
        self.clocks = sampling.clocks
        self._said: dict[str, list[str]] = {}
        self._throttling: tuple[int, Values] = (0, {})
        tiers = [
            make(sampling)
            for tier, make in (("fast", self._fast), ("slow", self._slow), ("dear", self._dear))
            if tier in device.tiers
        ]
        self.source = Source(f"gpu{self.gpu}", tiers[0], self.samplers)
        self.attach(device)

    def attach(self, device: Device) -> None:
        """Sample the device from now on."""
        self.expected = True
        self.identity = self.device = device

    def detach(self) -> None:
        """Sample nothing, and show nothing, until there is a device again."""
        self.device = None
        for ring in self.rings:
            ring.clear()

    def lose(self, error: object) -> None:
        """Give the device up until NVML has been opened anew."""
        self.source.lost, self.source.lost_ns = True, self.clocks.time_ns()
        self.say("device", f"lost, {error}; it is looked for every few seconds")
        self.detach()

    def settled(self) -> bool:
        """Tell whether no thread is inside a call on a device; once detached, none will begin one."""
        return not any(self.busy.values())

    def hangs(self) -> str:
        """Name the threads that are inside a call."""
        return ", ".join(name for name, busy in self.busy.copy().items() if busy)

    def broken(self) -> bool:
        """Tell whether what it is mainly sampled for has failed for seconds, whatever the error."""
        device = self.device
        if device is None:
            return False
        main, before_ns = _main(device), self.clocks.time_ns() - FAILING_NS
        return bool(main) and all(name in device.failing and device.failing[name] <= before_ns for name in main)

    def attempt(self, name: str, device: Device, call: Callable[[], Answer]) -> Answer | None:
        """Make a call, unless the device does not support it; None when there is no answer."""
        if name in device.unsupported and self.clocks.time_ns() - device.unsupported[name] < RETRY_NS:
            return None
        try:
            answer = call()
        except pynvml.NVMLError as error:
            self.failed(name, device, error)
            return None
        if self.source.lost or name in device.failing or name in device.unsupported:
            self.answered(name, device)
        return answer

    def answered(self, name: str, device: Device) -> None:
        """Note that a call has an answer, after it had none or the device was lost."""
        if self.device is not device:
            return
        if self.source.lost and name in _main(device):
            self.source.lost = False
            self.say("device", "back")
        if device.failing.pop(name, None) is not None or device.unsupported.pop(name, None) is not None:
            self.say(name, "answers again")

    def failed(self, name: str, device: Device, error: pynvml.NVMLError) -> None:
        """Note that a call failed, and what that says of the call or the device."""
        if self.device is not device:
            # NVML is being opened anew.
            return
        if error.value in UNSUPPORTED:
            device.unsupported[name] = self.clocks.time_ns()
            self.say(name, "not supported, its series stay absent")
            return
        self.errors[name] += 1
        if error.value in LOST:
            self.lose(f"NVML says: {error}")
        elif name not in device.failing:
            device.failing[name] = self.clocks.time_ns()
            self.say(name, f"fails, NVML says: {error}; its series are absent meanwhile")

    def say(self, name: str, text: str) -> None:
        """Log what has changed about a call or the device, once and not for ever."""
        said = self._said.setdefault(name, [])
        if said[-1:] != [text] and len(said) < MAX_LINES:
            said.append(text)
            last = "; no more is said of it" if len(said) == MAX_LINES else ""
            log.warning("GPU %s: %s: %s%s", self.gpu, name, text, last)

    def _fast(self, sampling: Sampling) -> Schedule:
        fast = Fast(self, sampling)
        self._sampled("fast", fast.schedule, fast.rings)
        return fast.schedule

    def _slow(self, sampling: Sampling) -> Schedule:
        hz = sampling.rates.slow_hz
        ring = sampling.timeline.ring(f"gpu{self.gpu}-slow", sampling.rates.seconds * hz, 12)
        schedule = Schedule(hz, partial(self._read, "slow", SLOW, ring), sampling.governor, sampling.clocks)
        self.errors.update(dict.fromkeys(SLOW, 0))
        self._sampled("slow", schedule, [ring])
        return schedule

    def _dear(self, sampling: Sampling) -> Schedule:
        """Sample each dear call in a thread and a ring of its own: one that hangs hides no other."""
        self.errors.update(dict.fromkeys((*DEAR, "xid"), 0))
        for name, call in DEAR.items():
            # Each has one value, or one of each of two kinds.
            ring = sampling.timeline.ring(f"gpu{self.gpu}-{name}", sampling.rates.seconds * DEAR_HZ, 2)
            schedule = Schedule(DEAR_HZ, partial(self._read, name, {name: call}, ring), clocks=sampling.clocks)
            self._sampled(name, schedule, [ring])
        return schedule

    def _sampled(self, tier: str, schedule: Schedule, rings: list[Ring]) -> None:
        self.rings += rings
        self.busy[tier] = False
        sampler = Sampler(f"gpu{self.gpu}-{tier}", schedule.steps())
        self.samplers.append(sampler)
        if tier in ("fast", "slow"):
            self.governed.append(sampler)

    def _read(self, tier: str, calls: Mapping[str, Call], ring: Ring, _: float) -> bool:
        # In this order: whoever detaches the device sees either that a call may be under way or that none will begin.
        self.busy[tier] = True
        try:
            device = self.device
            if device is None:
                return False
            readings = {}
            for name, call in calls.items():
                for (metric, detail), value in (self.attempt(name, device, partial(call, device)) or {}).items():
                    readings[Series(metric, gpu=self.gpu, detail=detail)] = value
            if self.device is device:
                ring.append(readings)
                if tier == "slow":
                    self._count_throttled(readings)
            return bool(readings)
        finally:
            self.busy[tier] = False

    def _count_throttled(self, readings: Mapping[Series, float]) -> None:
        """Add up the seconds in which each reason held the clocks down."""
        time_ns = self.clocks.time_ns()
        (before_ns, before), now = self._throttling, Values()
        seconds = (time_ns - before_ns) / SECOND if time_ns - before_ns <= THROTTLED_NS else 0.0
        throttled = self.throttled.copy()
        for series, value in readings.items():
            if series.metric == "gpu_throttled" and series.detail:
                now[series.metric, series.detail] = value
                was = before.get((series.metric, series.detail), 0.0)
                throttled[series.detail] = throttled.get(series.detail, 0.0) + seconds * was
        # A new dict, because others may be going through the old one.
        self.throttled, self._throttling = throttled, (time_ns, now)


def _main(device: Device) -> list[str]:
    """Name the calls that a device is mainly sampled for: its memory, or what else there is."""
    calls = FAST if "fast" in device.tiers else tuple(SLOW)
    supported = [name for name in calls if name not in device.unsupported]
    return supported[:1] if "fast" in device.tiers else supported


class Fast:
    """Reads the memory, and less often the processes, with as little work as Python allows.

    The parts, of each server and `unattributed`, add up to what the device has in use. Where NVML counts more for the
    processes than the device has in use, as it may when they share memory, what is unattributed is below zero.
    """

    def __init__(self, gpu: Gpu, sampling: Sampling) -> None:
        timeline, rates = sampling.timeline, sampling.rates
        self.schedule = Schedule(rates.hz, self.tick, sampling.governor, sampling.clocks)
        self._gpu = gpu
        self._processes = sampling.processes
        self._clock = sampling.clocks.time_ns
        self._memory_ring = timeline.ring(f"gpu{gpu.gpu}-memory", rates.seconds * rates.hz, 6)
        self._parts_ring = timeline.ring(f"gpu{gpu.gpu}-processes", rates.seconds * rates.processes_hz, MAX_SERVERS + 1)
        self.rings = [self._memory_ring, self._parts_ring]
        for part in MEMORY_PARTS:
            self._memory_ring.keep(Series(f"gpu_memory_{part}_bytes", gpu=gpu.gpu))
        for name in ("monitor_sample_lateness_seconds", "monitor_samples_missed"):
            self._memory_ring.keep(Series(name, detail=f"gpu{gpu.gpu}"))
        self._rest = self._parts_ring.keep(Series("gpu_process_memory_bytes", UNATTRIBUTED, gpu.gpu))
        self._no_parts = [math.nan] * (MAX_SERVERS + 1)
        gpu.errors.update(dict.fromkeys(FAST, 0))
        self._device: Device | None = None
        self._reader: Reader | None = None
        # Of each process its column, as long as neither the servers nor the columns change.
        self._columns: dict[int, int] = {}
        self._known_for: tuple[int, object] = (-1, None)
        # A tenth less, so that a tick that is a little early is not passed over.
        self._every_ns = SECOND * 9 // 10 // rates.processes_hz
        self._next_ns = 0

    def tick(self, lateness: float) -> bool:
        """Read the device; answer whether that went well."""
        gpu = self._gpu
        # In this order: whoever detaches the device sees either that a call may be under way or that none will begin.
        gpu.busy["fast"] = True
        try:
            device = gpu.device
            if device is None:
                return False
            if device is not self._device or self._reader is None:
                self._device, self._reader = device, Reader(device.handle)
            memory, well = gpu.attempt("memory", device, self._reader.memory), False
            time_ns = self._clock()
            if time_ns >= self._next_ns and gpu.device is device:
                self._next_ns = time_ns + self._every_ns
                memory, well = self._read_parts(device, self._reader, memory)
            if gpu.device is device:
                self._memory_ring.put((*(memory or NO_MEMORY), lateness, self.schedule.behind or NONE_MISSED))
            return memory is not None or (well and "memory" in device.unsupported)
        finally:
            gpu.busy["fast"] = False

    def _read_parts(self, device: Device, reader: Reader, memory: Memory | None) -> tuple[Memory | None, bool]:
        """Keep what each server has, and the rest; answer the memory that they add up to, and success."""
        for _ in range(2):
            running = self._gpu.attempt("processes", device, reader.processes)
            if running is None:
                if self._gpu.device is device:
                    self._parts_ring.clear()
                return memory, False
            parts, known = self._parts(running)
            if memory is None or known <= memory[USED]:
                break
            # They have grown since the device was read: read that again. Less than before? Then all again.
            memory = self._gpu.attempt("memory", device, reader.memory)
            if memory is None or known <= memory[USED]:
                break
        if memory:
            parts[self._rest] = memory[USED] - known
        if self._gpu.device is device:
            self._parts_ring.put(parts)
        return memory, True

    def _parts(self, running: Running) -> tuple[list[float], float]:
        """Sum the memory (bytes) by server, and that of all servers whose memory is known.

        The memory of a process may be unknown (under MIG, in WSL, without permission): then its server's is absent,
        not zero.
        """
        known_for = self._processes.generation, self._parts_ring.columns
        if known_for[0] != self._known_for[0] or known_for[1] is not self._known_for[1]:
            self._known_for, self._columns = known_for, {}
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
