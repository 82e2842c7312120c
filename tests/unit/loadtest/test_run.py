"""One run: requests out, records in, and what the client measures of itself."""

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import gevent
import pytest

from loadtest.client import Connection
from loadtest.options import Options
from loadtest.records import read
from loadtest.run import Run, SelfCheck

TOKEN = (
    b'data: {"choices":[{"text":"a","finish_reason":"length"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n'
)


class Handler(BaseHTTPRequestHandler):
    """Answers the first request with 503, the others with one token."""

    protocol_version = "HTTP/1.1"
    answered = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if Handler.answered else 503)
        Handler.answered += 1
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(TOKEN)))
        self.end_headers()
        self.wfile.write(TOKEN)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def connection() -> Iterator[Connection]:
    Handler.answered = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        connection = Connection(f"http://127.0.0.1:{server.server_address[1]}", 5)
        yield connection
        connection.close()
        server.shutdown()
        thread.join(5)


Begin = Callable[..., Run]


@pytest.fixture
def ends() -> list[Exception | None]:
    return []


@pytest.fixture
def begin(tmp_path: Path, ends: list[Exception | None]) -> Begin:
    def begin(*targets: str, **options: Any) -> Run:
        return Run(Options(records=str(tmp_path / "records.jsonl"), **options), list(targets), ends.append)

    return begin


def perform_all(run: Run, target: str, connection: Connection) -> None:
    while request := run.next_request(target):
        run.perform(target, request, connection, "m")


def test_every_request_leaves_a_record_with_its_phase_also_when_it_failed(begin: Begin, connection: Connection) -> None:
    run = begin("hf", warmup=2, requests=3, drain=1)
    perform_all(run, "hf", connection)
    run.close()
    records = list(read(run.path))
    assert [record.index for record in records] == list(range(6))
    assert [record.phase for record in records] == ["warmup"] * 2 + ["measured"] * 3 + ["drain"]
    assert [record.error for record in records] == ["http_5xx", *[None] * 5]
    assert {record.output_tokens for record in records[1:]} == {1}


def test_both_servers_get_the_same_requests_in_the_same_order(begin: Begin) -> None:
    run = begin("hf", "vllm", requests=5)
    hf = [run.next_request("hf") for _ in range(6)]
    vllm = [run.next_request("vllm") for _ in range(6)]
    run.close()
    assert hf == vllm
    assert hf[5] is None


def test_without_a_number_of_requests_there_is_always_another(begin: Begin) -> None:
    run = begin("hf", warmup=1)
    requests = [run.next_request("hf") for _ in range(100)]
    run.close()
    assert [request.index for request in requests if request] == list(range(100))


def test_the_run_ends_once_with_the_last_record_of_every_server(
    begin: Begin, connection: Connection, ends: list[Exception | None]
) -> None:
    run = begin("hf", "vllm", requests=2)
    perform_all(run, "hf", connection)
    assert ends == []
    perform_all(run, "vllm", connection)
    run.close()
    assert ends == [None]


def test_the_records_have_what_the_client_measured_of_itself_next_to_them(begin: Begin, connection: Connection) -> None:
    run = begin("hf", requests=2)
    perform_all(run, "hf", connection)
    run.close()
    summary = json.loads(run.path.with_name("client.json").read_text())
    assert summary["requests_ended"] == {"hf": 2}
    assert summary["wall_seconds"] > 0
    assert 0 <= summary["cpu_share"] < 2


def test_a_run_does_not_write_over_the_records_of_another(begin: Begin) -> None:
    begin("hf").close()
    with pytest.raises(FileExistsError):
        begin("hf")


def test_a_workload_that_cannot_be_sent_is_refused_before_the_run(begin: Begin, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        begin("hf", workload="sharegpt", max_context=100)
    assert not (tmp_path / "records.jsonl").exists()


def test_a_blocked_event_loop_shows_as_lag() -> None:
    check = SelfCheck()
    gevent.sleep(0.03)
    time.sleep(0.2)
    gevent.sleep(0.03)
    lag = check.finish()["loop_lag_max_seconds"]
    assert isinstance(lag, float)
    assert lag >= 0.15


def test_a_busy_client_shows_in_its_cpu_share() -> None:
    shares = []
    for busy in (False, True):
        check = SelfCheck()
        begun = time.process_time()
        gevent.sleep(0.1)
        while busy and time.process_time() < begun + 0.1:
            pass
        shares.append(check.finish()["cpu_share"])
    idle, busy_share = shares
    assert isinstance(idle, float)
    assert isinstance(busy_share, float)
    assert idle < busy_share <= 1.5
