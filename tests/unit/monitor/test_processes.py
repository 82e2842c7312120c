"""Processes of servers, through the real /proc where it can be made to show the case."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from monitor import processes
from monitor.processes import LEAST_WAIT, SCAN_EVERY_NS, Processes
from monitor.timeline import Instant, Readings, Series

RESIDENT = 10 * os.sysconf("SC_PAGE_SIZE")
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

    seconds = 0

    def __call__(self) -> Instant:
        return Instant(self.seconds * 1_000_000_000, 0)


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
    moment = Instant(0, 0)
    table = Processes(clock=lambda: moment)
    table.read()
    start("sleep", "60", HEADROOM_SERVER=server)
    moment = Instant(900_000_000, 0)
    assert count(table.read(), server) == 1


def test_between_scans_all_of_proc_is_left_alone(start: Start, server: str) -> None:
    moment = Instant(0, 0)
    table = Processes(clock=lambda: moment)
    table.read()
    start("sleep", "60", HEADROOM_SERVER=server)
    moment = Instant(SCAN_EVERY_NS - 1, 0)
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


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc with process 7 of server hf, for what real processes cannot be made to do."""
    monkeypatch.setattr(processes, "PROC", tmp_path)
    write_process(tmp_path, pid=7, started=1000, environ="HEADROOM_SERVER=hf\0")
    return tmp_path


def write_process(proc: Path, pid: int, started: int, environ: str) -> None:
    folder = proc / str(pid)
    folder.mkdir(exist_ok=True)
    (folder / "environ").write_text(environ)
    (folder / "stat").write_text(f"{pid} (a name) S) S 1 {'0 ' * 9}300 200 {'0 ' * 6}{started} 0 0")
    (folder / "statm").write_text("90 10 0 0 0 0 0")
    (folder / "smaps_rollup").write_text("Rss:      40 kB\nPss:      30 kB\nPss_Dirty:  20 kB\n")


def test_a_name_with_parentheses_does_not_confuse_the_fields(proc: Path) -> None:
    assert Processes().read() == {
        Series("host_processes", "hf"): 1,
        Series("host_rss_bytes", "hf"): RESIDENT,
        Series("host_cpu_seconds_total", "hf"): 500 / os.sysconf("SC_CLK_TCK"),
    }


def test_another_process_with_the_pid_of_an_old_one_is_not_taken_for_it(proc: Path) -> None:
    table = Processes()
    assert count(table.read(), "hf") == 1
    write_process(proc, pid=7, started=2000, environ="PATH=/bin\0")
    read_each_once(table)
    assert table.read() == {}


def test_an_unreadable_environment_is_skipped(proc: Path) -> None:
    write_process(proc, pid=8, started=1000, environ="")
    (proc / "8" / "environ").unlink()
    (proc / "8" / "environ").mkdir()
    table = Processes()
    table.scan()
    assert table.servers() == {7: "hf"}


def test_proportional_memory_that_the_kernel_refuses_makes_the_sum_absent_and_holds_up_no_other(proc: Path) -> None:
    write_process(proc, pid=8, started=1000, environ="HEADROOM_SERVER=hf\0")
    write_process(proc, pid=9, started=1000, environ="HEADROOM_SERVER=vllm\0")
    (proc / "7" / "smaps_rollup").unlink()
    table = Processes()
    table.read()
    reading = table.read_shared(max_cpu=1)
    for _ in range(3):
        next(reading)
    assert pss(table, "hf") is None
    assert pss(table, "vllm") == RESIDENT - 10 * 1024


def test_proportional_memory_is_absent_until_every_process_has_been_read(proc: Path) -> None:
    write_process(proc, pid=8, started=1000, environ="HEADROOM_SERVER=hf\0")
    table = Processes()
    table.read()
    reading = table.read_shared(max_cpu=1)
    seen = [pss(table, "hf"), *(pss(table, "hf") for _ in islice(reading, 2))]
    assert seen == [None, None, 2 * (RESIDENT - 10 * 1024)]


def test_proportional_memory_follows_resident_memory_between_readings_but_never_below_zero(proc: Path) -> None:
    table = Processes()
    table.read()
    read_each_once(table)
    seen = []
    for pages in (10, 1000, 1):
        (proc / "7" / "statm").write_text(f"9000 {pages} 0 0 0 0 0")
        seen.append(pss(table, "hf"))
    assert seen == [RESIDENT - 10 * 1024, 100 * RESIDENT - 10 * 1024, 0]


def test_a_new_process_is_read_first_and_then_the_oldest_reading_which_the_age_is_of(proc: Path) -> None:
    clock = Clock()
    table = Processes(clock)
    write_process(proc, pid=8, started=1000, environ="HEADROOM_SERVER=hf\0")
    table.read()
    reading, ages = table.read_shared(max_cpu=1), []
    for clock.seconds in (1, 2):
        next(reading)
    write_process(proc, pid=9, started=1000, environ="HEADROOM_SERVER=vllm\0")
    table.scan()
    for clock.seconds in (3, 4, 5):
        next(reading)
        readings = table.read()
        ages.append(tuple(readings[Series("host_pss_age_seconds", name)] for name in ("hf", "vllm")))
    assert ages == [(2, 0), (2, 1), (1, 2)]


@pytest.mark.parametrize("max_cpu", [0.02, 0.5, 1])
def test_reading_shared_memory_stays_within_its_budget(
    proc: Path, monkeypatch: pytest.MonkeyPatch, max_cpu: float
) -> None:
    cpu = 0.0

    def costly(pid: int) -> int:
        nonlocal cpu
        cpu += {7: 0.5, 8: 1.5}[pid]
        return 0

    monkeypatch.setattr(processes, "_shared_bytes", costly)
    write_process(proc, pid=8, started=1000, environ="HEADROOM_SERVER=hf\0")
    table = Processes()
    table.read()
    waited = sum(islice(table.read_shared(max_cpu, cpu_clock=lambda: cpu), 10))
    assert cpu == 10
    assert cpu / (cpu + waited) == pytest.approx(max_cpu, rel=0.1)
    assert cpu / (cpu + waited) <= max_cpu * 1.000001


def test_nothing_to_read_does_not_spin(proc: Path) -> None:
    assert next(Processes().read_shared(max_cpu=1)) == LEAST_WAIT


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


def test_a_process_of_no_server_is_looked_up_once_until_another_bears_its_pid(proc: Path) -> None:
    write_process(proc, pid=8, started=1000, environ="PATH=/bin\0")
    table = Processes()
    assert table.server_of(8) is None
    (proc / "8" / "environ").write_text("HEADROOM_SERVER=hf\0")
    (proc / "8" / "stat").unlink()
    assert table.server_of(8) is None
    write_process(proc, pid=8, started=2000, environ="HEADROOM_SERVER=vllm\0")
    before = table.generation
    table.scan()
    assert table.generation > before
    assert table.server_of(8) == "vllm"


def test_a_process_that_is_gone_belongs_to_its_server_until_the_next_scan(proc: Path) -> None:
    table = Processes()
    assert table.server_of(7) == "hf"
    for name in ("environ", "stat"):
        (proc / "7" / name).unlink()
    assert table.server_of(7) == "hf"
    table.scan()
    assert table.server_of(7) is None


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


def test_open_files_that_the_kernel_refuses_are_absent_and_threads_are_not(proc: Path) -> None:
    table = Processes()
    table.scan()
    assert table.read_details() == {Series("host_threads", "hf"): 0.0}
