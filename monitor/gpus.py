"""All GPUs: found at the start, looked for again when one is lost or the driver restarts, let go when taken away."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pynvml

from monitor.events import Events, Xid
from monitor.gpu import PROCESSES_SHARE, SHARES, Gpu, Rates, Sampling
from monitor.nvml import Device, Found, close_nvml, mig_devices, open_nvml
from monitor.processes import Processes
from monitor.sampler import SECOND, Allowance, Governor, Sampler, Schedule, Source
from monitor.timeline import CLOCKS, Clocks, Timeline

log = logging.getLogger(__name__)

# Seconds between two looks. To open NVML anew interrupts the sampling of the GPUs that are well: while there are such,
# each look in vain doubles the time to the next.
LOOK_EVERY, LOOK_AT_LEAST_EVERY = 3.0, 300.0
# Seconds in which calls that are under way come to their end before NVML is closed; a dear one takes 0.04.
SETTLE, SETTLE_STEP = 0.3, 0.005
# Seconds between two looks for MIG devices, for which NVML stays open.
PARTS_EVERY = 3.0
# Calls that are of no GPU.
NVML_CALLS = ("init", "count", "handle", "xid")
# The driver's list of the GPUs it has, by PCI address. NVML's own is made when it is opened.
CARDS = Path("/proc/driver/nvidia/gpus")


class Gpus:
    """The GPUs of this machine, kept open."""

    def __init__(self, timeline: Timeline, processes: Processes, rates: Rates, clocks: Clocks = CLOCKS) -> None:
        self.found: dict[str, Gpu] = {}
        self.reason: str | None = None
        self._clock = clocks.time_ns
        kinds = {
            "fast": (rates.hz, "memory of GPUs"),
            "slow": (rates.slow_hz, "utilization, power, clocks and temperature of GPUs"),
        }
        self._governors = {tier: Governor(rates.max_cpu * SHARES[tier], *kind) for tier, kind in kinds.items()}
        self._reading = Allowance(rates.max_cpu * PROCESSES_SHARE)
        self._sampling = Sampling(timeline, processes, rates, self._governors, self._reading, clocks)
        self._events = Events(timeline, clocks)
        self._errors: Counter[str] = Counter()
        self._running = False
        self._wait = LOOK_EVERY
        self._next_look_ns = self._next_parts_ns = 0
        watch = Schedule(1, self._watch, clocks=clocks)
        self._own = [
            Sampler("gpus", watch.steps()),
            Sampler("gpus-events", self._events.steps()),
            Sampler("governor", Schedule(1, self._govern, clocks=clocks).steps()),
        ]
        self._nvml = Source("nvml", watch, self._own)
        self._cards = _cards()
        self._parts_listed = True
        self._last = Found([])
        self._open()

    def start(self) -> None:
        """Sample every GPU, and look again for those that get lost."""
        self._running = True
        for sampler in self.samplers():
            sampler.start()

    def samplers(self) -> list[Sampler]:
        """All threads: those of the GPUs, and those that look for them and listen to their errors."""
        return [*self._own, *(sampler for gpu in self.found.values() for sampler in gpu.samplers)]

    def sources(self) -> list[Source]:
        """One for each GPU, and `nvml`, up when the last look at it went well; without a driver there is none.

        A MIG device that was taken away is no source: that is done on purpose.
        """
        nvml = [self._nvml] if self._last.driver else []
        return [*nvml, *(gpu.source for gpu in self.found.values() if gpu.expected or gpu.identity.card)]

    def errors(self) -> dict[tuple[str, str], int]:
        """How many calls failed, by GPU and call; those that are of no GPU (init, count, handle) have "" for it."""
        own = self._errors | Counter(xid=self._events.errors)
        errors = {("", call): own[call] for call in NVML_CALLS} if self._last.driver else {}
        for gpu in self.found.values():
            errors |= {(gpu.gpu, call): count for call, count in gpu.errors.copy().items()}
        return errors

    def identities(self) -> list[Device]:
        """The GPUs and MIG devices that are there now."""
        return [gpu.device for gpu in self.found.values() if gpu.device]

    def xids(self) -> dict[tuple[str, int], Xid]:
        """XID errors since the monitor was started, by GPU and code, those of lost GPUs too."""
        return self._events.xids

    def refused(self) -> int:
        """How many processes use a GPU and have an environment that the kernel does not show."""
        return self._sampling.processes.refused

    def throttled(self) -> dict[tuple[str, str], float]:
        """Seconds in which a reason held the clocks down, by GPU and reason, from the samples."""
        return {(gpu.gpu, reason): sec for gpu in self.found.values() for reason, sec in gpu.throttled.items()}

    def _govern(self, _: float) -> bool:
        for tier, governor in self._governors.items():
            used = sum(gpu.cpu_seconds(tier) for gpu in self.found.values())
            # The threads that read the memory read the lists of processes too, which have a share of their own.
            governor.review(self._clock(), used - (self._reading.used if tier == "fast" else 0.0))
        return True

    def _watch(self, _: float) -> bool:
        """Look at NVML when there is reason to; answer whether the last look went well."""
        time_ns = self._clock()
        for gpu in self.found.values():
            gpu.tell_hangs()
            if gpu.broken():
                gpu.lose("for it has failed for seconds")
            elif not gpu.expected and time_ns - gpu.gone_ns > self._sampling.rates.seconds * SECOND:
                self._forget(gpu)
        cards, self._cards = self._cards, _cards()
        needed = self._needed()
        if cards != self._cards or (needed and time_ns >= self._next_look_ns):
            self._look(time_ns)
        elif not needed and all(gpu.source.up(time_ns) for gpu in self.found.values() if gpu.expected):
            self._wait, self._next_look_ns = LOOK_EVERY, time_ns + int(LOOK_EVERY * SECOND)
        if time_ns >= self._next_parts_ns:
            self._next_parts_ns = time_ns + int(PARTS_EVERY * SECOND)
            self._parts_listed = self._look_for_parts()
        return self._last.complete and self._parts_listed

    def _needed(self) -> bool:
        """Tell whether it can help to open NVML anew."""
        lost = any(gpu.expected and gpu.identity.card and not gpu.device for gpu in self.found.values())
        return self._last.driver and (lost or not self._last.complete or not self.found)

    def _look(self, time_ns: int) -> None:
        well = any(gpu.device for gpu in self.found.values())
        if self._close():
            self._open()
        self._wait = min(2 * self._wait, LOOK_AT_LEAST_EVERY) if well or not self.found else LOOK_EVERY
        self._next_look_ns = time_ns + int(self._wait * SECOND)

    def _close(self) -> bool:
        """Close NVML, unless a call that is under way does not come to its end: then all goes on as it is."""
        gpus = list(self.found.values())
        # Those that are well are not interrupted if a lost one hangs.
        if not _settled([gpu for gpu in gpus if not gpu.device]) or not self._events.close():
            return False
        devices = [gpu.device for gpu in gpus]
        for gpu in gpus:
            gpu.detach()
        if _settled(gpus):
            close_nvml()
            return True
        for gpu, device in zip(gpus, devices, strict=True):
            if device:
                gpu.attach(device)
        self._listen()
        return False

    def _open(self) -> None:
        found = open_nvml(self._errors)
        self._sampling = replace(self._sampling, cards=max(1, len(found.devices)))
        self._take_in(found.devices)
        self._parts_listed = self._look_for_parts()
        self._listen()
        # The driver may have a GPU that NVML, when it was opened, could not list: that one may come back.
        if found.complete and len(self._cards) <= len(found.devices):
            for gpu in self.found.values():
                if gpu.identity.card and gpu.device is None:
                    self._let_go(gpu)
        if found.reason != self.reason and self._running:
            log.warning("GPUs: %s", found.reason or "all are found")
        self.reason, self._last = found.reason, found

    def _look_for_parts(self) -> bool:
        """See which MIG devices there are, for which NVML stays open; answer success."""
        well = True
        for card in [gpu.device for gpu in self.found.values() if gpu.device and gpu.device.split]:
            try:
                parts = mig_devices(card)
            except pynvml.NVMLError:
                self._errors["handle"] += 1
                well = False
                continue
            self._take_in(parts)
            uuids = {part.uuid for part in parts}
            for gpu in self.found.values():
                if gpu.identity.parent == card.gpu and gpu.identity.uuid not in uuids:
                    self._let_go(gpu)
        return well

    def _take_in(self, devices: Sequence[Device]) -> None:
        """Sample devices: those that were known, by their UUID, under the name that they have had."""
        known = {gpu.identity.uuid: gpu for gpu in self.found.values()}
        for device in devices:
            gpu = known.get(device.uuid)
            if gpu is None:
                self._add(device)
            elif gpu.identity.tiers != device.tiers:
                gpu.say("device", "MIG was switched on or off: start the monitor anew")
            elif gpu.device is None:
                device.gpu = gpu.gpu
                gpu.attach(device)

    def _add(self, device: Device) -> None:
        if device.gpu in self.found:
            # The series of another device must not go on with what this one holds.
            device.gpu = f"{device.gpu}:{device.uuid}"
        gpu = Gpu(device, self._sampling)
        # A new dict, because others may be going through the old one.
        self.found = self.found | {device.gpu: gpu}
        if self._running:
            gpu.say("device", f"found, {device.name} {device.uuid}")
            for sampler in gpu.samplers:
                sampler.start()

    def _let_go(self, gpu: Gpu) -> None:
        """Look no more for a device that the driver no longer lists."""
        if gpu.expected:
            gpu.expected, gpu.gone_ns = False, self._clock()
            gpu.source.lost, gpu.source.lost_ns = True, gpu.gone_ns
            gpu.detach()
            gpu.say("device", "taken away, and looked for no more until the driver lists other devices")

    def _forget(self, gpu: Gpu) -> None:
        """Give up what is kept of a device that is gone for longer than samples are kept."""
        if not gpu.settled():
            return
        for sampler in gpu.samplers:
            if sampler.alive():
                sampler.stop()
        timeline = self._sampling.timeline
        timeline.rings = {name: ring for name, ring in timeline.rings.items() if ring not in gpu.rings}
        self.found = {name: other for name, other in self.found.items() if other is not gpu}

    def _listen(self) -> None:
        cards = [gpu.device for gpu in self.found.values() if gpu.device and gpu.device.card]
        for device, error in self._events.listen(cards):
            self.found[device.gpu].failed("xid", device, error)


def _settled(gpus: Sequence[Gpu]) -> bool:
    """Wait until no call on these is under way; false, and said, when one does not come to its end."""
    for _ in range(round(SETTLE / SETTLE_STEP)):
        if all(gpu.settled() for gpu in gpus):
            return True
        time.sleep(SETTLE_STEP)
    for gpu in gpus:
        if hanging := gpu.hangs(gpu.clocks.time_ns() + 1):
            gpu.say("device", f"NVML does not return from a call ({hanging}), and is not opened anew until it does")
    return False


def _cards() -> frozenset[str]:
    try:
        return frozenset(path.name for path in CARDS.iterdir())
    except OSError:
        # Another system, or no driver.
        return frozenset()
