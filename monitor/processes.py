"""Which processes belong to which server, and the memory, CPU, threads and files that they use, from /proc.

Source: proc(5). To read smaps_rollup the kernel walks the process's page tables, some 11 ms for each GiB resident in
4 KiB pages. That is by far the dearest reading, so it has a thread of its own that delays no other, and a budget.
"""

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from monitor.timeline import Clock, Readings, Series, now

PROC = Path("/proc")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Less than a second by two samples at 10 Hz, so that a new process is in the readings within a second.
SCAN_EVERY_NS = 800_000_000
# Seconds between readings of shared memory, however cheap they are.
LEAST_WAIT = 0.1
# More ancestors than any process has that is not a fork bomb.
MAX_ANCESTORS = 64


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/PID/stat says; `started` (clock ticks since boot) tells a process from a later one with its pid."""

    parent: int
    cpu_seconds: float
    threads: int
    started: int


@dataclass(slots=True)
class Shared:
    """RSS - PSS of a process (bytes), None if it was refused or never read, and when that was last tried (ns)."""

    time_ns: int = -1
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a server, with the CPU seconds it had used when last seen and its shared memory when last read."""

    server: str
    started: int
    cpu_seconds: float
    shared: Shared = field(default_factory=Shared)


class Processes:
    """The processes of all servers: found by their environment, followed until they exit.

    `generation` grows whenever what `server_of` has answered may no longer hold.
    """

    def __init__(self, clock: Clock = now) -> None:
        self._clock = clock
        self._next_scan_ns = 0
        self._members: dict[int, Member] = {}
        self._exited_cpu: defaultdict[str, float] = defaultdict(float)
        # Processes that were asked for before a scan saw them, with their start; None stands for no process at all.
        self._asked: dict[int, tuple[str | None, int | None]] = {}
        self.generation = 0

    def servers(self) -> dict[int, str]:
        """Answer the server of each known pid; safe to call from any thread."""
        return {pid: member.server for pid, member in self._members.items()}

    def server_of(self, pid: int) -> str | None:
        """Answer the server of a process, which is looked up at once when no scan has seen it; from any thread."""
        if member := self._members.get(pid):
            return member.server
        asked = self._asked.get(pid)
        if asked is None:
            stat = _stat(pid)
            asked = self._asked[pid] = (self._inherited(pid, stat), stat.started if stat else None)
        return asked[0]

    def _inherited(self, pid: int, stat: Stat | None) -> str | None:
        """Look for a server in the environment of a process, else of its parent, and so on."""
        for _ in range(MAX_ANCESTORS):
            if name := _server_named(_read(pid, "environ") or b""):
                return name
            member = self._members.get(pid)
            if member and stat and member.started == stat.started:
                return member.server
            if stat is None or not stat.parent:
                return None
            pid, stat = stat.parent, _stat(stat.parent)
        return None

    def read_details(self) -> Readings:
        """Read the threads and open files of each server; files are absent where the kernel refuses them."""
        readings: Readings = defaultdict(float)
        refused = set()
        for pid, member in self._members.items():
            stat = _stat(pid)
            if stat is None or stat.started != member.started:
                continue
            readings[Series("host_threads", member.server)] += stat.threads
            files = _open_files(pid)
            if files is None:
                refused.add(Series("host_open_files", member.server))
            else:
                readings[Series("host_open_files", member.server)] += files
        return {series: value for series, value in readings.items() if series not in refused}

    def read(self) -> Readings:
        """Read count, memory (bytes) and CPU (seconds) of each server that runs; scan first if it is time.

        CPU seconds keep what exited processes had used when they were last seen. Before Linux 6.17 the kernel's
        count of resident pages may be off by some MiB on machines with many cores.
        """
        time_ns = self._clock().time_ns
        if time_ns >= self._next_scan_ns:
            self._next_scan_ns = time_ns + SCAN_EVERY_NS
            self.scan()
        running: dict[int, Member] = {}
        resident_bytes: dict[int, int] = {}
        readings: Readings = defaultdict(float)
        for pid, member in self._members.items():
            stat, resident = _stat(pid), _resident_bytes(pid)
            if stat is None or stat.started != member.started or resident is None:
                continue
            running[pid] = replace(member, cpu_seconds=stat.cpu_seconds)
            resident_bytes[pid] = resident
            readings[Series("host_processes", member.server)] += 1
            readings[Series("host_rss_bytes", member.server)] += resident
            readings[Series("host_cpu_seconds_total", member.server)] += stat.cpu_seconds
        self._follow(running)
        for server in set(self.servers().values()):
            readings[Series("host_cpu_seconds_total", server)] += self._exited_cpu[server]
        return readings | self._proportional(resident_bytes)

    def read_shared(self, max_cpu: float, cpu_clock: Callable[[], float] = time.thread_time) -> Iterator[float]:
        """Read the shared memory of one process after another, new ones first, then the one read longest ago.

        Yields the seconds to wait before the next, such that all this takes at most `max_cpu` of one core.
        """
        before = cpu_clock()
        while True:
            if members := self._members:
                pid = min(members, key=lambda pid: members[pid].shared.time_ns)
                shared = members[pid].shared
                shared.time_ns, shared.size = self._clock().time_ns, _shared_bytes(pid)
            after = cpu_clock()
            yield max(LEAST_WAIT, (after - before) * (1 / max_cpu - 1))
            before = after

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
            server, shared = self._members[pid].server, self._members[pid].shared
            # Each is read only once, because `read_shared` may change them at any moment.
            size, time_ns = shared.size, shared.time_ns
            if size is None:
                unknown.add(server)
                continue
            # A process that has freed shared pages since would come out below 0.
            readings[Series("host_pss_bytes", server)] += max(0, resident - size)
            oldest_ns[server] = min(time_ns, oldest_ns.get(server, time_ns))
        # After all else, because a reading may be newer than the start of this tick.
        now_ns = self._clock().time_ns
        for server, oldest in oldest_ns.items():
            readings[Series("host_pss_age_seconds", server)] = (now_ns - oldest) / 1e9
        return {series: value for series, value in readings.items() if series.server not in unknown}

    def scan(self) -> None:
        """Look through all of /proc for processes of servers."""
        found: dict[int, Member] = {}
        # By age, so that a parent is known before its children.
        for stat, pid, name in sorted(self._sightings(), key=lambda sighting: (sighting[0].started, sighting[1])):
            known = self._members.get(pid)
            if known and known.started == stat.started:
                found[pid] = replace(known, server=name or known.server, cpu_seconds=stat.cpu_seconds)
            elif name or stat.parent in found:
                found[pid] = Member(name or found[stat.parent].server, stat.started, stat.cpu_seconds)
        self._follow(found)
        self._asked = {pid: asked for pid, asked in self._asked.copy().items() if _still(pid, asked[1])}
        self.generation += 1

    def _sightings(self) -> Iterator[tuple[Stat, int, str | None]]:
        """Yield every process with the server that its environment names.

        A process that sets its own title (vLLM's do) overwrites a part of its environment, and that of other users'
        processes may not be read: such a process goes by what it was before or by its parent.
        """
        for pid in _pids():
            name = _server_named(_read(pid, "environ") or b"")
            if stat := _stat(pid):
                yield stat, pid, name

    def _follow(self, members: dict[int, Member]) -> None:
        for pid, member in self._members.items():
            if pid not in members or members[pid].started != member.started:
                self._exited_cpu[member.server] += member.cpu_seconds
        # One assignment of a new dict: other threads see the old members or the new ones.
        self._members = members


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())


def _read(pid: int, name: str) -> bytes | None:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        # Gone between listing and reading, or not ours to read.
        return None


def _server_named(environ: bytes) -> str | None:
    match = re.search(rb"(?:^|\0)HEADROOM_SERVER=([^\0]+)", environ)
    return match[1].decode(errors="replace") if match else None


def _stat(pid: int) -> Stat | None:
    # The command's name, in parentheses, may hold spaces and parentheses itself.
    fields = (_read(pid, "stat") or b"").rpartition(b") ")[2].split()
    if not fields or fields[0] in b"ZX":
        return None
    return Stat(
        parent=int(fields[1]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / CLOCK_TICKS,
        threads=int(fields[17]),
        started=int(fields[19]),
    )


def _still(pid: int, started: int | None) -> bool:
    stat = _stat(pid)
    return stat is not None and stat.started == started


def _open_files(pid: int) -> int | None:
    try:
        return sum(1 for _ in (PROC / str(pid) / "fd").iterdir())
    except OSError:
        return None


def _resident_bytes(pid: int) -> int | None:
    pages = (_read(pid, "statm") or b"").split()
    return int(pages[1]) * PAGE_BYTES if pages else None


def _shared_bytes(pid: int) -> int | None:
    kib = dict(re.findall(rb"^(Rss|Pss): +(\d+) kB$", _read(pid, "smaps_rollup") or b"", re.MULTILINE))
    return (int(kib[b"Rss"]) - int(kib[b"Pss"])) * 1024 if kib else None
