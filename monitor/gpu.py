"""One GPU or MIG device: what is sampled of it, into which rings, and what becomes of errors."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pynvml

from monitor.fast import Fast
from monitor.nvml import DEAR, FAST, LOST, SLOW, UNSUPPORTED, Call, Device, Values
from monitor.processes import Processes
from monitor.sampler import SECOND, Allowance, Governor, Sampler, Schedule, Source, within
from monitor.timeline import CLOCKS, STALE_NS, Clocks, Ring, Series, Timeline

log = logging.getLogger(__name__)

PROCESSES_HZ, SLOW_HZ, DEAR_HZ = 100, 10, 1
# Of all that sampling may take, what that of all GPUs may: memory, slow values; the lists of processes; dear values.
SHARES = {"fast": 0.6, "slow": 0.1}
PROCESSES_SHARE, DEAR_SHARE = 0.1, 0.05
# Lines about one call, so that one that flaps does not fill the log.
MAX_LINES = 20
# A call that is not supported is tried again after so long; a device is lost when its main call fails for so long.
RETRY_NS, FAILING_NS = 60 * SECOND, 5 * SECOND
# A reason for lower clocks is taken to last until the next sample, if that comes within so long.
THROTTLED_NS = 2 * SECOND

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Rates:
    """How often the memory is sampled (hertz), within which share of a core, and for how many seconds it is kept."""

    hz: int
    max_cpu: float
    seconds: int

    @property
    def processes_hz(self) -> int:
        """How often the processes are sampled at most: as long as the memory in use changes."""
        return min(self.hz, PROCESSES_HZ)

    @property
    def slow_hz(self) -> int:
        """How often utilization, power, clocks, reasons for lower ones, and temperature are sampled."""
        return min(self.hz, SLOW_HZ)


@dataclass(frozen=True)
class Sampling:
    """What all GPUs are sampled with: a governor for each tier that slows down, `reading` for lists of processes."""

    timeline: Timeline
    processes: Processes
    rates: Rates
    governors: Mapping[str, Governor]
    reading: Allowance
    clocks: Clocks = CLOCKS
    cards: int = 1


class Gpu:
    """Samples one GPU or MIG device, while it is there.

    `device` is None while it is lost: then nothing is read, and its series are absent. It is `expected` until the
    driver no longer lists it. `busy` tells of each thread since when it may be inside a call on the device, 0 if it is
    not (CLOCK_MONOTONIC, ns).
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
        self.governed: dict[str, Sampler] = {}
        self.rings: list[Ring] = []
        self.busy: dict[str, int] = {}
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

    def cpu_seconds(self, tier: str) -> float:
        """CPU that a governed tier has used until now."""
        return self.governed[tier].cpu_seconds if tier in self.governed else 0.0

    def settled(self) -> bool:
        """Tell whether no thread is inside a call on a device; once detached, none will begin one."""
        return not any(self.busy.values())

    def hangs(self, before_ns: int) -> str:
        """Name the threads that have been inside a call since before that."""
        return ", ".join(name for name, since_ns in self.busy.copy().items() if 0 < since_ns < before_ns)

    def tell_hangs(self) -> None:
        """Say when NVML does not return from a call, and when it returns after all."""
        if hanging := self.hangs(self.clocks.time_ns() - STALE_NS):
            self.say("hang", f"NVML does not return from a call ({hanging}); its series are absent meanwhile")
        elif "hang" in self._said:
            self.say("hang", "NVML returns from calls again")

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
        self._sampled("fast", fast.schedule.steps(), fast.rings)
        return fast.schedule

    def _slow(self, sampling: Sampling) -> Schedule:
        hz = sampling.rates.slow_hz
        ring = sampling.timeline.ring(f"gpu{self.gpu}-slow", sampling.rates.seconds * hz, 12)
        schedule = Schedule(hz, partial(self._read, "slow", SLOW, ring), sampling.governors["slow"], sampling.clocks)
        self.errors.update(dict.fromkeys(SLOW, 0))
        self._sampled("slow", schedule.steps(), [ring])
        return schedule

    def _dear(self, sampling: Sampling) -> Schedule:
        """Sample each dear call in a thread and a ring of its own: one that hangs hides no other.

        The more GPUs there are, the longer a value may hold: so the calls of all of them take no more than of one.
        """
        self.errors.update(dict.fromkeys((*DEAR, "xid"), 0))
        max_cpu = sampling.rates.max_cpu * DEAR_SHARE / len(DEAR) / sampling.cards
        stale_ns = STALE_NS * sampling.cards
        for name, call in DEAR.items():
            # Each has one value, or one of each of two kinds.
            ring = sampling.timeline.ring(f"gpu{self.gpu}-{name}", sampling.rates.seconds * DEAR_HZ, 2, stale_ns)
            schedule = Schedule(DEAR_HZ, partial(self._read, name, {name: call}, ring), clocks=sampling.clocks)
            self._sampled(name, within(max_cpu, 0.8 * stale_ns / SECOND, schedule.steps()), [ring])
        return schedule

    def _sampled(self, tier: str, steps: Iterator[float], rings: list[Ring]) -> None:
        self.rings += rings
        self.busy[tier] = 0
        sampler = Sampler(f"gpu{self.gpu}-{tier}", steps)
        self.samplers.append(sampler)
        if tier in SHARES:
            self.governed[tier] = sampler

    def _read(self, tier: str, calls: Mapping[str, Call], ring: Ring, _: float) -> bool | None:
        # In this order: whoever detaches the device sees either that a call may be under way or that none will begin.
        self.busy[tier] = self.clocks.time_ns()
        try:
            device = self.device
            if device is None:
                return None
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
            self.busy[tier] = 0

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
