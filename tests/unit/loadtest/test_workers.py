"""A run over several of Locust's processes, each a process of its own as in production."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loadtest.records import Record, count, read

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a reference server: first token after 20 ms, the next ones 10 ms apart."""
    command = [sys.executable, "-m", "loadtest.reference", "--port", "0", "--ttft", "0.02", "--itl", "0.01"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().split()[-1]
        process.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Fleet:
    """A master and its workers in a folder."""

    def __init__(self, folder: Path, url: str, workers: int, options: str, stack: ExitStack):
        self.folder = folder
        port = free_port()
        self.port, self._stack = port, stack
        shown = "" if "--autostart" in options else "--headless"
        fixed = f"{shown} --only-summary --model m --records records.arrow --hf-url {url} --vllm-url {url}"
        self.master = self._start(
            f"{fixed} {options} --master --master-bind-port {port} --expect-workers {workers or 1}"
        )
        self.workers = [self.worker(port) for _ in range(workers)]

    def worker(self, port: int) -> "subprocess.Popen[str]":
        """One more worker of the master at a port."""
        return self._start(f"--worker --master-port {port}")

    def _start(self, arguments: str) -> "subprocess.Popen[str]":
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("HEADROOM_", "LOCUST_"))}
        process = subprocess.Popen(
            [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), *arguments.split()],
            cwd=self.folder,
            env={**ours, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._stack.callback(process.communicate)
        self._stack.callback(process.kill)
        return process

    def ended(self) -> tuple[int, str]:
        """Exit code and output of the master, once it has ended."""
        output, _ = self.master.communicate(timeout=180)
        return self.master.returncode, output

    def wait_for_records(self, number: int) -> None:
        deadline = time.monotonic() + 120
        path = self.folder / "records.arrow"
        while not path.exists() or count(path) < number:
            assert self.master.poll() is None, self.master.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def records(self) -> list[Record]:
        return list(read(self.folder / "records.arrow"))

    def client(self) -> dict[str, Any]:
        kept: dict[str, Any] = json.loads((self.folder / "client.json").read_text())
        return kept


def is_over(client: Path) -> bool:
    """Whether a run has closed its files."""
    return client.exists() and bool(json.loads(client.read_text())["run"]["ended"])


Deploy = Callable[..., Fleet]


@pytest.fixture
def deploy(tmp_path: Path, server: str) -> Iterator[Deploy]:
    with ExitStack() as stack:
        yield lambda workers, options: Fleet(tmp_path, server, workers, options, stack)


def test_workers_send_every_request_once_and_leave_one_file(deploy: Deploy) -> None:
    # Fewer users than workers for a while: they come one by one.
    fleet = deploy(3, "--users 3 --spawn-rate 4 --warmup 3 --requests 50 --output-mean 5 HF")
    code, output = fleet.ended()
    assert code == 0, output
    records = fleet.records()
    assert sorted(record.index for record in records) == list(range(53))
    assert all(record.worker == record.index % 3 for record in records)
    assert {(record.error, record.target) for record in records} == {(None, "hf")}
    assert Counter(record.phase for record in records) == {"warmup": 3, "measured": 50}
    client = fleet.client()
    assert client["lost_workers"] == []
    assert client["complete"] is True
    assert client["valid"] is not bool(client["reasons"])  # on a busy machine the workers may have been late
    assert client["requests_ended"] == {"hf": 53}
    assert sorted(process["worker"] for process in client["processes"]) == [0, 1, 2]


def test_the_whole_of_the_workers_is_one_evenly_spaced_process(deploy: Deploy) -> None:
    fleet = deploy(2, "--arrival constant --rate 40 --requests 60 --output-mean 5 HF VLLM")
    code, output = fleet.ended()
    assert code == 0, output
    late: list[float] = []
    for target in ("hf", "vllm"):
        own = sorted((record for record in fleet.records() if record.target == target), key=lambda one: one.index)
        assert [record.index for record in own] == list(range(60))
        times = [record.scheduled_ns or 0 for record in own]
        assert [later - earlier for earlier, later in pairwise(times)] == [25_000_000] * 59
        assert {record.worker for record in own} == {0, 1}
        late += [(record.sent_ns - time_ns) / 1e9 for record, time_ns in zip(own, times, strict=True)]
    # A busy machine sends late, but not always.
    assert 0 <= min(late) < 0.05
    assert 0 < fleet.client()["send_lateness_p99_seconds"] <= 1.01 * max(late)


def test_percentiles_merged_while_the_run_goes_on_are_those_of_all_records_to_1_percent(deploy: Deploy) -> None:
    port = free_port()
    lengths = "--workload synthetic --output-lengths uniform --output-mean 12"
    fleet = deploy(
        2, f"--autostart --web-port {port} --arrival poisson --rate 80 --requests 400 --warmup 9 {lengths} HF"
    )
    fleet.wait_for_records(409)
    deadline = time.monotonic() + 60
    live: dict[str, Any] = {}
    while live.get("measured") != 400:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/servers.json", timeout=10) as answer:
            live = json.load(answer)["run"].get("hf", {})
    measured = [record for record in fleet.records() if record.phase == "measured"]
    exact = {
        "ttft": [record.ttft_seconds for record in measured],
        "tpot": [record.tpot_seconds for record in measured],
        "e2e": [record.e2e_seconds for record in measured],
    }
    for metric, found in exact.items():
        values = [value for value in found if value is not None]
        for share, percentile in zip((0.5, 0.95, 0.99), live["times"][metric], strict=True):
            low, high = np.quantile(values, share, method="lower"), np.quantile(values, share, method="higher")
            assert low * 0.99 <= percentile <= high * 1.01, (metric, share)


def test_a_killed_worker_is_named_its_records_are_kept_and_the_exit_code_is_4(deploy: Deploy) -> None:
    fleet = deploy(2, "--arrival constant --rate 20 --duration 6 --output-mean 5 HF")
    fleet.wait_for_records(40)
    killed_ns = time.monotonic_ns()
    fleet.workers[0].kill()
    code, output = fleet.ended()
    assert code == 4, output
    client = fleet.client()
    (lost,) = client["lost_workers"]
    assert f"lost: worker {lost}" in output
    assert not client["valid"]
    records = fleet.records()
    assert (client["requests_asked"], client["requests_recorded"]) == ({"hf": 120}, {"hf": len(records)})
    assert f"lost_workers: {lost}: of 120 requests {120 - len(records)} have no record" in client["reasons"]
    by_worker = Counter(record.worker for record in records)
    assert by_worker[1 - lost] == 60
    # But for the last second, in which it also had requests in flight.
    due = sum(record.end_ns < killed_ns - 10**9 for record in records if record.worker == 1 - lost)
    assert by_worker[lost] >= due - 2


def test_workers_whose_run_is_stopped_in_the_web_ui_are_not_lost_and_serve_the_next(deploy: Deploy) -> None:
    port = free_port()
    fleet = deploy(2, f"--autostart --web-port {port} --users 4 --spawn-rate 9 --output-mean 20 HF")
    fleet.wait_for_records(10)
    web = f"http://127.0.0.1:{port}"
    httpx.post(f"{web}/stop", timeout=60).raise_for_status()
    first = fleet.client()
    assert (first["complete"], first["lost_workers"]) == (False, [])
    assert [worker["lost_records"] for worker in first["workers"]] == [0, 0]
    deadline = time.monotonic() + 20
    while httpx.get(f"{web}/stats/requests").json()["state"] != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    form = {"user_count": 2, "spawn_rate": 9, "user_classes": "HF", "requests": 20, "records": "next.arrow"}
    assert httpx.post(f"{web}/swarm", data=form, timeout=60).json()["success"]
    while not is_over(fleet.folder / "next.json"):
        assert time.monotonic() < deadline + 20
        time.sleep(0.1)
    assert sorted(record.index for record in read(fleet.folder / "next.arrow")) == list(range(20))
    assert json.loads((fleet.folder / "next.json").read_text())["complete"] is True


@pytest.mark.parametrize("users", [1, 2])
def test_a_run_that_lost_a_worker_can_be_stopped_in_the_web_ui(deploy: Deploy, users: int) -> None:
    # With one user one of the workers has none: Locust then takes the run to have stopped before it misses the other.
    port = free_port()
    fleet = deploy(2, f"--autostart --web-port {port} --users {users} --arrival constant --rate 20 --output-mean 5 HF")
    fleet.wait_for_records(20)
    fleet.workers[0].kill()
    web, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    httpx.post(f"{web}/stop", timeout=60).raise_for_status()
    while httpx.get(f"{web}/stats/requests").json()["state"] != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    client = fleet.client()
    assert len(client["lost_workers"]) == 1
    shown = httpx.get(f"{web}/servers.json").json()["judgement"]
    assert shown == {"complete": False, "valid": False, "reasons": client["reasons"]}


def test_a_run_that_is_started_as_soon_as_the_last_has_stopped_waits_until_that_is_over(deploy: Deploy) -> None:
    port = free_port()
    # In an open loop users are there until they are stopped, and Locust's master looks once a second whether they are.
    open_loop = "--arrival constant --rate 40 --requests 40 --output-mean 5"
    fleet = deploy(1, f"--autostart --web-port {port} --users 2 --spawn-rate 9 {open_loop} HF")
    web, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while not (fleet.folder / "records.arrow").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while httpx.get(f"{web}/stats/requests").json()["state"] != "stopped":
        assert time.monotonic() < deadline
    form = {"user_count": 2, "spawn_rate": 9, "user_classes": "HF", "requests": 20, "records": "next.arrow"}
    assert httpx.post(f"{web}/swarm", data=form, timeout=60).json()["success"]
    assert fleet.client()["complete"] is True
    while not is_over(fleet.folder / "next.json"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_worker_that_is_stopped_before_its_part_is_done_is_lost_too(deploy: Deploy) -> None:
    fleet = deploy(2, "--arrival constant --rate 20 --duration 6 --output-mean 5 HF")
    fleet.wait_for_records(40)
    fleet.workers[0].terminate()
    code, output = fleet.ended()
    assert code == 4, output
    client = fleet.client()
    assert len(client["lost_workers"]) == 1
    assert client["complete"] is False
    # It has told what it had done, and cancelled the rest.
    assert sum(client["requests_ended"].values()) == len(fleet.records())


def test_a_worker_that_comes_late_waits_for_the_next_run_and_disturbs_none(deploy: Deploy) -> None:
    fleet = deploy(1, "--users 3 --spawn-rate 9 --requests 300 --output-mean 8 HF")
    fleet.wait_for_records(10)
    late = fleet.worker(fleet.port)
    code, output = fleet.ended()
    assert code == 0, output
    assert "2 workers connected" in output
    records = fleet.records()
    assert Counter(record.error for record in records) == {None: 300}
    assert {record.worker for record in records} == {0}
    assert late.wait(20) == 0


class Relay:
    """Passes a worker's connections on to the master, until `swallow`: then what the worker says goes nowhere."""

    def __init__(self, port: int):
        self.to, self.swallowed = port, 0
        self._swallows = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self, seconds: float) -> None:
        """Take what the worker says for a while, then break its connection."""
        self._swallows.set()
        time.sleep(seconds)
        for one in self._pairs.pop():
            one.shutdown(socket.SHUT_RDWR)
        self._swallows.clear()

    def close(self) -> None:
        self._listener.close()
        for one in sum(self._pairs, ()):
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                worker, _ = self._listener.accept()
                try:
                    master = socket.create_connection(("127.0.0.1", self.to))
                except ConnectionRefusedError:  # it is not there yet
                    worker.close()
                    continue
                self._pairs.append((worker, master))
                for source, target in ((worker, master), (master, worker)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        to_master = target.getpeername()[1] == self.to
        with suppress(OSError):
            while data := source.recv(65536):
                if to_master and self._swallows.is_set():
                    self.swallowed += len(data)
                else:
                    target.sendall(data)


def test_what_was_sent_into_a_connection_that_broke_is_sent_again(deploy: Deploy) -> None:
    fleet = deploy(0, "--arrival constant --rate 40 --duration 6 --output-mean 5 HF")
    with closing(Relay(fleet.port)) as relay:
        fleet.worker(relay.port)
        fleet.wait_for_records(40)
        relay.swallow(1.5)
        code, output = fleet.ended()
    assert code == 0, output
    assert relay.swallowed > 1000
    assert sorted(record.index for record in fleet.records()) == list(range(240))
    (worker,) = fleet.client()["workers"]
    assert (worker["records"], worker["lost_records"], worker["host"]) == (240, 0, socket.gethostname())


def test_a_run_that_is_stopped_keeps_the_last_records_of_its_workers(deploy: Deploy) -> None:
    fleet = deploy(2, "--users 4 --spawn-rate 9 --output-mean 200 --timeout 60 HF")
    fleet.wait_for_records(2)
    fleet.master.send_signal(signal.SIGTERM)
    _, output = fleet.ended()
    assert "Traceback" not in output
    errors = Counter(record.error for record in fleet.records())
    assert errors["cancelled"] == 4
    assert errors.keys() == {None, "cancelled"}
    assert sum(fleet.client()["requests_ended"].values()) == errors.total()
    assert fleet.client()["complete"] is False


@pytest.mark.parametrize("users", [2, 7])
def test_in_a_closed_loop_each_server_gets_every_request_once_wherever_its_users_are(
    deploy: Deploy, users: int
) -> None:
    fleet = deploy(2, f"--users {users} --spawn-rate 4 --requests 20 --output-mean 5 HF VLLM")
    code, output = fleet.ended()
    assert code == 0, output
    records = fleet.records()
    for target in ("hf", "vllm"):
        assert sorted(record.index for record in records if record.target == target) == list(range(20))
    # Locust places users of the two classes by turns: each of two workers has those of one.
    assert {(record.worker, record.target) for record in records} in (
        {(0, "hf"), (1, "vllm")},
        {(1, "hf"), (0, "vllm")},
    )
    assert fleet.client()["requests_ended"] == {"hf": 20, "vllm": 20}


def test_a_worker_without_a_user_leaves_all_to_the_others(deploy: Deploy) -> None:
    fleet = deploy(2, "--users 1 --requests 5 --output-mean 5 HF")
    code, output = fleet.ended()
    assert code == 0, output
    records = fleet.records()
    assert [record.index for record in records] == list(range(5))
    assert len({record.worker for record in records}) == 1
    assert fleet.client()["lost_workers"] == []


def test_a_closed_loop_in_which_a_server_would_have_no_user_is_refused(deploy: Deploy) -> None:
    fleet = deploy(2, "--users 1 --requests 5 HF VLLM")
    code, output = fleet.ended()
    assert code == 2
    assert "users: 1: in a closed loop expected at least one for each server, not none for vllm" in output
    assert not list(fleet.folder.iterdir())


def test_records_that_cannot_be_kept_end_the_run_on_all_workers(deploy: Deploy, tmp_path: Path) -> None:
    (tmp_path / "records.arrow").write_text("not ours")
    fleet = deploy(2, "--users 2 --requests 50 HF")
    code, output = fleet.ended()
    assert code == 3
    assert "its records cannot be kept" in output
    assert (tmp_path / "records.arrow").read_text() == "not ours"
    for worker in fleet.workers:
        worker.wait(20)
