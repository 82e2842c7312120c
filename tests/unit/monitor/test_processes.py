"""Processes of servers, through the real /proc where it can be made to show the case."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from monitor import processes, procfs
from monitor.processes import SCAN_EVERY_NS, SCANS_A_ROUND, Processes
from monitor.timeline import Readings, Series

Start = Callable[..., subprocess.Popen[str]]
# Says so on a line and waits for its end.
HOLD_50_MB = "block = bytearray(b'x') * 50_000_000; print('ready', flush=True); input()"
# Allocates 50 MB more when it is told.
GROW_50_MB = f"{HOLD_50_MB}; more = bytearray(b'x') * 50_000_000; print('grown', flush=True); input()"
# Overwrites its environment as setproctitle does, then forks a child that never had one.
OVERWRITE_ENVIRONMENT = """
import ctypes, os
first = ctypes.cast(ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ"), ctypes.POINTER(ctypes.c_void_p))[0]
input()
size = len(open("/proc/self/environ", "rb").read())
ctypes.memset(first, 0, size)
ctypes.memmove(first, b"title", 5)
child = os.fork()
if child:
    print("ready", flush=True)
input()
"""


@pytest.fixture
def server() -> str:
    """A name that no other process on this machine bears."""
    return f"test-{uuid4()}"


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            env=os.environ | environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        # Popen returns a moment before the kernel shows the new program's environment.
        while not Path(f"/proc/{process.pid}/environ").read_bytes():
            time.sleep(0.001)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def write(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin
    process.stdin.write(text)
    process.stdin.flush()


def wait_until_it_is_sleep(process: subprocess.Popen[str]) -> None:
    while not Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(b"sleep\0"):
        time.sleep(0.001)


def count(readings: Readings, server: str) -> float | None:
    return readings.get(Series("host_processes", server))


def pss(table: Processes, server: str) -> float | None:
    return table.read().get(Series("host_pss_bytes", server))


def read_each_once(table: Processes) -> None:
    """Read the shared memory of every process: servers that are not of this test may run on the machine too."""
    for _ in islice(table.read_shared(max_cpu=1), len(table.servers())):
        pass


class Clock:
    """Stands still until told."""

    seconds: float = 0

    def __call__(self) -> int:
        return round(self.seconds * 1e9)


def test_a_process_belongs_to_the_server_its_environment_names(start: Start, server: str) -> None:
    one = start("sleep", "60", HEADROOM_SERVER=server)
    other = start("sleep", "60", HEADROOM_SERVER=f"{server}-b")
    alike = start("sleep", "60", OLD_HEADROOM_SERVER=server, HEADROOM_SERVERS=server)
    nameless = start("sleep", "60", HEADROOM_SERVER="")
    table = Processes()
    table.scan()
    servers = table.servers()
    assert servers[one.pid] == server
    assert servers[other.pid] == f"{server}-b"
    assert alike.pid not in servers
    assert nameless.pid not in servers


def test_servers_of_another_stack_are_left_out_where_the_monitor_has_one(start: Start, server: str) -> None:
    ours, theirs, free = (
        start("sh", "-c", "sleep 60 & echo ready; wait", HEADROOM_SERVER=server, **stack)
        for stack in ({"HEADROOM_STACK": "a"}, {"HEADROOM_STACK": "b"}, {})
    )
    for process in (ours, theirs, free):
        line(process)
    assert count(Processes(stack="a").read(), server) == 4
    assert count(Processes().read(), server) == 6
    table = Processes(stack="a")
    table.of_host = True  # asked for before a scan, as for processes that NVML names
    assert [table.server_of(process.pid) for process in (ours, theirs, free)] == [server, None, server]


def test_children_are_counted_with_their_parent(start: Start, server: str) -> None:
    line(start("sh", "-c", "sleep 60 & sleep 60 & echo ready; wait", HEADROOM_SERVER=server))
    assert count(Processes().read(), server) == 3


def test_a_process_that_overwrote_its_environment_stays_and_its_children_are_found(start: Start, server: str) -> None:
    process = start(sys.executable, "-c", OVERWRITE_ENVIRONMENT, HEADROOM_SERVER=server)
    table = Processes()
    table.scan()
    write(process, "\n")
    assert line(process) == "ready\n"
    assert server.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes()
    table.scan()
    assert list(table.servers().values()).count(server) == 2


WAIT_THEN_BECOME = 'echo ready; read line; exec env HEADROOM_SERVER="$0" sleep 60'


@pytest.mark.parametrize("before", ["", "old"])
@pytest.mark.parametrize("young_seconds", [1000, 0])
def test_a_process_that_goes_on_as_another_program_goes_over_to_the_server_that_this_names(
    start: Start, server: str, monkeypatch: pytest.MonkeyPatch, before: str, young_seconds: int
) -> None:
    monkeypatch.setattr(processes, "YOUNG_SECONDS", young_seconds)
    process = start("sh", "-c", WAIT_THEN_BECOME, server, HEADROOM_SERVER=before and f"{server}-{before}")
    line(process)
    table = Processes()
    table.scan()
    assert table.servers().get(process.pid) == (f"{server}-{before}" if before else None)
    write(process, "\n")
    wait_until_it_is_sleep(process)
    for _ in range(1 if young_seconds else SCANS_A_ROUND):
        table.scan()
    assert table.servers().get(process.pid) == server


def test_cpu_that_was_used_for_one_server_stays_with_it_when_the_process_goes_over_to_another(
    start: Start, server: str
) -> None:
    become = (
        "import os; sum(range(3_000_000)); print('ready', flush=True); input(); os.environ['HEADROOM_SERVER'] += '-b'"
    )
    become += "; os.execvp('sleep', ['sleep', '60'])"
    process = start(sys.executable, "-c", become, HEADROOM_SERVER=server)
    child = start("sleep", "60", HEADROOM_SERVER=server)
    line(process)
    table = Processes()
    first = table.read()
    write(process, "\n")
    wait_until_it_is_sleep(process)
    table.scan()
    assert table.servers()[process.pid] == f"{server}-b"
    then = table.read()
    cpu = [Series("host_cpu_seconds_total", name) for name in (server, f"{server}-b")]
    total = psutil.Process(process.pid).cpu_times()
    assert then[cpu[0]] >= first[cpu[0]] > 0.02
    assert then[cpu[0]] + then[cpu[1]] == pytest.approx(total.user + total.system, abs=0.05)
    assert then[cpu[1]] < first[cpu[0]]
    child.kill()


@contextmanager
def no_file_to_open() -> Iterator[None]:
    """Too many open files: the kernel refuses every other one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_while_proc_cannot_be_read_servers_are_absent_and_their_cpu_is_not_counted_again_after(
    start: Start, server: str
) -> None:
    line(start(sys.executable, "-c", "sum(range(3_000_000)); print(); input()", HEADROOM_SERVER=server))
    clock = Clock()
    table = Processes(clock)
    before = table.read()
    with no_file_to_open():
        assert not any(series.server == server for series in table.read())
        clock.seconds = 1
        with pytest.raises(OSError, match="Too many open files"):
            table.read()
    assert list(table.servers().values()).count(server) == 1
    after = table.read()
    cpu = Series("host_cpu_seconds_total", server)
    assert before[cpu] > 0.02
    assert after[cpu] == pytest.approx(before[cpu], abs=0.02)
    assert count(after, server) == 1


def test_a_process_that_vanished_after_the_scan_goes_away_and_its_cpu_stays(start: Start, server: str) -> None:
    start("sleep", "60", HEADROOM_SERVER=server)
    busy = start(sys.executable, "-c", "sum(range(3_000_000)); print(); input()", HEADROOM_SERVER=server)
    line(busy)
    table = Processes()
    before = table.read()
    assert count(before, server) == 2
    busy.kill()
    busy.wait()
    after = table.read()
    assert count(after, server) == 1
    cpu = Series("host_cpu_seconds_total", server)
    assert after[cpu] >= before[cpu] > 0


def test_a_process_that_vanished_before_it_was_read_goes_away(start: Start, server: str) -> None:
    process = start("sleep", "60", HEADROOM_SERVER=server)
    table = Processes()
    table.scan()
    process.kill()
    process.wait()
    read_each_once(table)
    assert count(table.read(), server) is None


def test_a_dead_process_that_nobody_waited_for_is_not_counted(start: Start, server: str) -> None:
    process = start("sleep", "60", HEADROOM_SERVER=server)
    table = Processes()
    assert count(table.read(), server) == 1
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert count(table.read(), server) is None


def test_a_new_process_is_in_the_readings_within_a_second(start: Start, server: str) -> None:
    moment = 0
    table = Processes(clock=lambda: moment)
    table.read()
    start("sleep", "60", HEADROOM_SERVER=server)
    moment = 900_000_000
    assert count(table.read(), server) == 1


def test_between_scans_all_of_proc_is_left_alone(start: Start, server: str) -> None:
    moment = 0
    table = Processes(clock=lambda: moment)
    table.read()
    start("sleep", "60", HEADROOM_SERVER=server)
    moment = SCAN_EVERY_NS - 1
    assert count(table.read(), server) is None


def test_memory_and_cpu_agree_with_psutil(start: Start, server: str) -> None:
    process = start(sys.executable, "-c", HOLD_50_MB, HEADROOM_SERVER=server)
    line(process)
    table = Processes()
    table.read()
    read_each_once(table)
    readings = table.read()
    truth = psutil.Process(process.pid)
    memory, cpu = truth.memory_full_info(), truth.cpu_times()
    rss, proportional = readings[Series("host_rss_bytes", server)], readings[Series("host_pss_bytes", server)]
    assert 50e6 < proportional < rss
    assert rss == pytest.approx(memory.rss, rel=0.01)
    assert proportional == pytest.approx(memory.pss, rel=0.01)
    assert readings[Series("host_cpu_seconds_total", server)] == pytest.approx(cpu.user + cpu.system, abs=0.05)


def test_proportional_memory_grows_with_the_process_though_shared_memory_is_not_read_again(
    start: Start, server: str
) -> None:
    process = start(sys.executable, "-c", GROW_50_MB, HEADROOM_SERVER=server)
    line(process)
    table = Processes()
    table.read()
    read_each_once(table)
    before = pss(table, server)
    write(process, "\n")
    line(process)
    after = pss(table, server)
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(50e6, rel=0.05)
    assert after == pytest.approx(psutil.Process(process.pid).memory_full_info().pss, rel=0.01)


def test_a_process_that_no_scan_has_seen_is_looked_up_at_once_by_its_own_environment(start: Start, server: str) -> None:
    table = Processes()
    table.scan()
    process = start("sleep", "60", HEADROOM_SERVER=server)
    assert table.server_of(process.pid) == server


def test_a_child_without_a_name_is_looked_up_by_its_parent(start: Start, server: str) -> None:
    process = start(sys.executable, "-c", OVERWRITE_ENVIRONMENT, HEADROOM_SERVER=server)
    table = Processes()
    table.scan()
    write(process, "\n")
    line(process)
    (child,) = psutil.Process(process.pid).children()
    assert table.server_of(child.pid) == server


def test_a_process_on_a_gpu_whose_environment_is_not_shown_is_counted_and_told_once(
    start: Start, server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = Processes()
    table.scan()
    hidden = [start("sleep", "60", HEADROOM_SERVER=server) for _ in range(2)]
    read = procfs._read

    def refuse(pid: int, name: str) -> bytes:
        if name == "environ" and pid in [process.pid for process in hidden]:
            raise PermissionError
        return read(pid, name)

    monkeypatch.setattr(procfs, "_read", refuse)
    asked = [table.server_of(process.pid) for process in (*hidden, *hidden)]
    assert (asked, table.refused) == ([None] * 4, 2)
    (told,) = caplog.messages
    assert told.startswith(f"process {hidden[0].pid} uses a GPU, and the kernel does not show its environment")


def test_threads_and_open_files_agree_with_psutil(start: Start, server: str) -> None:
    more = "import threading; threading.Thread(target=input).start(); files = [open('/dev/null') for _ in range(9)]"
    process = start(
        sys.executable, "-c", f"{more}; print('ready', flush=True); files[0].read()", HEADROOM_SERVER=server
    )
    line(process)
    table = Processes()
    table.scan()
    readings, truth = table.read_details(), psutil.Process(process.pid)
    assert readings[Series("host_threads", server)] == truth.num_threads() == 2
    assert readings[Series("host_open_files", server)] == truth.num_fds() == 12
