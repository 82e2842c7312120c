"""What the kernel tells of a process in /proc, see proc(5), with as little work as Python allows."""
# A Path takes several times as long as a string, which counts where there are thousands of processes.
# ruff: noqa: PTH116, PTH115, PTH208

import os
import re
from dataclasses import dataclass

PROC = "/proc"
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# PROC_PID_INIT_INO of Linux: the PID namespace that all others are in.
HOST_NAMESPACE = 0xEFFFFFFC
READ_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/PID/stat says; `started` (clock ticks since boot) tells a process from a later one with its pid."""

    parent: int
    cpu_seconds: float
    threads: int
    started: int
    resident_bytes: int


def in_host_namespace() -> bool:
    """Tell whether the pids here are those of the host, not of a container without `pid: host`."""
    try:
        return os.stat(f"{PROC}/self/ns/pid").st_ino == HOST_NAMESPACE
    except OSError:
        return False


def has_gpu_open(pid: int) -> bool:
    """Tell whether a process has a file of the NVIDIA driver open; not, when that cannot be seen."""
    folder = f"{PROC}/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(_link(f"{folder}/{name}").startswith("/dev/nvidia") for name in names)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        # Closed since it was listed.
        return ""


def _read(pid: int, name: str) -> bytes:
    """Read a file of a process, empty when the process is gone; raises OSError when the kernel refuses it."""
    try:
        file = os.open(f"{PROC}/{pid}/{name}", os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError):
        return b""
    try:
        content = piece = os.read(file, READ_BYTES)
        # Only an environment is that long.
        while len(piece) == READ_BYTES:
            piece = os.read(file, READ_BYTES)
            content += piece
    except ProcessLookupError:
        return b""
    finally:
        os.close(file)
    return content


def server_named(pid: int, stack: str = "") -> str | None:
    """Answer the server that the environment of a process names; empty when there is none, None when it is not shown.

    Empty also when it names another stack than the one given: then it is a server of another comparison.
    """
    try:
        environ = _read(pid, "environ")
    except OSError:
        return None
    found = re.findall(r"(?:^|\0)HEADROOM_(SERVER|STACK)=([^\0]+)", environ.decode(errors="replace"))
    names = dict(reversed(found))
    return "" if stack and names.get("STACK", stack) != stack else names.get("SERVER", "")


def read_stat(pid: int) -> Stat | None:
    """Read what is needed of /proc/PID/stat; None when the process has ended. Raises OSError as `_read` does."""
    # The command's name, in parentheses, may hold spaces and parentheses itself.
    fields = _read(pid, "stat").rpartition(b") ")[2].split(None, 22)
    if not fields or fields[0] in b"ZX":
        return None
    return Stat(
        parent=int(fields[1]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / CLOCK_TICKS,
        threads=int(fields[17]),
        started=int(fields[19]),
        resident_bytes=int(fields[21]) * PAGE_BYTES,
    )


def stat_or_none(pid: int) -> Stat | None:
    """Do as `read_stat`, and answer None also when the kernel refuses it."""
    try:
        return read_stat(pid)
    except OSError:
        return None


def open_files(pid: int) -> int | None:
    """Count the open files of a process; None when it has ended or the kernel refuses it."""
    try:
        return len(os.listdir(f"{PROC}/{pid}/fd"))
    except OSError:
        return None


def shared_bytes(pid: int) -> int | None:
    """Answer RSS - PSS of a process; None when it has ended or the kernel refuses it."""
    try:
        kib = dict(re.findall(rb"^(Rss|Pss): +(\d+) kB$", _read(pid, "smaps_rollup"), re.MULTILINE))
    except OSError:
        return None
    return (int(kib[b"Rss"]) - int(kib[b"Pss"])) * 1024 if kib else None
