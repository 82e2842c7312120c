"""Locust as a program, as a user starts it: all programs of this file run at once, against one small server."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from loadtest.options import Options
from loadtest.records import Record, read

ROOT = Path(__file__).parents[3]
TOKENS = 3
STREAM = (
    "".join(
        f'data: {{"choices":[{{"text":"a","finish_reason":{json.dumps("length" if n == TOKENS else None)}}}],'
        f'"usage":{{"prompt_tokens":3,"completion_tokens":{n}}}}}\n\n'
        for n in range(1, TOKENS + 1)
    )
    + "data: [DONE]\n\n"
).encode()


class Handler(BaseHTTPRequestHandler):
    """Serves one model, whose completions under /stalled end only with the server."""

    protocol_version = "HTTP/1.1"
    asked: list[dict[str, Any]]
    paths: ClassVar[list[str]] = []
    request_ids: ClassVar[dict[str, str | None]] = {}
    over: threading.Event

    def do_GET(self) -> None:
        self.paths.append(f"GET {self.path}")
        if self.path.startswith("/nameless"):
            self.send_error(404)
            return
        if self.path.startswith("/held"):
            self.over.wait(30)
            return
        if self.path.startswith("/slow"):
            time.sleep(2)
        self._answer("application/json", b'{"data": [{"id": "first"}, {"id": "second"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.request_ids[self.path] = self.headers["X-Request-Id"]
        self.paths.append(f"POST {self.path}")
        if self.path.startswith("/stalled"):
            self.over.wait(120)
            return
        self.asked.append(body)
        self._answer("text/event-stream", STREAM)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_over(client: Path) -> None:
    """Wait until a run has closed its files."""
    deadline = time.monotonic() + 60
    while not client.exists() or not json.loads(client.read_text())["run"]["ended"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_sent(base: str, number: int) -> None:
    """Wait until so many requests have come to an address."""
    deadline = time.monotonic() + 100
    while Handler.paths.count(f"POST {base}/v1/completions") < number:
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Programs:
    """Locust processes by name, each in a folder of its own."""

    def __init__(self, folder: Path, url: str, stack: ExitStack):
        self.folder, self._url, self._stack = folder, url, stack
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, arguments: str, preexec: Callable[[], None] | None = None, **variables: str) -> None:
        (self.folder / name).mkdir()
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("HEADROOM_", "LOCUST_"))}
        locustfile = str(ROOT / "loadtest" / "locustfile.py")
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "locust",
                "-f",
                locustfile,
                "--hf-url",
                self._url,
                "--only-summary",
                *arguments.split(),
            ],
            cwd=self.folder / name,
            env={**ours, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec,
        )
        self._stack.callback(self._end, process)
        self._processes[name] = process

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()

    def ended(self, name: str) -> tuple[int, list[str], str]:
        """Return the exit code, the lines that we printed on standard error, and all of standard error."""
        process = self._processes[name]
        _, errors = process.communicate(timeout=90)
        return process.returncode, [line for line in errors.splitlines() if line.startswith("loadtest: ")], errors

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        self._processes[name].send_signal(number)

    def records(self, name: str) -> list[Record]:
        return list(read(self.folder / name / "records.arrow"))


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    """The bodies that the server was sent."""
    return []


@pytest.fixture(scope="module")
def url(asked: list[dict[str, Any]]) -> Iterator[str]:
    Handler.asked, Handler.over = asked, threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        Handler.over.set()
        server.shutdown()
        thread.join(5)


@pytest.fixture(scope="module")
def web_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, url: str, web_port: int) -> Iterator[Programs]:
    folder = tmp_path_factory.mktemp("locust")
    taken = folder / "taken.jsonl"
    taken.write_text("not ours\n")
    run = "--headless --records records.arrow HF"
    with ExitStack() as stack:
        started = Programs(folder, url, stack)
        started.start("web", f"--hf-url http://127.0.0.1:{free_port()} --web-port {web_port}")
        started.start("bad option", f"{run} --input-mean 0")
        started.start("bad variable", run, HEADROOM_LOADTEST_REQEUSTS="5")
        started.start("too long", f"{run} --input-mean 5000 --run-time 1s")
        started.start("bad trace", f"{run} --arrival trace --trace ../missing.csv")
        started.start("existing", f"{run} --records ../taken.jsonl")
        started.start("whole", f"{run} --users 2 --spawn-rate 9 --warmup 2 --requests 5")
        started.start("stalled", f"{run} --hf-url {url}/stalled --users 2 --spawn-rate 9")
        open_loop = f"{run} --arrival constant --rate 10 --requests 5"
        for name in ("nameless", "held", "slow"):
            started.start(name, f"{open_loop} --hf-url {url}/{name}")
        started.start("one user", f"{run} VLLM --vllm-url {url} --users 1 --requests 2")
        started.start("interrupted", f"{run} --hf-url {url}/stalled/interrupted --model m")
        killed = f"--users 3 --seed 7 --hf-url {url}/stalled/killed --model m"
        started.start("killed", f"{run} {killed} --arrival gamma --rate 50 --burstiness inf")
        started.start("full disk", f"{run} --requests 500", preexec=limit_file_size)
        yield started


def test_a_bad_option_ends_it_with_2_and_one_line(programs: Programs) -> None:
    code, lines, errors = programs.ended("bad option")
    assert code == 2
    assert lines == ["loadtest: input_mean: 0.0: Input should be greater than or equal to 1"]
    assert "Traceback" not in errors


def test_a_variable_that_is_no_option_ends_it_with_2_and_one_line(programs: Programs) -> None:
    code, lines, _ = programs.ended("bad variable")
    assert code == 2
    expected = "loadtest: HEADROOM_LOADTEST_REQEUSTS: is no option; expected HEADROOM_LOADTEST_REQUESTS"
    assert lines == [expected]
    assert not list((programs.folder / "bad variable").iterdir())


def test_lengths_that_do_not_fit_end_it_with_2_and_one_line_before_anything_is_sent(programs: Programs) -> None:
    code, lines, errors = programs.ended("too long")
    assert "Traceback" not in errors
    assert code == 2
    assert len(lines) == 1
    assert "5000" in lines[0]
    assert "max_context" in lines[0]


def test_a_trace_that_cannot_be_read_ends_it_with_2_and_one_line_before_there_are_records(programs: Programs) -> None:
    code, lines, errors = programs.ended("bad trace")
    assert "Traceback" not in errors
    assert code == 2
    assert len(lines) == 1
    assert "missing.csv" in lines[0]
    assert not list((programs.folder / "bad trace").iterdir())


def test_an_existing_file_of_records_ends_it_with_3_and_is_left_as_it_was(programs: Programs) -> None:
    code, lines, errors = programs.ended("existing")
    assert code == 3
    assert len(lines) == 1
    assert "taken.jsonl" in lines[0]
    assert "Traceback" not in errors
    assert (programs.folder / "taken.jsonl").read_text() == "not ours\n"


def test_a_whole_run_keeps_every_record_and_ends_by_itself(programs: Programs, asked: list[dict[str, Any]]) -> None:
    code, _, errors = programs.ended("whole")
    assert (code, "Traceback" in errors) == (0, False)
    records = programs.records("whole")
    assert sorted(record.index for record in records) == list(range(7))
    assert sorted(record.phase for record in records) == ["measured"] * 5 + ["warmup"] * 2
    assert {(record.error, record.output_tokens, record.target) for record in records} == {(None, TOKENS, "hf")}
    assert {body["model"] for body in asked} == {"first"}
    summary = json.loads((programs.folder / "whole" / "client.json").read_text())
    assert summary["requests_ended"] == summary["requests_asked"] == summary["requests_recorded"] == {"hf": 7}
    assert summary["complete"] is True
    assert summary["run"]["models"] == {"hf": "first"}
    assert summary["run"]["began"] < summary["run"]["ended"]


def test_a_run_that_was_killed_says_what_it_was_and_that_it_is_not_whole(programs: Programs) -> None:
    wait_until_sent("/stalled/killed", 1)
    programs.stop("killed", signal.SIGKILL)
    programs.ended("killed")
    told = json.loads((programs.folder / "killed" / "client.json").read_text())
    reason = "complete: the run did not come to its end"
    assert (told["complete"], told["valid"], told["reasons"], told["run"]["ended"]) == (False, False, [reason], None)
    assert str(Handler.request_ids["/stalled/killed/v1/completions"]).startswith(f"{told['run']['run_id']}-")
    assert (told["run"]["models"], told["run"]["users"]) == ({"hf": "m"}, 3)
    given = {name: told["run"]["options"][name] for name in ("arrival", "rate", "burstiness", "workload", "seed")}
    assert given == {"arrival": "gamma", "rate": 50, "burstiness": "inf", "workload": "lognormal", "seed": 7}
    assert told["run"]["options"].keys() == Options.model_fields.keys()


def test_requests_that_wait_when_the_run_ends_are_records_too(programs: Programs) -> None:
    wait_until_sent("/stalled", 2)
    programs.stop("stalled")
    code, _, errors = programs.ended("stalled")
    assert (code, "Traceback" in errors) == (0, False)
    records = programs.records("stalled")
    assert sorted((record.index, record.error) for record in records) == [(0, "cancelled"), (1, "cancelled")]
    assert all(record.end_ns > record.sent_ns for record in records)
    assert json.loads((programs.folder / "stalled" / "client.json").read_text())["complete"] is False


def test_an_interrupt_while_the_files_are_closed_is_ignored(programs: Programs) -> None:
    wait_until_sent("/stalled/interrupted", 1)
    for _ in range(2):
        programs.stop("interrupted", signal.SIGINT)
        time.sleep(0.002)
    code, _, errors = programs.ended("interrupted")
    assert (code, "Traceback" in errors) == (0, False)
    assert [record.error for record in programs.records("interrupted")] == ["cancelled"]
    assert json.loads((programs.folder / "interrupted" / "client.json").read_text())["complete"] is False


@pytest.mark.parametrize(("name", "problem"), [("nameless", "status 404"), ("held", "no answer after 5 s")])
def test_a_server_that_does_not_say_its_models_is_refused_with_2_and_sent_nothing(
    programs: Programs, url: str, name: str, problem: str
) -> None:
    code, lines, errors = programs.ended(name)
    assert (code, "Traceback" in errors) == (2, False)
    where = f"hf_url: '{url}/{name}': GET /v1/models: {problem}; expected the name of a model, or --model NAME"
    assert lines == [f"loadtest: the run ends: {where}"]
    assert [path for path in Handler.paths if name in path] == [f"GET /{name}/v1/models"]
    assert not list((programs.folder / name).iterdir())


def test_a_server_that_is_slow_to_say_its_models_delays_the_schedule_and_no_request(programs: Programs) -> None:
    code, _, errors = programs.ended("slow")
    assert (code, "Traceback" in errors) == (0, False)
    assert [path for path in Handler.paths if "slow" in path].count("GET /slow/v1/models") == 1
    late = [record.late_seconds for record in programs.records("slow")]
    assert len(late) == 5
    assert all(seconds is not None and seconds < 0.8 for seconds in late)  # the machine is busy with all the others


def test_a_closed_loop_in_which_a_server_would_have_no_user_is_refused_with_2(programs: Programs) -> None:
    code, lines, _ = programs.ended("one user")
    assert code == 2
    expected = "users: 1: in a closed loop expected at least one for each server, not none for vllm"
    assert lines == [f"loadtest: the run ends: {expected}"]
    assert not list((programs.folder / "one user").iterdir())


def test_a_full_disk_ends_it_with_3_and_says_so_without_a_traceback(programs: Programs) -> None:
    code, lines, errors = programs.ended("full disk")
    assert code == 3
    assert "its records cannot be kept" in lines[0]
    assert "File too large" in lines[0]
    assert "Traceback" not in errors
    assert 0 < len(programs.records("full disk")) < 500


def submit(port: int, **form: object) -> dict[str, Any]:
    fields = {"user_count": 1, "spawn_rate": 1, "user_classes": "HF", **form}
    data = urllib.parse.urlencode(fields, doseq=True).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/swarm", data, timeout=10) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


@pytest.fixture(scope="module")
def web(programs: Programs, web_port: int) -> int:
    """The port of the web UI, once it answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{web_port}/", timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return web_port


def test_the_web_form_starts_a_run_whose_failures_are_records(web: int, programs: Programs) -> None:
    answer = submit(web, records="records.arrow", requests="2", workload="classic", model="m")
    assert answer["success"] is True
    wait_until_over(programs.folder / "web" / "client.json")
    assert [(record.index, record.error) for record in programs.records("web")] == [(0, "connect"), (1, "connect")]


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats/requests", timeout=10) as answer:
            if json.load(answer)["state"] in ("ready", "stopped"):
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_whose_records_cannot_be_kept_does_not_spoil_the_next(web: int, programs: Programs) -> None:
    wait_until_ready(web)
    submit(web, records="/proc/nowhere/records.arrow", requests="2", workload="classic", model="m")
    wait_until_ready(web)
    answer = submit(web, records="next/records.arrow", requests="2", workload="classic", model="m")
    assert answer["success"] is True
    client = programs.folder / "web" / "next" / "client.json"
    wait_until_over(client)
    assert [record.index for record in read(client.with_name("records.arrow"))] == [0, 1]


def test_every_option_is_a_field_of_the_web_form(web: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{web}/", timeout=10) as answer:
        page = answer.read().decode()
    fields = page[page.index("extra_options") :]
    assert [name for name in Options.model_fields if f'"{name}"' not in fields] == []


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"input_mean": "0"}, "input_mean: '0': Input should be greater than or equal to 1"),
        ({"workload": "poisson"}, "workload: 'poisson': Input should be 'lognormal', 'classic', 'sharegpt',"),
        ({"requests": "many"}, "requests: 'many': Input should be a valid integer"),
        # A field that the form leaves out is as it was.
        ({"input_mean": "9"}, "input_mean: 9.0: is not read by workload classic"),
        ({"user_classes": ["HF", "VLLM"], "records": "new.arrow"}, "users: 1: in a closed loop expected at least one"),
        ({"model": "", "records": "new.arrow"}, "GET /v1/models: connect: "),
        ({"host": "http://elsewhere"}, "host: 'http://elsewhere': leave it empty; each user class has a server"),
        ({"records": "../taken.jsonl"}, "records: '../taken.jsonl' exists; name a new file"),
        (
            {"workload": "lognormal", "input_mean": "5000"},
            "a mean length of 5000 tokens does not fit: at most 1024 (half of max_context)",
        ),
    ],
)
def test_the_web_form_refuses_a_bad_value_with_a_message(web: int, form: dict[str, str], message: str) -> None:
    answer = submit(web, **form)
    assert answer["success"] is False
    assert message in answer["message"]
