"""Which processes belong to which server, and the memory, CPU, threads and files that they use, from /proc.

Source: proc(5). To read smaps_rollup the kernel walks the process's page tables, some 11 ms for each GiB resident in
4 KiB pages. That is by far the dearest reading, so it has a thread of its own that delays no other, and a budget.
"""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from monitor import procfs
from monitor.timeline import Readings, Series

log = logging.getLogger(__name__)

# Less than a second by two samples at 10 Hz, so that a new process is in the readings within a second.
SCAN_EVERY_NS = 800_000_000
# The environment of a process is read in each scan while it is young, and then in one of so many (every 30 s).
YOUNG_SECONDS, SCANS_A_ROUND = 10, 37
# Seconds between two looks at whose shared memory to read, however cheap or dear the last reading was.
LEAST_WAIT, MOST_WAIT = 0.1, 1.0
# What a process shares changes slowly: it is not read again within this time.
SHARED_NS = 1_000_000_000
# More ancestors than any process has that is not a fork bomb.
MAX_ANCESTORS = 64


@dataclass(slots=True)
class Process:
    """A process that a scan has seen.

    `inode` is that of /proc/PID, which is new when another process gets the pid: it tells that this is still the same
    one without asking for its start. `server` is empty for a process of none. CPU seconds are those that were counted
    for a server so far. `shared_bytes` is RSS - PSS, None if it was refused or never read; that was last tried at
    `shared_ns`.
    """

    inode: int
    parent: int
    started: int
    server: str = ""
    cpu_seconds: float = 0.0
    shared_ns: int = -1
    shared_bytes: int | None = None


class Processes:
    """The processes of all servers: found by their environment, followed until they exit.

    A process belongs to the server that its environment names, else to that of its parent. It stays with it when the
    name disappears, because a process that sets its own title (vLLM's do) overwrites a part of its environment. One
    that goes on as another program (exec) under a new name changes its server: within a scan in its first seconds, as
    a process that was just forked does, and within half a minute later in its life.

    `refused` counts those that use a GPU and whose environment the kernel does not show, as to another user.
    `generation` grows whenever what `server_of` has answered may no longer hold. `of_host` tells whether the pids here
    are those of the host, as NVML's may be; if not, a process gets memory of a GPU only if it has one open. With a
    `stack`, servers whose environment names another one are left out.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, stack: str = "") -> None:
        self.generation = 0
        self.refused = 0
        self.of_host = procfs.in_host_namespace()
        self._clock = clock
        self._stack = stack
        self._next_scan_ns = 0
        self._scans = 0
        self._seen: dict[int, Process] = {}
        self._members: dict[int, Process] = {}
        self._cpu_seconds: defaultdict[str, float] = defaultdict(float)
        # Processes that were asked for before a scan saw them, with their start; None stands for no process at all.
        self._asked: dict[int, tuple[str, int | None]] = {}

    def servers(self) -> dict[int, str]:
        """Answer the server of each known pid; safe to call from any thread."""
        return {pid: process.server for pid, process in self._members.items()}

    def server_of(self, pid: int) -> str | None:
        """Answer the server of a process that NVML names, looked up at once when no scan has seen it; from any thread.

        Older drivers name pids of the host, which in a PID namespace of our own are no process or another one; later
        ones name those of the namespace (os_find_ns_pid in NVIDIA/open-gpu-kernel-modules). What uses a GPU has a file
        of the driver open.
        """
        member = self._members.get(pid)
        server = member.server if member else self._looked_up(pid)
        return server if server and (self.of_host or procfs.has_gpu_open(pid)) else None

    def _looked_up(self, pid: int) -> str:
        asked = self._asked.get(pid)
        if asked is None:
            stat = procfs.stat_or_none(pid)
            asked = self._asked[pid] = (self._inherited(pid, stat), stat.started if stat else None)
        return asked[0]

    def _inherited(self, pid: int, stat: procfs.Stat | None) -> str:
        """Look for a server in the environment of a process, else of its parent, and so on."""
        name = procfs.server_named(pid, self._stack)
        if name is None:
            self._note_refused(pid)
        for _ in range(MAX_ANCESTORS):
            if name:
                return name
            member = self._members.get(pid)
            if member and stat and member.started == stat.started:
                return member.server
            if stat is None or not stat.parent:
                return ""
            pid, stat = stat.parent, procfs.stat_or_none(stat.parent)
            name = procfs.server_named(pid, self._stack)
        return ""

    def _note_refused(self, pid: int) -> None:
        self.refused += 1
        if self.refused == 1:
            log.warning(
                "process %d uses a GPU, and the kernel does not show its environment: its memory may be unattributed. "
                "Run the monitor as root, or as the user of the servers",
                pid,
            )

    def read_details(self) -> Readings:
        """Read the threads and open files of each server; files are absent where the kernel refuses them."""
        readings: Readings = defaultdict(float)
        refused = set()
        for pid, process in self._members.items():
            stat = procfs.stat_or_none(pid)
            if stat is None or stat.started != process.started:
                continue
            readings[Series("host_threads", process.server)] += stat.threads
            files = procfs.open_files(pid)
            if files is None:
                refused.add(Series("host_open_files", process.server))
            else:
                readings[Series("host_open_files", process.server)] += files
        return {series: value for series, value in readings.items() if series not in refused}

    def read(self) -> Readings:
        """Read count, memory (bytes) and CPU (seconds) of each server that runs; scan first if it is time.

        CPU seconds never fall: they keep what exited processes had used when they were last seen, and what a process
        used for one server stays with it when it goes over to another. A server of which a process cannot be read for
        a moment, as when there are too many open files, is absent meanwhile. Before Linux 6.17 the kernel's count of
        resident pages may be off by some MiB on machines with many cores. Raises OSError when /proc cannot be listed.
        """
        time_ns = self._clock()
        if time_ns >= self._next_scan_ns:
            self.scan()
            self._next_scan_ns = time_ns + SCAN_EVERY_NS
        resident_bytes: dict[int, int] = {}
        readings: Readings = defaultdict(float)
        unknown = set()
        for pid, process in self._members.copy().items():
            server = process.server
            try:
                stat = procfs.read_stat(pid)
            except OSError:
                unknown.add(server)
                continue
            if stat is None or stat.started != process.started:
                self._forget(pid)
                continue
            resident_bytes[pid] = resident = stat.resident_bytes
            self._cpu_seconds[server] += max(0.0, stat.cpu_seconds - process.cpu_seconds)
            process.cpu_seconds = stat.cpu_seconds
            readings[Series("host_processes", server)] += 1
            readings[Series("host_rss_bytes", server)] += resident
            readings[Series("host_cpu_seconds_total", server)] = self._cpu_seconds[server]
        readings |= self._proportional(resident_bytes)
        return {series: value for series, value in readings.items() if series.server not in unknown}

    def _forget(self, pid: int) -> None:
        # A new dict, because other threads may be going through the old one.
        self._members = {other: process for other, process in self._members.items() if other != pid}
        del self._seen[pid]

    def read_shared(self, max_cpu: float, cpu_clock: Callable[[], float] = time.thread_time) -> Iterator[float]:
        """Read the shared memory of one process after another, new ones first, then the one read longest ago.

        Yields the seconds to wait before the next step, such that all this takes at most `max_cpu` of one core over
        time. New ones do not wait, because until then their server shows nothing: the others wait longer for it.
        """
        before, owed = cpu_clock(), 0.0
        while True:
            if members := self._members:
                oldest = min(members, key=lambda pid: members[pid].shared_ns)
                process, now_ns = members[oldest], self._clock()
                if process.shared_ns < 0 or (not owed and now_ns - process.shared_ns >= SHARED_NS):
                    process.shared_ns, process.shared_bytes = now_ns, procfs.shared_bytes(oldest)
            after = cpu_clock()
            owed += (after - before) * (1 / max_cpu - 1)
            before = after
            new = any(process.shared_ns < 0 for process in self._members.values())
            wait = LEAST_WAIT if new else min(max(LEAST_WAIT, owed), MOST_WAIT)
            yield wait
            owed = max(0.0, owed - wait)

    def _proportional(self, resident_bytes: Mapping[int, int]) -> Readings:
        """Estimate the PSS (bytes) of each server, and tell the age (seconds) of the oldest reading behind it.

        PSS is RSS less the part of shared pages that counts elsewhere. RSS is of this moment and as exact as `read`
        says. The other part was exact when it was read; as that is dear, it may be as old as the age says. It changes
        slowly, while what a server allocates is private and in RSS at once. Until the next reading the estimate misses
        sharing that begins or ends: a fork, the exit of a process that shared, a library that others have loaded too.
        Absent until each process has been read once, and while the kernel refuses that for one.
        """
        readings: Readings = defaultdict(float)
        oldest_ns: dict[str, int] = {}
        unknown = set()
        for pid, resident in resident_bytes.items():
            process = self._members[pid]
            # Each is read only once, because `read_shared` may change them at any moment.
            server, size, time_ns = process.server, process.shared_bytes, process.shared_ns
            if size is None:
                unknown.add(server)
                continue
            # A process that has freed shared pages since would come out below 0.
            readings[Series("host_pss_bytes", server)] += max(0, resident - size)
            oldest_ns[server] = min(time_ns, oldest_ns.get(server, time_ns))
        # After all else, because a reading may be newer than the start of this tick.
        now_ns = self._clock()
        for server, oldest in oldest_ns.items():
            readings[Series("host_pss_age_seconds", server)] = (now_ns - oldest) / 1e9
        return {series: value for series, value in readings.items() if series.server not in unknown}

    def scan(self) -> None:
        """Look through all of /proc for processes of servers; raises OSError when it cannot be listed.

        The kernel is asked only about those that are new, young, or whose turn it is.
        """
        self._scans += 1
        seen, new = self._listed()
        young = int((time.clock_gettime(time.CLOCK_BOOTTIME) - YOUNG_SECONDS) * procfs.CLOCK_TICKS)
        turn = self._scans % SCANS_A_ROUND
        for pid, process in seen.items():
            if process.started > young or pid % SCANS_A_ROUND == turn:
                process.server = procfs.server_named(pid, self._stack) or process.server
        # By age, so that a parent is known before its children.
        for pid, process in sorted(new, key=lambda pair: (pair[1].started, pair[0])):
            process.server = procfs.server_named(pid, self._stack) or ""
            seen[pid] = process
        members = {}
        for pid, process in seen.items():
            if not process.server:
                parent = seen.get(process.parent)
                # A younger one has only taken the pid of the parent, which is gone.
                if parent and parent.started <= process.started:
                    process.server = parent.server
            if process.server:
                members[pid] = process
        # Other threads see the old members or the new ones.
        self._seen, self._members = seen, members
        self._asked = {pid: asked for pid, asked in self._asked.copy().items() if self._still(pid, asked[1])}
        self.generation += 1

    def _listed(self) -> tuple[dict[int, Process], list[tuple[int, Process]]]:
        """List /proc: the processes that are known, and those that are new, whose environment was not read yet."""
        known: dict[int, Process] = {}
        new = []
        with os.scandir(procfs.PROC) as entries:
            for entry in entries:
                if not entry.name.isdecimal():
                    continue
                pid, inode = int(entry.name), entry.inode()
                process = self._seen.get(pid)
                if process is None or process.inode != inode:
                    process = self._met(pid, inode)
                if process is None:
                    continue
                if process is self._seen.get(pid):
                    known[pid] = process
                else:
                    new.append((pid, process))
        return known, new

    def _met(self, pid: int, inode: int) -> Process | None:
        """Answer what is behind an inode that was not seen before; None when it is gone or cannot be asked for now."""
        known = self._seen.get(pid)
        try:
            stat = procfs.read_stat(pid)
        except OSError:
            return known
        if stat is None:
            return None
        if known and known.started == stat.started:
            # The kernel had dropped the inode and made another one.
            known.inode = inode
            return known
        return Process(inode, stat.parent, stat.started)

    def _still(self, pid: int, started: int | None) -> bool:
        return pid in self._seen and self._seen[pid].started == started
