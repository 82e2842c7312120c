"""Processes of servers, through a /proc that is written here, for what real processes cannot be made to do."""

import os
import shutil
from itertools import islice
from pathlib import Path

import pytest

from monitor import procfs
from monitor.processes import LEAST_WAIT, MOST_WAIT, SCANS_A_ROUND, Processes
from monitor.timeline import Series
from tests.unit.monitor.test_processes import Clock, count, pss, read_each_once

RESIDENT = 10 * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc with process 7 of server hf, for what real processes cannot be made to do."""
    monkeypatch.setattr(procfs, "PROC", tmp_path)
    monkeypatch.setattr(procfs, "in_host_namespace", lambda: True)
    write_process(tmp_path, pid=7, started=1000, environ="HEADROOM_SERVER=hf\0")
    return tmp_path


def write_process(proc: Path, pid: int, started: int, environ: str, parent: int = 1, pages: int = 10) -> None:
    folder, old = proc / str(pid), proc / "old"
    if folder.exists():
        # Beside the new one until that is made, which so gets another inode, as in /proc.
        folder.rename(old)
    folder.mkdir()
    shutil.rmtree(old, ignore_errors=True)
    (folder / "environ").write_text(environ)
    (folder / "stat").write_text(f"{pid} (a name) S) S {parent} {'0 ' * 9}300 200 {'0 ' * 6}{started} 900 {pages} 0 0")
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
        write_process(proc, pid=7, started=1000, environ="HEADROOM_SERVER=hf\0", pages=pages)
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

    monkeypatch.setattr(procfs, "shared_bytes", costly)
    write_process(proc, pid=8, started=1000, environ="HEADROOM_SERVER=hf\0")
    clock = Clock()
    table = Processes(clock)
    table.read()
    reading, waited = table.read_shared(max_cpu, cpu_clock=lambda: cpu), 0.0
    while cpu < 100:
        clock.seconds = cpu + waited
        waited += next(reading)
    # What the last one costs is waited for after it.
    assert 0.9 * max_cpu <= (cpu - 1.5) / (cpu - 1.5 + waited) <= 1.01 * max_cpu


def test_new_processes_do_not_wait_for_what_others_cost(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    cpu = 0.0

    def costly(pid: int) -> int:
        nonlocal cpu
        cpu += 1.0
        read.append(pid)
        return 0

    monkeypatch.setattr(procfs, "shared_bytes", costly)
    write_process(proc, pid=8, started=1000, environ="HEADROOM_SERVER=hf\0")
    clock = Clock()
    table = Processes(clock)
    table.read()
    reading = table.read_shared(0.01, cpu_clock=lambda: cpu)
    waited = sum(islice(reading, 3))
    assert (sorted(read), waited) == ([7, 8], LEAST_WAIT + 2 * MOST_WAIT)
    write_process(proc, pid=9, started=1000, environ="HEADROOM_SERVER=vllm\0")
    table.scan()
    next(reading)
    assert read[2:] == [9]
    waited += MOST_WAIT
    while len(read) == 3:
        clock.seconds = waited
        waited += next(reading)
    assert 3 * 99 <= waited <= 3 * 99 + 2 * MOST_WAIT


def test_what_was_read_within_the_second_is_not_read_again(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[float] = []
    clock = Clock()
    monkeypatch.setattr(procfs, "shared_bytes", lambda _: read.append(clock.seconds))
    table = Processes(clock)
    table.read()
    reading = table.read_shared(max_cpu=1, cpu_clock=lambda: 0.0)
    for clock.seconds in (0, 0.5, 0.999, 1, 1.5, 2):
        next(reading)
    assert read == [0, 1, 2]


def test_nothing_to_read_does_not_spin(proc: Path) -> None:
    assert next(Processes().read_shared(max_cpu=1)) == LEAST_WAIT


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


def test_of_processes_that_are_known_and_old_a_round_of_scans_reads_each_environment_once_and_nothing_else(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid in range(100, 300):
        write_process(proc, pid, started=1000, environ="PATH=/bin\0")
    table, read, asked = Processes(), procfs._read, []
    table.scan()

    def reading(pid: int, name: str) -> bytes:
        asked.append((pid, name))
        return read(pid, name)

    monkeypatch.setattr(procfs, "_read", reading)
    for _ in range(SCANS_A_ROUND):
        before = len(asked)
        table.scan()
        assert len(asked) - before <= 201 // SCANS_A_ROUND + 1
    assert sorted(asked) == sorted((pid, "environ") for pid in (7, *range(100, 300)))


def test_another_process_with_the_pid_of_one_of_no_server_is_found(proc: Path) -> None:
    write_process(proc, pid=8, started=1000, environ="PATH=/bin\0")
    table = Processes()
    table.scan()
    write_process(proc, pid=8, started=2000, environ="HEADROOM_SERVER=vllm\0")
    table.scan()
    assert table.servers() == {7: "hf", 8: "vllm"}


def test_an_inode_that_the_kernel_made_anew_makes_no_new_process(proc: Path) -> None:
    table = Processes()
    before = table.read()
    write_process(proc, pid=7, started=1000, environ="title\0")
    table.scan()
    assert table.servers() == {7: "hf"}
    assert table.read() == before


def test_a_process_whose_parent_is_gone_does_not_belong_to_a_younger_one_with_the_parents_pid(proc: Path) -> None:
    write_process(proc, pid=8, started=500, environ="PATH=/bin\0", parent=7)
    write_process(proc, pid=9, started=1000, environ="PATH=/bin\0", parent=7)
    write_process(proc, pid=10, started=1001, environ="PATH=/bin\0", parent=9)
    table = Processes()
    table.scan()
    assert table.servers() == {7: "hf", 9: "hf", 10: "hf"}


def test_in_a_namespace_of_our_own_a_pid_counts_only_when_the_process_has_a_gpu_open(proc: Path) -> None:
    write_process(proc, pid=8, started=1000, environ="PATH=/bin\0", parent=7)
    table = Processes()
    table.of_host = False
    assert [table.server_of(pid) for pid in (7, 8)] == [None, None]
    for pid in (7, 8):
        (proc / str(pid) / "fd").mkdir()
        (proc / str(pid) / "fd" / "0").symlink_to("/dev/null")
    assert [table.server_of(pid) for pid in (7, 8)] == [None, None]
    for pid in (7, 8):
        (proc / str(pid) / "fd" / "5").symlink_to("/dev/nvidia0")
    assert [table.server_of(pid) for pid in (7, 8)] == ["hf", "hf"]
    table.scan()
    assert [table.server_of(pid) for pid in (7, 8)] == ["hf", "hf"]


def test_the_namespace_of_the_host_is_known_by_its_inode(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path("/proc/self/ns/pid").stat().st_ino
    monkeypatch.setattr(procfs, "HOST_NAMESPACE", own)
    assert Processes().of_host
    monkeypatch.setattr(procfs, "HOST_NAMESPACE", own + 1)
    assert not Processes().of_host
    monkeypatch.setattr(procfs, "PROC", "/nonexistent")
    assert not Processes().of_host


def test_a_process_that_is_gone_belongs_to_its_server_until_the_next_scan(proc: Path) -> None:
    table = Processes()
    assert table.server_of(7) == "hf"
    for name in ("environ", "stat"):
        (proc / "7" / name).unlink()
    assert table.server_of(7) == "hf"
    table.scan()
    assert table.server_of(7) is None


def test_open_files_that_the_kernel_refuses_are_absent_and_threads_are_not(proc: Path) -> None:
    table = Processes()
    table.scan()
    assert table.read_details() == {Series("host_threads", "hf"): 0.0}
