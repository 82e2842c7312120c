"""Workers on other hosts: one run, one clock, and what a cut wire or a new master does to it.

The hosts are network namespaces on this machine. They need root; HEADROOM_NO_NAMESPACES=1 says that there are none.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from loadtest.records import Record, count, read
from tests.integration.harness import free_ports
from tests.integration.network import Host, ip, unavailable

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
LOCUST = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py")]
LOST, CUT_OFF = 4, 5


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    if os.environ.get("HEADROOM_NO_NAMESPACES"):
        pytest.skip("HEADROOM_NO_NAMESPACES is set")
    if problem := unavailable():
        pytest.fail(f"{problem}; these tests need root and namespaces, or HEADROOM_NO_NAMESPACES=1", pytrace=False)


class Fleet:
    """A master here and its workers on hosts, which all load one server on this machine."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self._stack = folder, stack
        (self.port,) = free_ports(1)
        self._here = f"198.18.{os.getpid() % 250}.254"
        ip("address", "add", self._here, "dev", "lo")
        stack.callback(ip, "address", "delete", f"{self._here}/32", "dev", "lo")
        server = [sys.executable, "-m", "loadtest.reference", "--host", self._here, "--port", "0"]
        self._url = self._start([*server, "--ttft", "0.02", "--itl", "0.01"], cwd=ROOT)[1]
        self._hosts = 0

    def _start(self, command: list[str], cwd: Path | None = None) -> "tuple[subprocess.Popen[str], str]":
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("HEADROOM_", "LOCUST_"))}
        log = self.folder / f"{len(list(self.folder.iterdir()))}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd or self.folder,
                env={**ours, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=output,
                text=True,
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        if cwd == ROOT:
            while not (said := log.read_text()):
                assert process.poll() is None
                time.sleep(0.05)
            return process, said.split()[-1]
        return process, str(log)

    def host(self) -> Host:
        self._hosts += 1
        return Host(self._hosts, self._stack)

    def worker(self, host: Host, clock_seconds: int = 0) -> "subprocess.Popen[str]":
        connect = ["--worker", "--master-host", host.master, "--master-port", str(self.port)]
        return self._start(host.command(LOCUST + connect, clock_seconds))[0]

    def run(self, workers: int, options: str, name: str = "records") -> "Run":
        fixed = f"--headless --only-summary --model m --records {name}.arrow --hf-url {self._url}"
        master = f"--master --master-bind-port {self.port} --expect-workers {workers} {fixed} {options} HF"
        process, log = self._start([*LOCUST, *master.split()])
        return Run(process, Path(log), self.folder / f"{name}.arrow")

    def make_worker(self, host: Host) -> "subprocess.Popen[str]":
        # -o: this environment is the one to use.
        given = [f"MASTER={host.master}", f"PORT={self.port}", f"BIN={Path(sys.executable).parent}"]
        make = ["make", "-C", str(ROOT), "-o", ".venv/ready-worker", "worker", *given]
        return self._start(host.command(make))[0]


class Run:
    """One run of the master."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path, path: Path):
        self.process, self._log, self.path = process, log, path

    @property
    def output(self) -> str:
        return self._log.read_text()

    def ended(self) -> int:
        return self.process.wait(timeout=90)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait_for_records(self, number: int) -> None:
        self.wait_for(lambda: self.path.exists() and count(self.path) >= number)

    def records(self) -> list[Record]:
        return sorted(read(self.path), key=lambda record: record.index)

    def client(self) -> dict[str, Any]:
        summary = "client.json" if self.path.stem == "records" else f"{self.path.stem}.json"
        kept: dict[str, Any] = json.loads(self.path.with_name(summary).read_text())
        return kept


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, stack)


def test_workers_on_hosts_with_other_clocks_leave_one_file_on_one_clock(fleet: Fleet) -> None:
    ahead, beside = fleet.host(), fleet.host()
    ahead.wire.delays = (0.006, 0.001)  # not the same both ways, which no exchange of messages can tell
    began_ns = time.monotonic_ns()
    fleet.worker(ahead, clock_seconds=1000)
    fleet.worker(beside)
    run = fleet.run(2, "--arrival constant --rate 20 --requests 60 --output-mean 5")
    assert run.ended() == 0, run.output
    ended_ns = time.monotonic_ns()

    client, records = run.client(), run.records()
    workers = {worker["host"]: worker for worker in client["workers"]}
    assert workers.keys() == {"host-1", "host-2"}
    clock = workers["host-1"]["clock"]
    assert not clock["same_clock"]
    assert abs(clock["offset_seconds"] + 1000) <= clock["uncertainty_seconds"]
    assert clock["uncertainty_seconds"] >= 0.0035  # half of the way there and back
    assert clock["exchanges"] >= 2
    assert workers["host-2"]["clock"]["same_clock"]
    assert workers["host-2"]["clock"]["uncertainty_seconds"] == 0
    assert "worker" in run.output
    assert "s +/- " in run.output

    assert [record.index for record in records] == list(range(60))
    assert {record.error for record in records} == {None}
    due = [record.scheduled_ns or 0 for record in records]
    assert {later - earlier for earlier, later in pairwise(due)} == {50_000_000}
    for record in records:
        stamps = [record.sent_ns, *record.chunk_ns, record.end_ns]
        assert stamps == sorted(stamps)
        assert began_ns < stamps[0] <= stamps[-1] < ended_ns
    assert Counter(record.worker for record in records) == {0: 30, 1: 30}


def test_a_run_whose_clocks_are_known_too_badly_says_so_and_loses_nothing(fleet: Fleet) -> None:
    host = fleet.host()
    host.wire.delays, host.wire.loss = (0.025, 0.025), 0.02
    fleet.worker(host, clock_seconds=-500)
    run = fleet.run(1, "--arrival constant --rate 20 --requests 80 --output-mean 5")
    assert run.ended() == 0, run.output
    client = run.client()
    (worker,) = client["workers"]
    assert abs(worker["clock"]["offset_seconds"] - 500) <= worker["clock"]["uncertainty_seconds"]
    assert client["valid"] is False
    assert any(reason.startswith("clock_uncertainty_seconds: 0.0") for reason in client["reasons"])
    assert "the run is not valid: clock_uncertainty_seconds" in run.output
    assert [record.index for record in run.records()] == list(range(80))
    assert (worker["records"], worker["lost_records"]) == (80, 0)


def test_a_run_goes_on_after_a_short_cut_loses_nothing_and_says_so(fleet: Fleet) -> None:
    cut, other = fleet.host(), fleet.host()
    fleet.worker(cut, clock_seconds=1000)
    fleet.worker(other)
    run = fleet.run(2, "--arrival constant --rate 20 --duration 12 --output-mean 5")
    run.wait_for_records(40)
    cut.wire.is_cut = True
    time.sleep(4)
    cut.wire.is_cut = False
    assert run.ended() == 0, run.output
    client, records = run.client(), run.records()
    assert client["complete"] is True
    assert client["lost_workers"] == []
    assert [record.index for record in records] == list(range(240))
    assert {record.error for record in records} == {None}
    (worker,) = [worker for worker in client["workers"] if worker["host"] == "host-1"]
    assert (worker["records"], worker["lost_records"]) == (120, 0)
    # The wire was cut for 4 s; then TCP takes up to as long again to try once more.
    assert any(4 <= outage["seconds"] < 10 for outage in worker["cut_off"]), worker
    assert any(reason.startswith("cut_off_seconds") for reason in client["reasons"])
    assert "on host-1: nothing heard for 3 s" in run.output
    assert "on host-1 is back after" in run.output


def test_a_worker_that_stays_cut_off_is_lost_and_ends_and_what_it_had_passed_on_is_kept(fleet: Fleet) -> None:
    cut, other = fleet.host(), fleet.host()
    lost = fleet.worker(cut)
    fleet.worker(other)
    run = fleet.run(2, "--arrival constant --rate 20 --duration 8 --output-mean 5")
    run.wait_for_records(60)
    cut.wire.is_cut = True
    cut_ns = time.monotonic_ns()
    assert run.ended() == LOST, run.output
    client, records = run.client(), run.records()
    by_host = {worker["host"]: worker for worker in client["workers"]}
    number = by_host["host-1"]["worker"]
    assert client["lost_workers"] == [number]
    assert not client["valid"]
    assert f"lost: worker {number};" in run.output
    (silence,) = by_host["host-1"]["cut_off"]
    assert silence["seconds"] > 9
    assert abs(silence["since_ns"] - cut_ns) < 2e9
    kept = Counter(record.worker for record in records)
    assert kept[1 - number] == 80
    # It passes its records on each half second.
    assert kept[number] == by_host["host-1"]["records"] >= 80 * (cut_ns - records[0].sent_ns) / 8e9 - 10
    assert lost.wait(timeout=20) == CUT_OFF


def test_workers_find_a_restarted_master_within_10_seconds(fleet: Fleet) -> None:
    host = fleet.host()
    worker = fleet.worker(host, clock_seconds=1000)
    first = fleet.run(1, "--users 3 --spawn-rate 9 --output-mean 20", "first")
    first.wait_for_records(20)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert count(first.path) >= 20
    second = fleet.run(1, "--users 2 --spawn-rate 9 --requests 30 --output-mean 5", "second")
    second.wait_for(lambda: _listens(fleet.port))
    since = time.monotonic()
    second.wait_for(second.path.exists)
    assert time.monotonic() - since < 10
    assert second.ended() == 0, second.output
    assert [record.index for record in second.records()] == list(range(30))
    worker.wait(timeout=20)  # the master told it to end


def test_make_worker_serves_a_master_and_one_that_was_cut_off_is_there_for_the_next_run(fleet: Fleet) -> None:
    host = fleet.host()
    made = fleet.make_worker(host)
    first = fleet.run(1, "--arrival constant --rate 10 --duration 60 --output-mean 5", "first")
    first.wait_for_records(10)
    host.wire.is_cut = True
    assert first.ended() == LOST, first.output
    host.wire.is_cut = False
    assert made.poll() is None
    second = fleet.run(1, "--arrival constant --rate 10 --requests 20 --output-mean 5", "second")
    assert second.ended() == 0, second.output
    assert [record.index for record in second.records()] == list(range(20))
    assert made.wait(timeout=20) == 0


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
