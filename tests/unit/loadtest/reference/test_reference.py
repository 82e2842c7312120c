"""The reference server, started as a program and spoken to over sockets; and its pure parts."""

import itertools
import json
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.reference.__main__ import read_arguments
from loadtest.reference.api import Answer, Ledger, Schedule, Sends, read_ask
from loadtest.reference.http import (
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    SO_TIMESTAMPNS,
    RequestReader,
    receipt_of,
)

TTFT, ITL = 0.05, 0.02
JSON = dict[str, Any]
HEAD_END = b"\r\n\r\n"


def body(**changed: object) -> JSON:
    return {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "stream": True} | changed


def chat(**changed: object) -> JSON:
    return {"model": "m", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 2, "stream": True} | changed


def post(content: JSON, path: str = "/v1/completions", more: str = "") -> bytes:
    data = json.dumps(content).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {len(data)}\r\n\r\n".encode() + data


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


class Server:
    """The program, on a port of its own choice."""

    def __init__(self, *options: str):
        command = [sys.executable, "-m", "loadtest.reference", "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """Head and body of the answer to one request."""
        with closing(self.connect()) as sock:
            sock.sendall(request)
            return receive(sock)

    def stamps(self, since: int = 0) -> list[JSON]:
        lines = self.ask(get(f"/stamps?since={since}"))[1].splitlines()
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        assert self.process.stdout
        self.process.stdout.close()


def receive(sock: socket.socket) -> tuple[bytes, bytes]:
    """Read one answer, up to its end by its own framing."""
    data = b""
    while HEAD_END not in data:
        data += take(sock)
    head, _, first = data.partition(HEAD_END)
    rest = bytearray(first)
    if b"chunked" in head:
        while not rest.endswith(b"0\r\n\r\n"):
            rest += take(sock)
    else:
        length = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
        while len(rest) < length:
            rest += take(sock)
    return head, bytes(rest)


def take(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    if not data:
        raise ConnectionResetError
    return data


def chunks(framed: bytes) -> list[bytes]:
    """The HTTP chunks of a body, the last and empty one too."""
    found, at = [], 0
    while at < len(framed):
        start = framed.index(b"\r\n", at) + 2
        end = start + int(framed[at : start - 2], 16)
        assert framed[end : end + 2] == b"\r\n"
        found.append(framed[start:end])
        at = end + 2
    return found


def events(framed: bytes) -> list[JSON]:
    """The events of a stream, each of which fills one chunk; the end is checked and left out."""
    *data, done, end = chunks(framed)
    assert (done, end) == (b"data: [DONE]\n\n", b"")
    assert all(piece.startswith(b"data: ") and piece.endswith(b"\n\n") for piece in data)
    return [json.loads(piece[6:]) for piece in data]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--ttft", str(TTFT), "--itl", str(ITL))
    yield server
    server.stop()


def test_a_stream_has_one_event_a_chunk_and_ends_with_a_reason(server: Server) -> None:
    head, framed = server.ask(post(body()))
    found = events(framed)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"text/event-stream" in head
    assert [event["choices"][0]["text"] for event in found] == [" token"] * 4
    assert [event["choices"][0]["finish_reason"] for event in found] == [None, None, None, "length"]
    assert {(event["object"], event["model"]) for event in found} == {("text_completion", "m")}
    assert len({event["id"] for event in found}) == 1


def test_usage_comes_last_when_it_is_asked_for(server: Server) -> None:
    *tokens, usage = events(server.ask(post(body(stream_options={"include_usage": True})))[1])
    assert len(tokens) == 4
    assert not any("usage" in event for event in tokens)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_continuous_usage_counts_up_in_each_chunk(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(server.ask(post(body(model="100%d", stream_options=options)))[1])
    assert [event["usage"]["completion_tokens"] for event in found] == [1, 2, 3, 4, 4]
    assert [event["usage"]["total_tokens"] for event in found] == [4, 5, 6, 7, 7]
    assert {event["model"] for event in found} == {"100%d"}


def test_a_chat_starts_with_a_role_that_is_no_token(server: Server) -> None:
    found = events(server.ask(post(chat(), "/v1/chat/completions"))[1])
    deltas = [event["choices"][0]["delta"] for event in found]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": " token"}, {"content": " token"}]
    assert {event["object"] for event in found} == {"chat.completion.chunk"}
    assert len(server.stamps()[-1]["sent_ns"]) == 2


def test_stamps_are_those_of_the_request_and_keep_the_schedule(server: Server) -> None:
    before = time.monotonic_ns()
    server.ask(post(body(max_tokens=20), more="X-Request-Id: mine\r\n"))
    after = time.monotonic_ns()
    summary, *found = server.stamps()
    own = next(sends for sends in found if sends["request_id"] == "mine")
    times = [own["received_ns"], *own["sent_ns"]]
    assert before <= times[0]
    assert times == sorted(times)
    assert times[-1] <= after
    assert (own["tokens"], own["chunks"], len(own["sent_ns"])) == (20, 20, 20)
    due = [own["received_ns"] + int((TTFT + ITL * i) * 1e9) for i in range(20)]
    late = [at - planned for at, planned in zip(own["sent_ns"], due, strict=True)]
    assert min(late) >= 0
    assert sorted(late)[10] < 50e6  # half of them, even on a busy machine
    assert summary["lateness_seconds"]["max"] >= max(late) / 1e9


def test_stamps_of_earlier_requests_can_be_left_out(server: Server) -> None:
    server.ask(post(body(max_tokens=1)))
    first = server.stamps()[0]["next"]
    server.ask(post(body(max_tokens=1)))
    summary, *found = server.stamps(first)
    assert summary["requests"] == summary["chunks"] == len(found) == 1
    assert found[0]["number"] == first
    assert summary["next"] == first + 1
    assert server.stamps(first + 1)[0]["requests"] == 0


def test_the_kernel_stamps_the_receipt(server: Server) -> None:
    time.sleep(0.1)  # the kernel begins a little after the server asks for it
    server.ask(post(body(max_tokens=1)))
    assert server.stamps()[-1]["clock"] == "kernel"


def test_several_tokens_in_a_chunk_take_as_long_as_they_would_alone() -> None:
    server = Server("--ttft", "0.01", "--itl", "0.02", "--tokens-per-chunk", "4")
    try:
        found = [events(server.ask(post(body(max_tokens=10)))[1]) for _ in range(4)]
        own = server.stamps()[1:]
    finally:
        server.stop()
    for chunks in found:
        assert [event["choices"][0]["text"] for event in chunks] == [" token" * 4, " token" * 4, " token" * 2]
    # A chunk is due with its first token.
    due = [int((0.01 + 0.02 * first) * 1e9) for first in (0, 4, 8)]
    late = [[at - one["received_ns"] - wait for at, wait in zip(one["sent_ns"], due, strict=True)] for one in own]
    assert len(late) == 4
    assert min(map(min, late)) >= 0
    assert min(map(max, late)) < 50e6  # one of them is on time even on a busy machine


def test_a_request_may_come_byte_by_byte(server: Server) -> None:
    with closing(server.connect()) as sock:
        for byte in post(body(max_tokens=1)):
            sock.send(bytes([byte]))
        assert len(events(receive(sock)[1])) == 1


def test_the_receipt_is_that_of_the_last_byte(server: Server) -> None:
    request = post(body(max_tokens=1))
    with closing(server.connect()) as sock:
        sock.sendall(request[:-1])
        time.sleep(0.1)
        last = time.monotonic_ns()
        sock.sendall(request[-1:])
        receive(sock)
    assert server.stamps()[-1]["received_ns"] >= last


def test_a_connection_serves_one_request_after_the_other(server: Server) -> None:
    with closing(server.connect()) as sock:
        for tokens in (1, 3, 2):
            sock.sendall(post(body(max_tokens=tokens)))
            assert len(events(receive(sock)[1])) == tokens


def test_a_connection_is_closed_when_the_client_asks(server: Server) -> None:
    with closing(server.connect()) as sock:
        sock.sendall(post(body(max_tokens=1), more="Connection: close\r\n"))
        head, _ = receive(sock)
        assert b"Connection: close" in head
        assert sock.recv(1) == b""


def test_a_request_inside_an_answer_ends_the_connection(server: Server) -> None:
    with closing(server.connect()) as sock:
        sock.sendall(post(body(max_tokens=1000)) * 2)
        with pytest.raises(ConnectionResetError):
            receive(sock)


def test_many_streams_get_all_their_tokens(server: Server) -> None:
    since = server.stamps()[0]["next"]
    sockets = [server.connect() for _ in range(200)]
    for number, sock in enumerate(sockets):
        sock.sendall(post(body(max_tokens=1 + number % 5)))
    counts = [len(events(receive(sock)[1])) for sock in sockets]
    for sock in sockets:
        sock.close()
    assert counts == [1 + number % 5 for number in range(200)]
    assert [sends["tokens"] for sends in server.stamps(since)[1:]] == counts


@pytest.mark.parametrize("seen", [b"HTTP/1.1", b"token"])
def test_clients_that_leave_hold_up_no_one(server: Server, seen: bytes) -> None:
    for kind in (0, 1):
        sock = server.connect()
        sock.sendall(post(body(max_tokens=50_000)))
        while seen not in take(sock):
            pass
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", kind, 0))
        sock.close()
    deadline = time.monotonic() + 5
    while json.loads(server.ask(get("/health"))[1])["streams"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(events(server.ask(post(body()))[1])) == 4


def test_a_client_that_reads_late_gets_every_byte() -> None:
    server = Server("--ttft", "0", "--itl", "0")
    try:
        with closing(server.connect()) as sock:
            sock.sendall(post(body(max_tokens=50_000)))
            time.sleep(0.5)
            assert len(events(receive(sock)[1])) == 50_000
    finally:
        server.stop()


def test_models_and_health_answer(server: Server) -> None:
    assert json.loads(server.ask(get("/v1/models"))[1])["data"][0]["id"] == "reference"
    assert json.loads(server.ask(get("/health"))[1])["status"] == "ok"


@pytest.mark.parametrize(
    ("request_bytes", "status", "named"),
    [
        (get("/nothing"), 404, "/nothing"),
        (get("/v1/completions"), 405, "POST"),
        (post({}, "/health"), 405, "GET"),
        (get("/stamps?since=-1"), 400, "since"),
        (get("/stamps?from=1"), 400, "since=N"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\n\r\n{", 400, "body"),
        (post([]), 400, "body"),  # type: ignore[arg-type]
        (post(body(stream=False)), 400, "stream"),
        (post(body(max_tokens=0)), 400, "max_tokens: '0'"),
        (post(body(max_tokens=10**9)), 400, "1000000"),
        (post(body(prompt=[-1])), 400, "prompt"),
        (post(body(prompt=["a", "b"])), 400, "prompt"),
        (post(body(prompt=None)), 400, "prompt"),
        (post(body(n=2)), 400, "n: '2'"),
        (post(body(invented=1)), 400, "invented"),
        (post(chat()), 400, "prompt"),
        (post(body(), "/v1/chat/completions"), 400, "messages"),
        (post(chat(messages=[]), "/v1/chat/completions"), 400, "messages"),
    ],
)
def test_a_bad_request_is_refused_and_the_connection_kept(
    server: Server, request_bytes: bytes, status: int, named: str
) -> None:
    with closing(server.connect()) as sock:
        sock.sendall(request_bytes)
        head, text = receive(sock)
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert named in json.loads(text)["error"]["message"]
        sock.sendall(post(body(max_tokens=1)))
        assert len(events(receive(sock)[1])) == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /" + b"a" * (MAX_HEAD_BYTES + 1) + b" HTTP/1.1\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + bytes(MAX_BODY_BYTES + 1), 413),
        (b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_ended(server: Server, data: bytes, status: int) -> None:
    with closing(server.connect()) as sock:
        sock.sendall(data)
        head, _ = receive(sock)
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert sock.recv(1) == b""


def test_a_taken_port_is_told(server: Server) -> None:
    command = [sys.executable, "-m", "loadtest.reference", "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert f"127.0.0.1:{server.port}" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--ttft", "-1"], ["--itl", "nan"], ["--itl", "4000"], ["--tokens-per-chunk", "0"]]
)
def test_a_schedule_that_cannot_be_is_refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_arguments(arguments)
    assert arguments[0].strip("-").replace("-", "_") in capsys.readouterr().err


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(1, 3))
def test_requests_are_the_same_however_their_bytes_are_cut(cuts: list[int], count: int) -> None:
    data = b"".join(post(body(max_tokens=number + 1), f"/{number}") for number in range(count))
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader, found = RequestReader(), []
    for start, end in itertools.pairwise(places):
        found += reader.feed(data[start:end])
    assert [request.target for request in found] == [f"/{number}" for number in range(count)]
    assert [json.loads(request.body)["max_tokens"] for request in found] == list(range(1, count + 1))
    assert all(request.method == "POST" and request.keep_alive for request in found)


@given(st.integers(1, 60), st.integers(1, 70), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_an_answer_holds_every_token_once(
    tokens: int, per_chunk: int, is_chat: bool, usage: bool, continuous: bool, ids: bool
) -> None:
    options = {"include_usage": usage, "continuous_usage_stats": continuous}
    content = (chat if is_chat else body)(max_tokens=tokens, stream_options=options, return_token_ids=ids)
    answer = Answer(read_ask(json.dumps(content).encode(), is_chat), 7, 0, per_chunk, keep_alive=True)
    pieces = list(answer.pieces)
    found = events(b"".join(pieces))
    texts = [c.get("text") or c["delta"]["content"] for event in found for c in event["choices"]]
    assert len(pieces) == Schedule(0, 0, per_chunk).chunks(tokens) == len(texts)
    assert "".join(texts) == " token" * tokens
    told = [len(c["token_ids"]) for event in found for c in event["choices"] if "token_ids" in c]
    assert told == ([text.count(" token") for text in texts] if ids else [])
    assert [event["usage"]["completion_tokens"] for event in found if "usage" in event][-1:] == [tokens][: int(usage)]


@pytest.mark.parametrize(
    ("prompt", "tokens"), [([1, 2], 2), ("a b c", 3), ([[1, 2, 3, 4]], 4), (["a b"], 2), ([], 0), ("", 0)]
)
def test_prompt_tokens_are_ids_or_words(prompt: object, tokens: int) -> None:
    assert read_ask(json.dumps(body(prompt=prompt)).encode(), chat=False).prompt_tokens == tokens


def test_the_longer_name_of_the_length_goes_first() -> None:
    assert read_ask(json.dumps(body(max_completion_tokens=9)).encode(), chat=False).tokens == 9


def sends(number: int, count: int = 1, late_ns: int = 0) -> Sends:
    return Sends(number, "", "user", 0, count, count, array("q", [50 + 20 * i + late_ns for i in range(count)]))


def summary_of(ledger: Ledger) -> JSON:
    summary: JSON = json.loads(ledger.lines(0).splitlines()[0])
    return summary


def test_the_ledger_drops_the_oldest_and_counts_them() -> None:
    ledger = Ledger(Schedule(50, 20), room=3 * (64 + 10))
    for number in range(5):
        ledger.add(sends(number, 10))
    kept = [json.loads(line)["number"] for line in ledger.lines(0).splitlines()[1:]]
    assert kept == [2, 3, 4]
    assert (summary_of(ledger)["dropped"], summary_of(ledger)["next"]) == (2, 5)


def test_a_request_too_large_for_the_ledger_is_kept_alone() -> None:
    ledger = Ledger(Schedule(50, 20), room=70)
    ledger.add(sends(0))
    ledger.add(sends(1, 1000))
    assert (summary_of(ledger)["requests"], summary_of(ledger)["dropped"]) == (1, 1)


def test_lateness_is_that_of_all_chunks_together() -> None:
    ledger = Ledger(Schedule(50, 20))
    ledger.add(sends(0, 99, late_ns=1000))
    ledger.add(sends(1, 1, late_ns=5000))
    late = summary_of(ledger)["lateness_seconds"]
    assert late["p50"] == pytest.approx(1e-6)
    assert late["max"] == pytest.approx(5e-6)
    assert late["p50"] < late["p99"] < late["max"]


def stamp(age_ns: int) -> bytes:
    return struct.pack("@qq", *divmod(time.time_ns() - age_ns, 10**9))


def test_the_kernels_stamp_is_put_on_the_monotonic_clock() -> None:
    receipt = receipt_of([(socket.SOL_SOCKET, SO_TIMESTAMPNS, stamp(age_ns=5_000_000))], time.monotonic_ns)
    assert receipt.clock == "kernel"
    assert (time.monotonic_ns() - receipt.ns) / 1e6 == pytest.approx(5, abs=3)


@pytest.mark.parametrize("ancillary", [[], [(socket.SOL_SOCKET, SO_TIMESTAMPNS, stamp(age_ns=-(10**12)))]])
def test_without_a_stamp_that_can_be_right_the_clock_is_read(ancillary: list[tuple[int, int, bytes]]) -> None:
    receipt = receipt_of(ancillary, lambda: 42)
    assert (receipt.ns, receipt.clock) == (42, "user")
