"""XID errors of all GPUs: one event set, and one thread that waits inside NVML for what comes."""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from ctypes import c_void_p, cast
from dataclasses import dataclass
from typing import Any

import pynvml

from monitor.nvml import Device
from monitor.timeline import CLOCKS, Clocks, Series, Timeline

log = logging.getLogger(__name__)

# How long one wait inside NVML takes at most: NVML is closed, and the program ends, after a wait has ended.
WAIT_MS = 1000
# Seconds until the next try after an error, and while there is nothing to wait for.
PAUSE = 0.5
# Seconds in which a wait must have ended.
PATIENCE = 3.0
# Lines about one code of one GPU.
MAX_LINES = 20
# Rows of the timeline and codes in it; of one look at what is left, the events and the errors at most.
ROWS, CODES, MAX_EVENTS, MAX_ERRORS = 1000, 32, 1000, 3


@dataclass(frozen=True)
class Xid:
    """How often a GPU had an XID error of one code since the monitor was started, and when last (wall time, ns)."""

    count: int
    last_wall_ns: int


class Events:
    """Counts XID errors by GPU and code; what was counted stays when the GPU is lost.

    `listen` and `close` are called by one thread, which opens and closes NVML, and `steps` is another one's.
    """

    def __init__(self, timeline: Timeline, clocks: Clocks = CLOCKS) -> None:
        self.xids: dict[tuple[str, int], Xid] = {}
        self.errors = 0
        self._clocks = clocks
        self._ring = timeline.ring("xid", ROWS, CODES)
        self._lock = threading.Lock()
        self._set: Any = None
        self._gpus: dict[int | None, str] = {}
        self._closing = False

    def listen(self, devices: Iterable[Device]) -> list[tuple[Device, pynvml.NVMLError]]:
        """Listen to GPUs from now on, until `close`; answer those that cannot be listened to, with why."""
        failed = []
        gpus: dict[int | None, str] = {}
        events: Any = None
        for device in devices:
            try:
                events = pynvml.nvmlEventSetCreate() if events is None else events
                pynvml.nvmlDeviceRegisterEvents(device.handle, pynvml.nvmlEventTypeXidCriticalError, events)
                gpus[_address(device.handle)] = device.gpu
            except pynvml.NVMLError as error:
                failed.append((device, error))
        if events is not None and not gpus:
            # With nothing registered a wait may come back at once, again and again.
            with suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(events)
            events = None
        self._gpus, self._set = gpus, events
        return failed

    def close(self) -> bool:
        """Count what has come until now and listen no more; answer false when NVML does not return from a wait."""
        self._closing = True
        if not self._lock.acquire(timeout=PATIENCE):
            self._closing = False
            return False
        try:
            if self._set is not None:
                self._drain()
                pynvml.nvmlEventSetFree(self._set)
        except pynvml.NVMLError:
            # The driver is gone, and the set with it.
            pass
        finally:
            self._set, self._gpus, self._closing = None, {}, False
            self._lock.release()
        return True

    def steps(self, wait_ms: int = WAIT_MS) -> Iterator[float]:
        """Wait for events again and again, inside NVML; yield the seconds until the next wait."""
        while True:
            yield 0 if self._wait(wait_ms) else PAUSE

    def _wait(self, wait_ms: int) -> bool:
        if self._closing or self._set is None:
            return False
        with self._lock:
            if self._set is None:
                return False
            try:
                self._take(wait_ms)
            except pynvml.NVMLError_Timeout:
                pass
            except pynvml.NVMLError:
                # A GPU of the set is lost: it will be freed when NVML is opened anew.
                self.errors += 1
                return False
            return True

    def _drain(self) -> None:
        """Take what is left: a GPU that was lost says so besides giving the event that tells why."""
        errors = 0
        for _ in range(MAX_EVENTS):
            try:
                self._take(0)
            except pynvml.NVMLError_Timeout:
                return
            except pynvml.NVMLError:
                errors += 1
                if errors == MAX_ERRORS:
                    return

    def _take(self, wait_ms: int) -> None:
        event = pynvml.nvmlEventSetWait_v2(self._set, wait_ms)
        gpu, code = self._gpus.get(_address(event.device), ""), int(event.eventData)
        before = self.xids.get((gpu, code))
        counted = Xid(before.count + 1 if before else 1, self._clocks.wall_ns())
        # A new dict, because others may be going through the old one.
        self.xids = self.xids | {(gpu, code): counted}
        self._ring.append(_series(self.xids))
        if counted.count <= MAX_LINES:
            last = "; no more is said of it" if counted.count == MAX_LINES else ""
            log.warning("GPU %s: XID error %d, number %d of its kind%s", gpu, code, counted.count, last)


def _address(handle: Any) -> int | None:
    return cast(handle, c_void_p).value


def _series(xids: Mapping[tuple[str, int], Xid]) -> dict[Series, float]:
    return {Series("gpu_xid_errors_total", gpu=gpu, detail=str(code)): xid.count for (gpu, code), xid in xids.items()}
