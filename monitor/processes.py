"""Which processes belong to which server, and the memory and CPU that they use, from /proc.

Source: proc(5). To read smaps_rollup the kernel walks the process's page tables, some 11 ms for each GiB resident in
4 KiB pages. That is by far the dearest reading, so it has a thread of its own and delays no other.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from monitor.timeline import Clock, Readings, Series, now

PROC = Path("/proc")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Less than a second by two samples at 10 Hz, so that a new process is in the readings within a second.
SCAN_EVERY_NS = 800_000_000


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/PID/stat says; `started` (clock ticks since boot) tells a process from a later one with its pid."""

    parent: int
    cpu_seconds: float
    started: int


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a server, with the CPU seconds it had used when last seen."""

    server: str
    started: int
    cpu_seconds: float


class Processes:
    """The processes of all servers: found by their environment, followed until they exit."""

    def __init__(self, clock: Clock = now) -> None:
        self._clock = clock
        self._next_scan_ns = 0
        self._members: dict[int, Member] = {}
        self._exited_cpu: defaultdict[str, float] = defaultdict(float)

    def servers(self) -> dict[int, str]:
        """Answer the server of each known pid; safe to call from any thread."""
        return {pid: member.server for pid, member in self._members.items()}

    def read(self) -> Readings:
        """Read count, resident memory (bytes) and CPU (seconds) of each server that runs; scan first if it is time.

        CPU seconds keep what exited processes had used when they were last seen. Before Linux 6.17 the kernel's
        count of resident pages may be off by some MiB on machines with many cores.
        """
        time_ns = self._clock().time_ns
        if time_ns >= self._next_scan_ns:
            self._next_scan_ns = time_ns + SCAN_EVERY_NS
            self.scan()
        running: dict[int, Member] = {}
        readings: Readings = defaultdict(float)
        for pid, member in self._members.items():
            stat, resident = _stat(pid), _resident_bytes(pid)
            if stat is None or stat.started != member.started or resident is None:
                continue
            running[pid] = replace(member, cpu_seconds=stat.cpu_seconds)
            readings[Series("host_processes", member.server)] += 1
            readings[Series("host_rss_bytes", member.server)] += resident
            readings[Series("host_cpu_seconds_total", member.server)] += stat.cpu_seconds
        self._follow(running)
        for server in set(self.servers().values()):
            readings[Series("host_cpu_seconds_total", server)] += self._exited_cpu[server]
        return readings

    def read_proportional(self) -> Readings:
        """Read the proportional memory (bytes) of each server; absent when the kernel refuses it for a process."""
        readings: Readings = defaultdict(float)
        refused = set()
        for pid, member in self._members.items():
            proportional = _proportional_bytes(pid)
            stat = _stat(pid)
            if stat is None or stat.started != member.started:
                continue
            if proportional is None:
                refused.add(member.server)
            else:
                readings[Series("host_pss_bytes", member.server)] += proportional
        return {series: value for series, value in readings.items() if series.server not in refused}

    def scan(self) -> None:
        """Look through all of /proc for processes of servers."""
        found: dict[int, Member] = {}
        # By age, so that a parent is known before its children.
        for stat, pid, name in sorted(self._sightings(), key=lambda sighting: (sighting[0].started, sighting[1])):
            known = self._members.get(pid)
            if known and known.started == stat.started:
                name = name or known.server
            elif stat.parent in found:
                name = name or found[stat.parent].server
            if name:
                found[pid] = Member(name, stat.started, stat.cpu_seconds)
        self._follow(found)

    def _sightings(self) -> Iterator[tuple[Stat, int, str | None]]:
        """Yield the processes that name their server, and those that cannot tell.

        A process that sets its own title (vLLM's do) overwrites its environment, so it goes by what it was before or
        by its parent. Kernel threads and processes of other users show nothing at all and are skipped.
        """
        for pid in _pids():
            environ = _read(pid, "environ") or b""
            name = _server_named(environ)
            overwritten = b"=" not in environ and (environ or pid in self._members)
            if (name or overwritten) and (stat := _stat(pid)):
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
        started=int(fields[19]),
    )


def _resident_bytes(pid: int) -> int | None:
    pages = (_read(pid, "statm") or b"").split()
    return int(pages[1]) * PAGE_BYTES if pages else None


def _proportional_bytes(pid: int) -> int | None:
    match = re.search(rb"^Pss: +(\d+) kB$", _read(pid, "smaps_rollup") or b"", re.MULTILINE)
    return int(match[1]) * 1024 if match else None
