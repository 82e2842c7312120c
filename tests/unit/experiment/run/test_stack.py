"""Programs as processes: start, watch, ask, stop; with real processes and real sockets."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiment.run import stack
from experiment.run.cells import Timeline
from experiment.run.stack import Program, RunError, Stack
from monitor.settings import Settings
from tests.unit.experiment.folders import make_plan
from tests.unit.experiment.run.conftest import Serve

PLAIN = "HTTP/1.1 200 OK\r\nConnection: close\r\n"


@pytest.fixture
def answer() -> Iterator[Callable[[bytes], str]]:
    """Start a server that answers one connection with raw bytes and closes it."""
    listeners: list[socket.socket] = []

    def start(raw: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(raw)

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def sleeper(tmp_path: Path, processes: list[subprocess.Popen[bytes]]) -> Program:
    processes.append(stack.spawn(["sleep", "60"], tmp_path / "sleeper.log", {}))
    return Program("sleeper", processes[0], tmp_path / "sleeper.log", unused_url())


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def ended(tmp_path: Path, script: str, name: str = "hf") -> Program:
    process = stack.spawn(["sh", "-c", script], tmp_path / f"{name}.log", {})
    process.wait()
    return Program(name, process, tmp_path / f"{name}.log", "")


def make_stack(tmp_path: Path, **programs: Program) -> Stack:
    made = Stack(make_plan(), tmp_path, lambda _: None)
    made.programs |= programs
    return made


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_taken_port_is_named_with_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RunError) as refused:
            stack.require_free("--hf-port", port)
    assert str(port) in str(refused.value)
    assert "--hf-port" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_free_port_is_not_refused() -> None:
    stack.require_free("--hf-port", int(unused_url().rpartition(":")[2]))


def test_a_program_that_runs_passes_the_check(sleeper: Program) -> None:
    sleeper.check()


def test_a_program_that_ended_is_reported_with_its_code_and_the_end_of_its_log(tmp_path: Path) -> None:
    program = ended(tmp_path, "seq 100; echo out of memory >&2; exit 3")
    with pytest.raises(RunError) as raised:
        program.check()
    message = str(raised.value)
    assert message.startswith(f"hf ended with code 3. The end of {program.log}:\n")
    assert message.endswith("\n  100\n  out of memory")
    assert "\n  80\n" not in message


def test_a_program_that_was_killed_is_reported_with_the_signal(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="hf was killed by signal 9") as raised:
        ended(tmp_path, "echo last words; kill -9 $$").check()
    assert "  last words" in str(raised.value)


def test_a_log_that_is_not_utf_8_can_be_shown(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ended with code 1"):
        ended(tmp_path, r"printf '\377\376'; exit 1").check()


def test_a_started_program_gets_the_environment_and_no_terminal(tmp_path: Path) -> None:
    program = ended(tmp_path, 'echo "$ONE $PYTHONUNBUFFERED"; cat')
    assert program.log.read_text().startswith(" 1\n")
    process = stack.spawn(["sh", "-c", 'echo "$ONE"'], tmp_path / "one.log", {"ONE": "two"})
    process.wait()
    assert (tmp_path / "one.log").read_text() == "two\n"


def test_ctrl_c_in_our_session_does_not_reach_a_started_program(sleeper: Program) -> None:
    assert os.getsid(sleeper.process.pid) == sleeper.process.pid != os.getsid(0)


PARENT = """
import sys, time
from pathlib import Path
from experiment.run.stack import spawn
print(spawn(["sleep", "60"], Path(sys.argv[1]), {}).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's end")
def test_a_started_program_dies_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[4]) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_good_answer_is_its_body(serve: Serve) -> None:
    assert stack.get(serve({"/a": b"body"}) + "/a") == b"body"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"garbage\r\n\r\n", id="garbage"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x00\xff" * 100, id="binary"),
        pytest.param((PLAIN + "Content-Length: 100\r\n\r\nshort").encode(), id="cut"),
        pytest.param((PLAIN + "Transfer-Encoding: chunked\r\n\r\n5\r\nab").encode(), id="cut in a chunk"),
        pytest.param((PLAIN + "Transfer-Encoding: chunked\r\n\r\nzz\r\nab").encode(), id="bad chunk"),
        pytest.param(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", id="status"),
    ],
)
def test_a_bad_answer_is_none(answer: Callable[[bytes], str], raw: bytes) -> None:
    assert stack.get(answer(raw) + "/health", timeout_seconds=2) is None


def test_no_answer_is_none() -> None:
    assert stack.get(unused_url()) is None


def test_an_empty_answer_is_healthy(tmp_path: Path, sleeper: Program, serve: Serve) -> None:
    sleeper.url = serve({"/health": b""})
    make_stack(tmp_path, hf=sleeper).require_healthy("hf")


def test_a_program_that_answers_nothing_is_not_healthy(
    tmp_path: Path, sleeper: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "time", Time())
    with pytest.raises(RunError, match=f"hf does not answer at {sleeper.url}/health"):
        make_stack(tmp_path, hf=sleeper).require_healthy("hf")


def test_a_program_that_ended_is_not_healthy_and_its_end_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="hf ended with code 5"):
        make_stack(tmp_path, hf=ended(tmp_path, "exit 5")).require_healthy("hf")


def context(length: Any) -> dict[str, bytes]:
    return {"/v1/models": json.dumps({"data": [{"id": "m", "max_model_len": length}]}).encode()}


def test_the_context_is_the_shorter_of_both_servers(tmp_path: Path, sleeper: Program, serve: Serve) -> None:
    programs = {
        name: Program(name, sleeper.process, sleeper.log, serve(context(length)))
        for name, length in (("hf", 2048), ("vllm", 1024))
    }
    assert make_stack(tmp_path, **programs).max_model_len() == 1024


@pytest.mark.parametrize(
    "bodies", [{}, {"/v1/models": b""}, {"/v1/models": b"[]"}, {"/v1/models": b'{"data": []}'}, context(None)]
)
def test_a_server_that_does_not_say_its_context_is_named(
    tmp_path: Path, sleeper: Program, serve: Serve, bodies: dict[str, bytes]
) -> None:
    programs = {
        "hf": Program("hf", sleeper.process, sleeper.log, serve(context(2048))),
        "vllm": Program("vllm", sleeper.process, sleeper.log, serve(bodies | {"/health": b""})),
    }
    with pytest.raises(RunError, match=r"^vllm does not say in /v1/models how long its context is"):
        make_stack(tmp_path, **programs).max_model_len()


def test_a_server_that_ended_is_named_with_its_end_when_its_context_is_asked_for(
    tmp_path: Path, sleeper: Program, serve: Serve
) -> None:
    hf = Program("hf", sleeper.process, sleeper.log, serve(context(2048)))
    with pytest.raises(RunError, match="vllm ended with code 5"):
        make_stack(tmp_path, hf=hf, vllm=ended(tmp_path, "exit 5", "vllm")).max_model_len()


def test_the_end_of_a_stack_ends_its_programs(tmp_path: Path, sleeper: Program) -> None:
    before = signal.getsignal(signal.SIGINT)
    make_stack(tmp_path, hf=sleeper).stop()
    assert sleeper.process.returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_that_does_not_end_is_killed(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "STOP_SECONDS", 0.1)
    log = tmp_path / "stubborn.log"
    processes.append(stack.spawn(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"], log, {}))
    while not log.read_bytes():
        time.sleep(0.01)
    make_stack(tmp_path, hf=Program("hf", processes[0], log, "")).stop()
    assert processes[0].returncode == -signal.SIGKILL


def test_samples_are_taken_over_piece_by_piece(tmp_path: Path, serve: Serve) -> None:
    with Timeline(serve({"/timeline": b"samples"}), tmp_path / "timeline") as timeline:
        timeline.keep()
    pieces = list((tmp_path / "timeline").iterdir())
    assert [piece.suffix for piece in pieces] == [".arrow", ".arrow"]
    assert {piece.read_bytes() for piece in pieces} == {b"samples"}


def test_a_monitor_that_does_not_answer_leaves_no_piece(tmp_path: Path) -> None:
    with Timeline(unused_url(), tmp_path / "timeline") as timeline:
        timeline.keep()
    assert list((tmp_path / "timeline").iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("", ""), []),
        (("--a 1", "--b 'c d'"), ["--a", "1", "--b", "c d"]),
        (("-- --x", "--b"), ["--b", "--", "--x"]),
        (("--a -- --x", "--b -- --y 1"), ["--a", "--b", "--", "--x", "--y", "1"]),
    ],
)
def test_arguments_of_the_plan_and_of_a_target_are_one_command_line(
    lines: tuple[str, ...], expected: list[str]
) -> None:
    assert stack.joined(*lines) == expected


def test_a_server_is_started_with_what_the_plan_and_its_target_say() -> None:
    plan = make_plan(
        targets=[{"name": "a", "kind": "vllm", "args": "--max-num-seqs 2"}],
        model="m",
        kv_budget=99,
        max_model_len=64,
        vllm_args="-- --enforce-eager",
        gpu_memory_utilization=0.9,
    )
    assert " ".join(stack.command_of(plan, plan.targets[0], 5)) == (
        "servers.vllm --port 5 --model m --dtype auto --max-model-len 64 --kv-budget 99 --gpu-memory-utilization 0.9 "
        "--max-num-seqs 2 -- --enforce-eager"
    )


def test_the_first_server_of_a_kind_has_the_port_of_the_plan_and_one_at_a_url_none() -> None:
    servers = [{"name": name, "kind": kind} for name, kind in (("a", "hf"), ("b", "hf"), ("c", "vllm"))]
    plan = make_plan(targets=servers, hf_port=1, vllm_port=2, monitor_port=3)
    assert stack.ports_of(plan) == {"monitor": 3, "a": 1, "c": 2}
    assert [stack.option_of(plan, name) for name in stack.ports_of(plan)] == [
        *("--monitor-port", "--hf-port", "--vllm-port")
    ]
    servers[2] |= {"url": "http://there"}
    assert stack.ports_of(make_plan(targets=servers, hf_port=1, monitor_url="http://there")) == {"a": 1}


def test_what_runs_already_is_used_and_left_as_it_is(tmp_path: Path, serve: Serve) -> None:
    # A server of others: it has no /health.
    url = serve({"/v1/models": b"{}"})
    monitor = serve({"/health": b""})
    plan = make_plan(targets=[{"name": "a", "kind": "url", "url": url + "/"}], monitor_url=monitor)
    with Stack(plan, tmp_path, lambda _: None) as running:
        running.start()
        running.check()
        assert (running["a"].url, running["monitor"].url, running.programs) == (url, monitor, {})
        with pytest.raises(RunError, match="a does not say in /v1/models how long its context is: 'data'; say --max"):
            running.max_model_len()
    assert list(tmp_path.iterdir()) == []
    limited = make_plan(targets=[{"name": "a", "kind": "url", "url": url}], monitor_url=monitor, max_model_len=64)
    with Stack(limited, tmp_path, lambda _: None) as running:
        running.start()
        assert running.max_model_len() == 64


def test_where_one_server_is_up_another_ends_before_it_starts(
    tmp_path: Path, sleeper: Program, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(resident="one", max_model_len=64, targets=[{"name": n, "kind": "hf"} for n in ("a", "b")])
    made = Stack(plan, tmp_path, lambda _: None)
    made.programs["a"] = sleeper
    url = serve({"/health": b""})
    monkeypatch.setattr(made, "_servers", lambda: {"b": ["http.server", "--port", url.rpartition(":")[2]]})
    monkeypatch.setattr(stack, "spawn", lambda *_: sleeper.process)
    made.focus("a")
    assert "b" not in made
    made.focus("b")
    assert sleeper.process.returncode == -signal.SIGTERM
    assert list(made.programs) == ["b"]


def test_on_gpus_each_vllm_starts_when_all_before_it_have_their_memory(
    tmp_path: Path, sleeper: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def spawn(command: list[str], *_: Any) -> subprocess.Popen[bytes]:
        happened.append(f"start {command[-1]}")
        return sleeper.process

    def is_up(program: Program) -> bool:
        happened.append(f"up {program.name}")
        return True

    targets = [{"name": name, "kind": name[:-1]} for name in ("vllm1", "hf1", "vllm2", "hf2")]
    made = Stack(make_plan(targets=targets), tmp_path, lambda _: None)
    commands = {
        name: [f"servers.{name[:-1]}", "--port", "1", "--name", name] for name in ("vllm1", "hf1", "vllm2", "hf2")
    }
    monkeypatch.setattr(made, "_servers", lambda: commands)
    monkeypatch.setattr(made, "_monitor", lambda: ["monitor", "--port", "1", "--name", "monitor"])
    monkeypatch.setattr(stack, "spawn", spawn)
    monkeypatch.setattr(stack, "_is_up", is_up)
    monkeypatch.setattr(stack, "find_gpus", lambda: ([{"name": "one"}], None))
    made.start()
    started = [happened.index(f"start {name}") for name in ("monitor", "hf1", "hf2", "vllm1", "vllm2")]
    up = [happened.index(f"up {name}") for name in ("monitor", "hf1", "hf2", "vllm1", "vllm2")]
    assert started == sorted(started)
    assert started[2] < min(up)
    assert max(up[:3]) < started[3] < up[3] < started[4] < up[4]


def test_the_programs_of_a_stack_know_that_they_belong_together(
    tmp_path: Path, sleeper: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, dict[str, str | None]] = {}

    def spawn(command: list[str], log: Path, environment: dict[str, str | None]) -> subprocess.Popen[bytes]:
        given[log.stem] = environment
        return sleeper.process

    monkeypatch.setattr(stack, "spawn", spawn)
    monkeypatch.setattr(stack, "_is_up", lambda _: True)
    stacks = []
    for _ in range(2):
        Stack(make_plan(), tmp_path, lambda _: None).start()
        (one,) = {environment["HEADROOM_STACK"] for environment in given.values()}
        stacks.append(one)
        assert {name: environment.get("HEADROOM_SERVER") for name, environment in given.items()} == {
            "hf": "hf",
            "vllm": "vllm",
            "monitor": None,
        }
    assert None not in stacks
    assert stacks[0] != stacks[1]
    # A program at a URL may be of any stack.
    targets = [{"name": "hf", "kind": "hf", "url": "http://127.0.0.1:9"}, {"name": "vllm", "kind": "vllm"}]
    for plan in (make_plan(targets=targets), make_plan(monitor_url="http://127.0.0.1:9")):
        given.clear()
        Stack(plan, tmp_path, lambda _: None).start()
        assert {environment["HEADROOM_STACK"] for environment in given.values()} == {None}


@pytest.mark.parametrize(("gpus", "given"), [(0, []), (1, []), (4, ["--max-cpu", "0.08"]), (99, ["--max-cpu", "1"])])
def test_the_monitor_may_take_as_much_for_each_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, given: list[str]
) -> None:
    monkeypatch.setattr(stack, "find_gpus", lambda: ([{}] * gpus, None))
    made = Stack(make_plan(monitor_port=9), tmp_path, lambda _: None)
    assert made._monitor() == ["monitor", "--port", "9", *given]
    assert Settings.model_fields["max_cpu"].default == stack.MONITOR_CPU
    monkeypatch.setenv("HEADROOM_MONITOR_MAX_CPU", "0.5")
    assert made._monitor() == ["monitor", "--port", "9"]


def test_a_server_is_given_the_gpus_that_the_plan_says_by_the_numbers_of_the_monitor(
    tmp_path: Path, sleeper: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, dict[str, str]] = {}

    def spawn(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        given[log.stem] = {name: value for name, value in environment.items() if name.startswith("CUDA")}
        return sleeper.process

    given_gpus: dict[str, Any] = {"one": {"gpus": 1}, "two": {"gpus": "0,1"}, "all": {}}
    targets = [{"name": name, "kind": "hf"} | more for name, more in given_gpus.items()]
    made = Stack(make_plan(targets=targets), tmp_path, lambda _: None)
    monkeypatch.setattr(stack, "spawn", spawn)
    monkeypatch.setattr(stack, "_is_up", lambda _: True)
    made.start()
    assert given["one"] == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
    assert given["two"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert given["all"] == given["monitor"] == {}
