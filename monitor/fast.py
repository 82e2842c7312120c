"""The fast samples of one GPU or MIG device: its memory in use, and what each server's processes hold of it."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from monitor.nvml import FAST, Device, Memory, Reader
from monitor.sampler import SECOND, Schedule
from monitor.timeline import Series

if TYPE_CHECKING:
    from monitor.gpu import Gpu, Sampling

UNATTRIBUTED = "unattributed"
MAX_SERVERS = 16
# How often the processes are read while the memory in use does not change, or changes for longer than may be paid for.
CALM_HZ = 5
UNKNOWN_BYTES = 2**64 - 1
# In the order in which `Reader.memory` answers them.
MEMORY_PARTS = ("total", "reserved", "free", "used")
USED = MEMORY_PARTS.index("used")
NO_MEMORY: Memory = (math.nan, math.nan, math.nan, math.nan)
NONE_MISSED = math.nan
Running = Iterable[tuple[int, int, int, int]]


class Fast:
    """Reads the memory, and the processes when it has changed or not for a while, with as little work as Python allows.

    The parts, of each server and `unattributed`, add up to what the device has in use. Where NVML counts more for the
    processes than the device has in use, as it may when they share memory, what is unattributed is below zero.
    """

    def __init__(self, gpu: "Gpu", sampling: "Sampling") -> None:
        timeline, rates = sampling.timeline, sampling.rates
        self.schedule = Schedule(rates.hz, self.tick, sampling.governors["fast"], sampling.clocks)
        self._gpu = gpu
        self._processes = sampling.processes
        self._reading = sampling.reading
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
        self._every_ns, self._calm_ns = (
            SECOND * 9 // 10 // hz for hz in (rates.processes_hz, min(rates.processes_hz, CALM_HZ))
        )
        self._read_ns, self._used = -SECOND, math.nan

    def tick(self, lateness: float) -> bool | None:
        """Read the device; answer whether that went well, None when there is no device."""
        gpu = self._gpu
        # In this order: whoever detaches the device sees either that a call may be under way or that none will begin.
        gpu.busy["fast"] = self._clock()
        try:
            device = gpu.device
            if device is None:
                return None
            if device is not self._device or self._reader is None:
                self._device, self._reader = device, Reader(device.handle)
            memory, well = gpu.attempt("memory", device, self._reader.memory), False
            time_ns = self._clock()
            if self._parts_due(time_ns, memory) and gpu.device is device:
                self._read_ns = time_ns
                with self._reading.spend():
                    memory, well = self._read_parts(device, self._reader, memory)
                self._used = memory[USED] if memory else math.nan
            if gpu.device is device:
                self._memory_ring.put((*(memory or NO_MEMORY), lateness, self.schedule.behind or NONE_MISSED))
            return memory is not None or (well and "memory" in device.unsupported)
        finally:
            gpu.busy["fast"] = 0

    def _parts_due(self, time_ns: int, memory: Memory | None) -> bool:
        """Tell whether the processes are to be read: now and then, and at once, within their share, after a change."""
        passed_ns = time_ns - self._read_ns
        if passed_ns >= self._calm_ns:
            return True
        changed = memory is not None and memory[USED] != self._used
        return changed and passed_ns >= self._every_ns and self._reading.left(time_ns)

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
