"""The streaming client, against a real socket server that sends what a script says."""

import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from loadtest.client import Connection, Exchange
from loadtest.records import ErrorKind
from loadtest.run import make_record
from loadtest.workloads import Request

REQUEST = Request(index=4, prompt="x", max_tokens=2, temperature=0.0, seed=0)
FIRST = b'data: {"choices":[{"text":"a","finish_reason":null}],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
LAST = (
    b'data: {"choices":[{"text":"b","finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
)
STREAM = FIRST + LAST + b"data: [DONE]\n\n"

# What the server does once it has read a request: send bytes, or do something with the connection.
Step = bytes | Callable[[socket.socket], object]
Answer = list[Step]


def head(length: int | None = None, status: str = "200 OK", kind: str = "text/event-stream", more: str = "") -> bytes:
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{framing}\r\n{more}\r\n".encode()


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def answer(body: bytes, status: str = "200 OK", kind: str = "text/event-stream", more: str = "") -> bytes:
    return head(len(body), status, kind, more) + body


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@dataclass
class Server:
    """Accepts one connection for each script, answers one request with each answer of it, then hangs up."""

    scripts: list[list[Answer]]
    requests: list[tuple[int, bytes]] = field(default_factory=list)
    closed: list[threading.Event] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Server":
        self.closed = [threading.Event() for _ in self.scripts]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()
        assert not self._thread.is_alive()

    def wait(self, _: socket.socket) -> None:
        """A step that does nothing until the test is over."""
        assert self.stop.wait(10)

    def _serve(self) -> None:
        for number, answers in enumerate(self.scripts):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the test is over
                return
            with connection:
                self._answer(number, connection, answers)
            self.closed[number].set()

    def _answer(self, number: int, connection: socket.socket, answers: list[Answer]) -> None:
        for steps in answers:
            request = read_request(connection)
            if not request:
                return
            self.requests.append((number, request))
            for step in steps:
                if isinstance(step, bytes):
                    connection.sendall(step)
                else:
                    step(connection)


def read_request(connection: socket.socket) -> bytes:
    """Read one request; returns nothing when the connection has ended."""
    data = b""
    while b"\r\n\r\n" not in data:
        if connection.fileno() < 0 or not (piece := connection.recv(65536)):
            return b""
        data += piece
    length = int(data.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(data.split(b"\r\n\r\n", 1)[1]) < length:
        data += connection.recv(65536)
    return data


class PacedClock:
    """The real clock, which also tells the server when the client has taken a stamp of what it was sent."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return time.monotonic_ns()

    def wait_for_stamp(self, calls: int) -> None:
        """Wait for the stamp of what was sent when `calls` calls had been made."""
        # One call may come before the client receives; the second comes after.
        deadline = time.monotonic() + 5
        while self.calls < calls + 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)


Serve = Callable[..., Server]
Connect = Callable[..., Connection]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server; each argument is a connection's list of answers."""
    with ExitStack() as stack:
        yield lambda *scripts: stack.enter_context(Server(list(scripts)))


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as stack:

        def connect(url: str, timeout: float = 5, clock: Callable[[], int] = time.monotonic_ns) -> Connection:
            connection = Connection(url, timeout, clock)
            stack.callback(connection.close)
            return connection

        yield connect


def post(connection: Connection) -> Exchange:
    return connection.post("/v1/completions", REQUEST.body("m"))


@pytest.mark.parametrize(
    "steps",
    [
        [answer(STREAM)],
        [head() + chunked(STREAM)],
        [head() + chunked(*(STREAM[at : at + 7] for at in range(0, len(STREAM), 7)))],
        [head(), *(bytes([byte]) for byte in chunked(FIRST, LAST, b"data: [DONE]\n\n"))],
        [*(bytes([byte]) for byte in answer(STREAM, more="X-Long: " + "y" * 300 + "\r\n"))],
    ],
    ids=["content length", "one chunk", "chunks of 7 bytes", "chunks, byte by byte", "all byte by byte"],
)
def test_the_body_is_the_same_however_it_is_framed(serve: Serve, connect: Connect, steps: Answer) -> None:
    exchange = post(connect(serve([steps]).url))
    assert (exchange.status, exchange.complete, exchange.error) == (200, True, None)
    assert exchange.content_type == "text/event-stream"
    assert exchange.body == STREAM
    assert [data for _, data in exchange.events()][-1] == b"[DONE]"


def test_a_body_that_ends_with_the_connection_is_whole(serve: Serve, connect: Connect) -> None:
    # RFC 9112, section 6.3: without a length and without chunks the body ends where the connection does.
    closing = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    exchange = post(connect(serve([[closing + STREAM]]).url))
    assert exchange.body == STREAM
    assert exchange.error is None


def test_an_interim_answer_is_not_the_answer(serve: Serve, connect: Connect) -> None:
    # RFC 9110, section 15.2: a client must be able to parse interim answers, which it may ignore.
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    clock = PacedClock()

    def send(connection: socket.socket) -> None:
        calls = clock.calls
        connection.sendall(early)
        clock.wait_for_stamp(calls)

    exchange = post(connect(serve([[send, answer(STREAM)]]).url, clock=clock))
    assert (exchange.status, exchange.body) == (200, STREAM)


def test_the_request_is_what_was_asked_for(serve: Serve, connect: Connect) -> None:
    server = serve([[answer(b"{}")], [answer(b"{}")]])
    connection = connect(f"http://user@127.0.0.1:{server.port}/base/")
    post(connection)
    connection.get("/v1/models")
    (_, posted), (_, got) = server.requests
    lines, _, body = posted.partition(b"\r\n\r\n")
    assert lines.split(b"\r\n")[0] == b"POST /base/v1/completions HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}".encode() in lines.split(b"\r\n")
    assert b"Accept-Encoding: identity" in lines.split(b"\r\n")
    assert json.loads(body) == REQUEST.body("m")
    assert got.startswith(b"GET /base/v1/models HTTP/1.1\r\n")


def test_requests_share_a_connection(serve: Serve, connect: Connect) -> None:
    server = serve([[answer(STREAM)], [head() + chunked(STREAM)], [answer(b"no", "404 Not Found", "text/plain")]])
    connection = connect(server.url)
    exchanges = [post(connection) for _ in range(3)]
    assert [exchange.status for exchange in exchanges] == [200, 200, 404]
    assert [number for number, _ in server.requests] == [0, 0, 0]


def test_a_server_that_announces_the_end_of_the_connection_gets_a_new_one(serve: Serve, connect: Connect) -> None:
    server = serve([[answer(STREAM, more="Connection: close\r\n"), server_waits]], [[answer(STREAM)]])
    connection = connect(server.url)
    assert [post(connection).error for _ in range(2)] == [None, None]
    assert [number for number, _ in server.requests] == [0, 1]


def server_waits(connection: socket.socket) -> None:
    """Leave it to the client to close the connection."""
    assert connection.recv(1) == b""


@pytest.mark.parametrize("end", [hang_up, reset])
def test_an_idle_connection_that_the_server_closed_is_no_error(
    serve: Serve, connect: Connect, end: Callable[[socket.socket], None]
) -> None:
    server = serve([[answer(STREAM), end]], [[answer(STREAM)]])
    connection = connect(server.url)
    assert post(connection).error is None
    assert server.closed[0].wait(5)
    assert post(connection).error is None
    assert [number for number, _ in server.requests] == [0, 1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_no_server_is_a_connect_error_and_never_raises(connect: Connect) -> None:
    exchange = post(connect(f"http://127.0.0.1:{free_port()}"))
    assert exchange.error == "connect"
    assert "refused" in str(exchange.error_detail)
    assert exchange.status is None
    assert exchange.end_ns >= exchange.sent_ns > 0


def test_a_server_without_tls_at_an_https_url_is_a_connect_error(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        assert post(connect(f"https://127.0.0.1:{listener.getsockname()[1]}")).error == "connect"
        thread.join(5)


@pytest.mark.parametrize("sent", [b"", head(), head() + chunked(FIRST)[:-5]], ids=["nothing", "the head", "a token"])
def test_a_server_that_stalls_is_a_timeout(serve: Serve, connect: Connect, sent: bytes) -> None:
    server = serve([[]])
    server.scripts[0][0] = [sent, server.wait]
    begun = time.monotonic_ns()
    exchange = post(connect(server.url, timeout=0.2))
    assert exchange.error == "timeout"
    assert exchange.error_detail
    assert 0.2e9 <= exchange.end_ns - begun < 3e9
    assert exchange.body == (FIRST if FIRST in sent else b"")


def test_a_stream_that_trickles_on_ends_at_the_timeout(serve: Serve, connect: Connect) -> None:
    server = serve([[]])

    def trickle(connection: socket.socket) -> None:
        connection.sendall(head())
        while not server.stop.wait(0.02):
            try:
                connection.sendall(b"3\r\n:x\n\r\n")
            except OSError:  # the client has given up
                return

    server.scripts[0][0] = [trickle]
    begun = time.monotonic_ns()
    exchange = post(connect(server.url, timeout=0.3))
    assert (exchange.error, exchange.status) == ("timeout", 200)
    assert 0.3e9 <= exchange.end_ns - begun < 3e9


FAILURES: list[tuple[str, list[Step], ErrorKind, int | None]] = [
    ("hangs up before it answers", [hang_up], "reset", None),
    ("resets before it answers", [reset], "reset", None),
    ("hangs up inside the head", [b"HTTP/1.1 200", hang_up], "reset", None),
    ("hangs up after the head", [head(), hang_up], "truncated", 200),
    ("hangs up inside a chunk", [head() + chunked(STREAM)[:150], hang_up], "truncated", 200),
    ("hangs up between chunks", [head() + chunked(FIRST)[:-5], hang_up], "truncated", 200),
    ("hangs up short of its length", [answer(STREAM)[:-1], hang_up], "truncated", 200),
    ("leaves out the last token", [answer(FIRST)], "truncated", 200),
    ("sends no HTTP", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"], "malformed", None),
    ("sends no chunk size", [head() + b"zz\r\n"], "malformed", 200),
    ("sends no event stream", [answer(b'{"choices": []}', kind="application/json")], "malformed", 200),
    ("sends no JSON", [answer(b"data: {\n\n")], "malformed", 200),
    ("sends an error event", [answer(FIRST + b'data: {"error": {"message": "oom"}}\n\n')], "sse_error", 200),
    ("redirects", [answer(b"", "302 Found", "text/html", "Location: /x\r\n")], "malformed", 302),
    ("refuses", [answer(b'{"error": "no such model"}', "404 Not Found", "application/json")], "http_4xx", 404),
    ("is busy", [answer(b"", "429 Too Many Requests", "text/plain")], "http_4xx", 429),
    ("fails", [answer(b"Internal Server Error", "500 Internal Server Error", "text/plain")], "http_5xx", 500),
    ("is cut off in its refusal", [head(99, "503 Service Unavailable"), hang_up], "http_5xx", 503),
]


@pytest.mark.parametrize(
    ("steps", "kind", "status"), [failure[1:] for failure in FAILURES], ids=[failure[0] for failure in FAILURES]
)
def test_every_failure_is_a_record_with_its_kind_and_the_next_request_works(
    serve: Serve, connect: Connect, steps: Answer, kind: ErrorKind, status: int | None
) -> None:
    # Some failures leave the connection usable; the server is ready for either.
    server = serve([steps, [answer(STREAM)]], [[answer(STREAM)]])
    connection = connect(server.url)
    failed, good = (make_record("hf", REQUEST, post(connection), "measured") for _ in range(2))
    assert (failed.error, failed.status) == (kind, status)
    assert failed.error_detail is not None
    assert (failed.index, failed.target, failed.phase, failed.max_tokens) == (4, "hf", "measured", 2)
    assert failed.end_ns >= failed.sent_ns > 0
    assert (failed.ttft_seconds, failed.e2e_seconds, failed.tpot_seconds) == (None, None, None)
    assert (good.error, good.output_tokens, good.chunk_tokens) == (None, 2, [1, 1])


def test_tokens_that_came_before_a_failure_stay_in_the_record(serve: Serve, connect: Connect) -> None:
    server = serve([[head() + chunked(FIRST)[:-5], hang_up]])
    record = make_record("hf", REQUEST, post(connect(server.url)), "measured")
    assert (record.error, len(record.chunk_ns), record.chunk_tokens) == ("truncated", 1, [1])


def test_the_body_of_a_refusal_is_kept_up_to_a_limit(serve: Serve, connect: Connect) -> None:
    server = serve([[answer("é".encode() * 1000, "400 Bad Request", "text/plain")]])
    record = make_record("hf", REQUEST, post(connect(server.url)), "warmup")
    assert record.error_detail == "é" * 250


def test_each_piece_has_the_time_at_which_it_came(serve: Serve, connect: Connect) -> None:
    clock, sent = PacedClock(), []

    def send(piece: bytes) -> Step:
        def step(connection: socket.socket) -> None:
            calls = clock.calls
            sent.append(time.monotonic_ns())
            connection.sendall(piece)
            clock.wait_for_stamp(calls)

        return step

    # The first event comes in two halves and is there with the second; the last token is not the end of the answer.
    steps = [send(head(len(STREAM)) + FIRST[:9]), send(FIRST[9:]), send(LAST), b"data: [DONE]\n\n"]
    exchange = post(connect(serve([steps]).url, clock=clock))
    (first, _), (last, _), (done, _) = exchange.events()
    assert exchange.sent_ns <= sent[0] < sent[1] <= first <= sent[2] <= last <= done <= exchange.end_ns
    record = make_record("hf", REQUEST, exchange, "measured")
    assert record.chunk_ns == [first, last]
    assert record.ttft_seconds == (first - exchange.sent_ns) / 1e9


def test_every_stamp_is_taken_with_the_clock_that_was_given(serve: Serve, connect: Connect) -> None:
    server = serve([[head(), *(bytes([byte]) for byte in chunked(FIRST, LAST))]], [[hang_up]])
    ticks = itertools.count(1000, 1000)
    connection = connect(server.url, clock=lambda: next(ticks))
    exchanges = [post(connection), post(connection)]
    stamps = [
        stamp
        for exchange in exchanges
        for stamp in (exchange.sent_ns, *(at for at, _ in exchange.pieces), exchange.end_ns)
    ]
    assert stamps == sorted(stamps)
    assert all(stamp % 1000 == 0 and stamp < next(ticks) for stamp in stamps)


def test_events_carry_the_stamp_of_the_piece_that_completed_them() -> None:
    pieces = [(10, b"data: a"), (20, b"\n\ndata: b\n\nda"), (30, b"ta: c\n"), (40, b"\n")]
    assert list(Exchange(0, pieces=pieces).events()) == [(20, b"a"), (20, b"b"), (40, b"c")]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://:80", "/v1"])
def test_a_url_that_names_no_server_is_refused_with_what_is_expected(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected http://HOST\[:PORT\] or https://HOST\[:PORT\]") as refused:
        Connection(url, 1)
    assert repr(url) in str(refused.value)
