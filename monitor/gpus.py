"""All GPUs: found at the start, and looked for again when one is lost or the driver restarts."""

import logging
import time
from collections.abc import Iterator

from monitor.gpu import Gpu, Rates
from monitor.nvml import close_nvml, open_nvml
from monitor.processes import Processes
from monitor.sampler import Sampler
from monitor.timeline import Timeline

log = logging.getLogger(__name__)

# Seconds between two looks. To open NVML anew interrupts the sampling of the GPUs that are well: while there are such,
# each look in vain doubles the time to the next.
LOOK_EVERY, LOOK_AT_LEAST_EVERY = 3.0, 60.0
# Seconds in which calls that are under way come to their end before NVML is closed.
SETTLE = 0.05


class Gpus:
    """The GPUs of this machine, kept open."""

    def __init__(self, timeline: Timeline, processes: Processes, rates: Rates) -> None:
        self.found: dict[str, Gpu] = {}
        self.reason: str | None = None
        self._timeline = timeline
        self._processes = processes
        self._rates = rates
        self._running = False
        self._again = False
        self._watch = Sampler("gpus", self._looks())
        self._open()

    def start(self) -> None:
        """Sample every GPU, and look again for those that get lost."""
        self._running = True
        for sampler in self.samplers():
            sampler.start()

    def samplers(self) -> list[Sampler]:
        """All threads: those of the GPUs, and the one that looks for them."""
        return [self._watch, *(sampler for gpu in self.found.values() for sampler in gpu.samplers)]

    def complete(self) -> bool:
        """Tell whether all is sampled that ever was found."""
        return not self._again and all(gpu.device for gpu in self.found.values())

    def _looks(self) -> Iterator[float]:
        wait = LOOK_EVERY
        while True:
            yield wait
            if self.complete():
                wait = LOOK_EVERY
                continue
            well = any(gpu.device for gpu in self.found.values())
            self._look()
            wait = min(2 * wait, LOOK_AT_LEAST_EVERY) if well or not self.found else LOOK_EVERY

    def _look(self) -> None:
        for gpu in self.found.values():
            gpu.detach()
        time.sleep(SETTLE)
        close_nvml()
        self._open()

    def _open(self) -> None:
        found = open_nvml()
        for device in found.devices:
            gpu = self.found.get(device.gpu)
            if gpu:
                if gpu.identity.uuid != device.uuid:
                    # Its series must not go on with what another device holds.
                    gpu.say("device", "another one than before: start the monitor anew")
                elif gpu.identity.tiers == device.tiers:
                    gpu.attach(device)
                else:
                    gpu.say("device", "MIG was switched on or off: start the monitor anew")
                continue
            # A new dict, because others may be going through the old one.
            gpu = Gpu(device, self._timeline, self._processes, self._rates)
            self.found = self.found | {device.gpu: gpu}
            if self._running:
                for sampler in gpu.samplers:
                    sampler.start()
        if found.reason != self.reason and self._running:
            log.warning("GPUs: %s", found.reason or "all are found")
        self.reason, self._again = found.reason, found.again
