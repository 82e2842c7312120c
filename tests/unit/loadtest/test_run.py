"""One run: requests out, records in, and what the client measures of itself."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, ClassVar

import gevent
import pytest

from loadtest.options import Options
from loadtest.records import Record, RecordFile, read
from loadtest.run import FLUSH_SECONDS, START_SECONDS, Part, Run, Share, whole
from loadtest.selfcheck import LEAST_SECONDS, SelfCheck

ROOT = Path(__file__).parents[3]
ANSWER_ID = 777
TOKEN = (
    b'data: {"choices":[{"text":"a","token_ids":[777],"finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n'
)


class Handler(BaseHTTPRequestHandler):
    """Answers the first request with 503, the others with one token."""

    protocol_version = "HTTP/1.1"
    answered = 0
    seconds = 0.0
    chunks = 0
    refusal = ""
    kind = "text/event-stream"
    keys: ClassVar[list[str | None]] = []
    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        time.sleep(Handler.seconds)
        Handler.keys.append(self.headers["Authorization"])
        Handler.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200 if Handler.answered else 503)
        Handler.answered += 1
        body = Handler.refusal.encode() or TOKEN
        self.send_header("Content-Type", Handler.kind)
        if Handler.chunks:
            self.send_chunks()
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_chunks(self) -> None:
        """Send so many tokens, each in a chunk of its own, 3 ms apart."""
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(1, Handler.chunks + 1):
            event = TOKEN.replace(b'completion_tokens":1', b'completion_tokens":%d' % number)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
            time.sleep(0.003)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Handler.answered, Handler.seconds = 0, 0.0
    Handler.keys.clear()
    Handler.bodies.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(5)


@dataclass
class Kept:
    """What a run passed on."""

    batches: list[bytes] = field(default_factory=list)
    ends: list[Exception | None] = field(default_factory=list)

    def records(self) -> list[Record]:
        """All records, in the order in which they came."""
        with TemporaryDirectory() as folder:
            file = RecordFile(Path(folder) / "records.arrow")
            for batch in self.batches:
                file.write(batch)
            file.close()
            return list(read(Path(folder) / "records.arrow"))


Begin = Callable[..., Run]


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def begin(kept: Kept, url: str) -> Begin:
    def begin(*targets: str, part: Part | None = None, **options: Any) -> Run:
        servers = {"hf_url": url, "vllm_url": url, "model": "m"}
        return Run(Options(**(servers | options)), part or whole(targets), kept.batches.append, kept.ends.append)

    return begin


def wait_until(holds: Callable[[], bool]) -> None:
    with gevent.Timeout(10):
        while not holds():
            gevent.sleep(0.01)


def perform_all(run: Run, target: str) -> None:
    while request := run.next_request(target):
        run.perform(target, request)


def test_every_request_leaves_a_record_with_its_phase_also_when_it_failed(begin: Begin, kept: Kept) -> None:
    run = begin("hf", warmup=2, requests=3, drain=1)
    perform_all(run, "hf")
    run.close()
    records = kept.records()
    assert [record.index for record in records] == list(range(6))
    assert [record.phase for record in records] == ["warmup"] * 2 + ["measured"] * 3 + ["drain"]
    assert [record.error for record in records] == ["http_5xx", *[None] * 5]
    assert {record.output_tokens for record in records[1:]} == {1}
    assert {record.scheduled_ns for record in records} == {None}


@pytest.mark.parametrize("drain", [0, 3])
def test_measured_requests_go_on_until_the_time_is_over_and_the_drain_follows_them(
    begin: Begin, kept: Kept, drain: int
) -> None:
    Handler.seconds = 0.01
    run = begin("vllm", requests=4, warmup=2, drain=drain, min_seconds=0.5)
    perform_all(run, "vllm")
    assert kept.ends == [None]
    run.close()
    records = sorted(kept.records(), key=lambda record: record.index)
    assert [record.index for record in records] == list(range(len(records)))
    phases = [record.phase for record in records]
    measured = phases.count("measured")
    assert phases == ["warmup"] * 2 + ["measured"] * measured + ["drain"] * drain
    assert 0.5e9 <= records[measured + 1].end_ns - records[2].sent_ns < 5e9
    assert measured > 4


def test_a_time_that_is_over_before_the_requests_are_cuts_none_of_them_off(begin: Begin, kept: Kept) -> None:
    run = begin("vllm", requests=5, warmup=1, drain=1, min_seconds=1e-9)
    perform_all(run, "vllm")
    run.close()
    assert [record.phase for record in kept.records()] == ["warmup", *["measured"] * 5, "drain"]


def test_measured_requests_go_on_until_a_file_is_there(begin: Begin, kept: Kept, tmp_path: Path) -> None:
    Handler.seconds = 0.01
    enough = tmp_path / "enough"
    run = begin("vllm", requests=2, drain=1, min_seconds=0.001, until_file=str(enough))
    performing = gevent.spawn(perform_all, run, "vllm")
    wait_until(lambda: len(kept.batches) > 0)
    assert not performing.ready()
    enough.touch()
    performing.get(timeout=10)
    run.close()
    phases = [record.phase for record in sorted(kept.records(), key=lambda record: record.index)]
    assert phases == ["measured"] * (len(phases) - 1) + ["drain"]
    assert len(phases) > 4


def test_several_workers_cannot_agree_on_when_a_time_is_over(begin: Begin) -> None:
    part = replace(whole(["vllm"]), shares={"vllm": Share(0, 2)})
    with pytest.raises(ValueError, match="min_seconds: 5: needs one process for each server"):
        begin(part=part, requests=4, min_seconds=5)


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


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shares_hand_out_every_request_once_and_end_by_themselves(begin: Begin, kept: Kept, of: int) -> None:
    for rank in range(of):
        part = replace(whole(["hf"]), shares={"hf": Share(rank, of)}, worker=rank)
        run = begin(part=part, requests=5)
        perform_all(run, "hf")
        gevent.sleep(0)
        run.close()
    assert sorted(record.index for record in kept.records()) == list(range(5))
    assert all(record.worker == record.index % of for record in kept.records())
    assert kept.ends == [None] * of


def test_a_process_without_users_of_a_server_sends_it_nothing_and_waits_for_the_others_only(
    begin: Begin, kept: Kept
) -> None:
    run = begin(part=replace(whole(["hf"]), shares={"vllm": Share()}), requests=2)
    assert run.next_request("hf") is None
    perform_all(run, "vllm")
    run.close()
    assert [record.target for record in kept.records()] == ["vllm", "vllm"]
    assert kept.ends == [None]


def test_a_process_without_any_user_is_done_at_once(begin: Begin, kept: Kept) -> None:
    run = begin(part=whole([]), requests=2)
    gevent.sleep(0)
    run.close()
    assert kept.ends == [None]


def test_the_run_ends_once_with_the_last_record_of_every_server(begin: Begin, kept: Kept) -> None:
    run = begin("hf", "vllm", requests=2)
    perform_all(run, "hf")
    assert kept.ends == []
    perform_all(run, "vllm")
    run.close()
    assert kept.ends == [None]
    assert len(kept.records()) == 4


def test_records_are_passed_on_while_the_run_goes_on(begin: Begin, kept: Kept) -> None:
    run = begin("hf", requests=5)
    request = run.next_request("hf")
    assert request
    run.perform("hf", request)
    assert kept.batches == []
    gevent.sleep(FLUSH_SECONDS * 1.5)
    assert [record.index for record in kept.records()] == [0]
    run.close()


def test_the_run_ends_with_the_failure_when_records_cannot_be_kept(url: str) -> None:
    def refuse(_: bytes) -> None:
        raise OSError("no space left")

    ends: list[Exception | None] = []
    run = Run(Options(hf_url=url, model="m", requests=2), whole(["hf"]), refuse, ends.append)
    perform_all(run, "hf")
    run.close()
    assert [str(end) for end in ends] == ["no space left"]


def test_the_run_tells_what_the_client_measured_of_itself(begin: Begin) -> None:
    run = begin("hf", requests=2)
    perform_all(run, "hf")
    summary = run.close()
    assert summary["requests_ended"] == {"hf": 2}
    assert isinstance(summary["wall_seconds"], float)
    assert 0 < summary["wall_seconds"] < LEAST_SECONDS
    assert summary["cpu_share"] is None
    assert summary["send_lateness_p99_seconds"] is None


def test_a_workload_that_cannot_be_sent_is_refused_before_the_run(begin: Begin) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        begin("hf", workload="sharegpt", max_context=100)


def test_a_failed_request_is_sent_again_when_that_is_wanted_and_its_time_is_that_of_the_first_try(
    begin: Begin, kept: Kept
) -> None:
    run = begin("hf", requests=1, retries=2)
    request = run.next_request("hf")
    assert request
    before_ns = time.monotonic_ns()
    run.perform("hf", request)
    run.close()
    (record,) = kept.records()
    assert (record.error, record.retries, record.output_tokens) == (None, 1, 1)
    assert 0 < record.sent_ns - before_ns < record.chunk_ns[0] - before_ns


def test_a_key_is_sent_and_never_kept(begin: Begin, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_HF_API_KEY", "sesame")
    monkeypatch.setattr(Handler, "refusal", "no such key: Bearer sesame")
    run = begin("hf", requests=1)
    perform_all(run, "hf")
    run.close()
    (record,) = kept.records()
    assert Handler.keys == ["Bearer sesame"]
    assert record.error_detail == "no such key: Bearer ***"
    assert b"sesame" not in b"".join(kept.batches)


@pytest.mark.parametrize(
    ("answered", "refusal", "detail"),
    [
        (0, "x" * 497 + "sesame and more", "x" * 497 + "***"),
        (1, 'data: {"error": "' + "x" * 496 + 'sesame"}\n\n', '"' + "x" * 496 + "***"),
        (1, "data: " + "x" * 195 + "sesame\n\n", "x***'"),
    ],
)
def test_no_part_of_a_key_is_kept_where_an_answer_is_cut(
    begin: Begin, kept: Kept, monkeypatch: pytest.MonkeyPatch, answered: int, refusal: str, detail: str
) -> None:
    monkeypatch.setenv("HEADROOM_HF_API_KEY", " sesame\n")
    monkeypatch.setattr(Handler, "refusal", refusal)
    Handler.answered = answered
    run = begin("hf", requests=1)
    perform_all(run, "hf")
    run.close()
    assert Handler.keys == ["Bearer sesame"]
    assert detail in str(kept.records()[0].error_detail)
    assert b"xses" not in b"".join(kept.batches)


def test_a_key_that_comes_back_in_the_kind_of_the_answer_is_not_kept(
    begin: Begin, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADROOM_HF_API_KEY", "Open-Sesame")
    monkeypatch.setattr(Handler, "kind", "text/plain; key=Open-Sesame")
    Handler.answered = 1
    run = begin("hf", requests=1)
    perform_all(run, "hf")
    run.close()
    assert "got 'text/plain; key=***'" in str(kept.records()[0].error_detail)
    assert b"sesame" not in b"".join(kept.batches).lower()


def test_the_kind_of_an_answer_is_read_whatever_its_case(
    begin: Begin, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "kind", "Text/Event-Stream; charset=UTF-8")
    Handler.answered = 1
    run = begin("hf", requests=1)
    perform_all(run, "hf")
    run.close()
    assert kept.records()[0].error is None


def test_a_key_of_two_lines_is_refused_and_not_shown(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_HF_API_KEY", "open\r\nX-More: sesame")
    with pytest.raises(ValueError, match="HEADROOM_HF_API_KEY: holds a line break") as caught:
        begin("hf", requests=1)
    assert "sesame" not in str(caught.value)


def test_the_next_turn_of_a_conversation_waits_for_the_answer_and_holds_it(begin: Begin, kept: Kept) -> None:
    Handler.answered = 1
    run = begin("hf", requests=5, workload="synthetic", turns=2, input_mean=8, output_mean=4)
    perform_all(run, "hf")
    run.close()
    records = kept.records()
    assert [record.index for record in records] == list(range(5))
    prompts = [body["prompt"] for body in Handler.bodies]
    for first, second in ((0, 1), (2, 3)):
        assert records[second].sent_ns >= records[first].end_ns
        assert prompts[second][: len(prompts[first]) + 1] == [*prompts[first], ANSWER_ID]
    assert kept.ends == [None]


def test_a_dispatcher_that_is_behind_lets_others_have_their_turn(begin: Begin, kept: Kept) -> None:
    """A schedule faster than requests can be made; each is sent as it is made, and the run can be stopped."""
    run = begin("hf", arrival="constant", rate=1_000_000, input_mean=400)
    wait_until(lambda: len(Handler.bodies) > 20)
    run.close()
    assert kept.records()


@pytest.mark.parametrize("arrival", [{}, {"arrival": "constant", "rate": 50}], ids=["closed", "open"])
def test_a_list_that_comes_to_its_end_ends_the_run(
    begin: Begin, kept: Kept, tmp_path: Path, arrival: dict[str, Any]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "question {number}", "max_tokens": 1}}\n' for number in range(3)))
    run = begin("hf", workload="dataset", dataset=str(path), **arrival)
    if not arrival:
        perform_all(run, "hf")
    wait_until(lambda: bool(kept.ends))
    run.close()
    assert kept.ends == [None]
    assert sorted(record.index for record in kept.records()) == [0, 1, 2]


@pytest.mark.parametrize("requests", [0, 5])
def test_an_open_loop_of_conversations_ends_with_their_last_turns(begin: Begin, kept: Kept, requests: int) -> None:
    limit: dict[str, Any] = {"requests": requests} if requests else {"duration": 0.05}
    run = begin("hf", workload="synthetic", turns=2, input_mean=8, output_mean=4, arrival="constant", rate=50, **limit)
    wait_until(lambda: bool(kept.ends))
    run.close()
    assert kept.ends == [None]
    assert sorted(record.index for record in kept.records()) == list(range(requests or 6))
    assert [bool(record.scheduled_ns) for record in kept.records()].count(True) == 3


def test_a_conversation_that_cannot_go_on_ends_the_run_with_the_reason(
    begin: Begin, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    Handler.answered = 1
    monkeypatch.setattr(Handler, "refusal", TOKEN.decode().replace('"token_ids":[777],', ""))
    run = begin("hf", requests=4, workload="synthetic", turns=2, input_mean=8, output_mean=4)
    request = run.next_request("hf")
    assert request
    run.perform("hf", request)
    run.close()
    assert "tokenizer" in str(kept.ends[0])
    assert len(kept.records()) == 1


def test_in_an_open_loop_requests_are_sent_on_time_whatever_comes_back(begin: Begin, kept: Kept) -> None:
    Handler.seconds = 0.4
    run = begin("hf", requests=20, arrival="constant", rate=100)
    wait_until(lambda: len(kept.ends) == 1)
    summary = run.close()
    records = kept.records()
    scheduled = [record.scheduled_ns or 0 for record in sorted(records, key=lambda record: record.index)]
    assert [later - earlier for earlier, later in pairwise(scheduled)] == [10_000_000] * 19
    late = [record.late_seconds for record in records if record.late_seconds is not None]
    assert len(late) == 20
    assert min(late) >= 0
    assert summary["send_lateness_max_seconds"] == pytest.approx(max(late), rel=0.01)
    assert min(record.end_ns - record.sent_ns for record in records) >= 0.4e9


def test_an_open_loop_that_is_stopped_keeps_a_record_of_each_request_in_flight(begin: Begin, kept: Kept) -> None:
    Handler.seconds = 3
    run = begin("hf", "vllm", arrival="constant", rate=50)
    gevent.sleep(START_SECONDS + 0.5)
    run.close()
    records = kept.records()
    assert {record.error for record in records} == {"cancelled"}
    assert {record.target for record in records} == {"hf", "vllm"}
    assert all(record.scheduled_ns for record in records)


def test_a_blocked_event_loop_shows_as_lag() -> None:
    check = SelfCheck()
    gevent.sleep(0.03)
    time.sleep(0.2)
    gevent.sleep(0.03)
    lag = check.finish()["loop_lag_max_seconds"]
    assert isinstance(lag, float)
    assert lag >= 0.15


def test_what_happens_after_the_last_record_is_not_held_against_the_run(begin: Begin) -> None:
    run = begin("hf", requests=2)
    perform_all(run, "hf")
    time.sleep(0.3)
    gevent.sleep(0.03)
    lag = run.close()["loop_lag_max_seconds"]
    assert isinstance(lag, float)
    assert lag < 0.2


@pytest.mark.parametrize("still", [False, True])
def test_stamps_of_chunks_that_came_while_the_client_stood_still_are_told(
    begin: Begin, kept: Kept, monkeypatch: pytest.MonkeyPatch, still: bool
) -> None:
    monkeypatch.setattr(Handler, "chunks", 50)
    Handler.answered = 1

    def stand_still() -> None:
        while True:
            time.sleep(0.03)
            gevent.sleep(0.001)

    run = begin("hf", requests=1)
    blocking = gevent.spawn(stand_still) if still else None
    perform_all(run, "hf")
    if blocking:
        blocking.kill()
    share = run.close()["merged_chunk_share"]
    assert isinstance(share, float)
    assert share > 0.5 if still else share < 0.2  # a busy machine stands still now and then
    (record,) = kept.records()
    assert record.output_tokens == len(record.chunk_ns) == 50


def test_a_busy_client_shows_in_its_cpu_share() -> None:
    shares = []
    for busy in (False, True):
        check = SelfCheck()
        begun = time.process_time()
        gevent.sleep(LEAST_SECONDS)
        while busy and time.process_time() < begun + 0.5:
            pass
        shares.append(check.finish()["cpu_share"])
    idle, busy_share = shares
    assert isinstance(idle, float)
    assert isinstance(busy_share, float)
    assert idle < busy_share <= 1.5


def test_what_pyarrow_imports_with_its_first_array_is_there_before_a_run(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    (tmp_path / "pandas.py").write_text(f"open({str(asked)!r}, 'x')\nraise ImportError")
    command = [sys.executable, "-c", "import loadtest.records, os; print(os.path.exists({0!r})); import loadtest.run"]
    command[-1] = command[-1].format(str(asked))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (said, asked.exists()) == ("False\n", True)
