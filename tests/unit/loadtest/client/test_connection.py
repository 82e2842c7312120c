"""The streaming client, against a real socket server that sends what a script says."""

import gc
import gzip
import itertools
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable

import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.client.connection import Connection, Exchange
from loadtest.client.http import Answer as Read
from loadtest.client.receiver import Receiver, Stamps
from loadtest.records import ErrorKind
from tests.unit.loadtest.client.scripted import (
    FIRST,
    LAST,
    REQUEST,
    STREAM,
    Answer,
    Connect,
    Serve,
    Step,
    answer,
    chunked,
    event,
    hang_up,
    head,
    part,
    pause,
    post,
    record_of,
    reset,
)


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
    assert (exchange.status, exchange.answer.complete, exchange.error) == (200, True, None)
    assert exchange.answer.content_type == "text/event-stream"
    assert exchange.answer.body == STREAM
    assert [data for _, data in exchange.events()][-1] == b"[DONE]"


def test_a_body_that_ends_with_the_connection_is_whole(serve: Serve, connect: Connect) -> None:
    # RFC 9112, section 6.3: without a length and without chunks the body ends where the connection does.
    closing = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    exchange = post(connect(serve([[closing + STREAM]]).url))
    assert exchange.answer.body == STREAM
    assert exchange.error is None


def test_an_interim_answer_is_not_the_answer(serve: Serve, connect: Connect) -> None:
    # RFC 9110, section 15.2: a client must be able to parse interim answers, which it may ignore.
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    exchange = post(connect(serve([[early, pause, answer(STREAM)]]).url))
    assert (exchange.status, exchange.answer.body) == (200, STREAM)


def test_a_body_whose_end_has_trailers_is_whole(serve: Serve, connect: Connect) -> None:
    server = serve([[head() + chunked(STREAM)[:-2], pause, b"Server-Timing: a\r\n\r\n"], [answer(STREAM)]])
    connection = connect(server.url, timeout=2)
    assert [post(connection).error for _ in range(2)] == [None, None]


def test_an_answer_that_changes_the_protocol_is_malformed(serve: Serve, connect: Connect) -> None:
    upgrade = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    assert post(connect(serve([[upgrade]]).url, timeout=2)).error == "malformed"


def test_an_answer_is_freed_without_the_garbage_collector(serve: Serve, connect: Connect) -> None:
    server = serve([[answer(STREAM), answer(STREAM)[:90], hang_up]], [[answer(b"no", "500 Oops", "text/plain")]])
    connection = connect(server.url)
    gc.disable()
    try:
        left = [weakref.ref(post(connection).answer) for _ in range(3)]
        assert [ref() for ref in left] == [None, None, None]
    finally:
        gc.enable()


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


def test_a_server_that_comes_back_at_another_address_is_found(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve([[answer(STREAM)]])
    moved = int(server.url.rpartition(":")[2])
    addresses = [("127.0.0.1", free_port()), ("127.0.0.1", moved)]
    found = [[(socket.AF_INET, socket.SOCK_STREAM, 0, "", address)] for address in addresses]
    monkeypatch.setattr(gevent.socket, "getaddrinfo", lambda *_, **__: found.pop(0))
    connection = connect("http://moving.example")
    assert [post(connection).error for _ in range(2)] == ["connect", None]


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
    assert exchange.answer.body == (FIRST if FIRST in sent else b"")


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
    failed, good = (record_of(post(connection)) for _ in range(2))
    assert (failed.error, failed.status) == (kind, status)
    assert failed.error_detail is not None
    assert (failed.index, failed.target, failed.phase, failed.max_tokens) == (4, "hf", "measured", 2)
    assert failed.end_ns >= failed.sent_ns > 0
    assert (failed.ttft_seconds, failed.e2e_seconds, failed.tpot_seconds) == (None, None, None)
    assert (good.error, good.output_tokens, good.chunk_tokens) == (None, 2, [1, 1])


def test_tokens_that_came_before_a_failure_stay_in_the_record(serve: Serve, connect: Connect) -> None:
    server = serve([[head() + chunked(FIRST)[:-5], hang_up]])
    record = record_of(post(connect(server.url)))
    assert (record.error, len(record.chunk_ns), record.chunk_tokens) == ("truncated", 1, [1])


def test_tokens_that_came_before_a_reset_stay_in_the_record(serve: Serve, connect: Connect) -> None:
    pieces = [step for n in range(1, 5) for step in (part(event(n)), pause)]
    record = record_of(post(connect(serve([[head(), pause, *pieces, reset]]).url)))
    assert (record.error, record.chunk_tokens) == ("reset", [1] * 4)


def test_the_body_of_a_refusal_is_kept_up_to_a_limit(serve: Serve, connect: Connect) -> None:
    server = serve([[answer("é".encode() * 1000, "400 Bad Request", "text/plain")]])
    record = record_of(post(connect(server.url)))
    assert record.error_detail == "é" * 250


@pytest.mark.parametrize("stamps", ["kernel", "user"])
def test_each_piece_has_the_time_at_which_it_came(serve: Serve, connect: Connect, stamps: Stamps) -> None:
    sent: list[int] = []

    def send(piece: bytes) -> Step:
        def step(connection: socket.socket) -> None:
            sent.append(time.monotonic_ns())
            connection.sendall(piece)
            pause(connection)

        return step

    # The first event comes in two halves and is there with the second; the last token is not the end of the answer.
    steps = [send(head(len(STREAM)) + FIRST[:9]), send(FIRST[9:]), send(LAST), b"data: [DONE]\n\n"]
    exchange = post(connect(serve([steps]).url, receiver=Receiver(stamps)))
    (first, _), (last, _), (done, _) = exchange.events()
    assert exchange.sent_ns <= sent[0] < sent[1] <= first <= sent[2] <= last <= done <= exchange.end_ns
    record = record_of(exchange)
    assert record.stamp_source == stamps
    assert record.chunk_ns == [first, last]
    assert record.ttft_seconds == (first - exchange.sent_ns) / 1e9


@pytest.mark.parametrize("stamps", ["kernel", "user"])
def test_only_the_kernel_stamps_right_while_this_process_is_busy(
    serve: Serve, connect: Connect, stamps: Stamps
) -> None:
    sent: list[int] = []

    def send(connection: socket.socket) -> None:
        pause(connection)
        sent.append(time.monotonic_ns())
        connection.sendall(answer(STREAM))

    connection = connect(serve([[send]]).url, receiver=Receiver(stamps))
    gevent.spawn_later(0.02, time.sleep, 0.4)  # blocks the loop, which a cooperative sleep would not
    exchange = post(connection)
    late = (next(exchange.events())[0] - sent[0]) / 1e9
    assert 0 <= late < 0.05 if stamps == "kernel" else late > 0.2


def test_a_wall_clock_that_is_set_does_not_move_stamps(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = Receiver("kernel")
    wall_ns = time.time_ns
    monkeypatch.setattr("loadtest.client.receiver.time.time_ns", lambda: wall_ns() + 3600 * 10**9)
    exchange = post(connect(serve([[answer(STREAM)]]).url, receiver=receiver))
    assert exchange.sent_ns <= next(exchange.events())[0] <= exchange.end_ns
    assert exchange.clock == "user"


def test_every_stamp_is_taken_with_the_clock_that_was_given(serve: Serve, connect: Connect) -> None:
    server = serve([[head(), *(bytes([byte]) for byte in chunked(FIRST, LAST))]], [[hang_up]])
    ticks = itertools.count(1000, 1000)
    connection = connect(server.url, receiver=Receiver("user", clock=lambda: next(ticks)))
    exchanges = [post(connection), post(connection)]
    stamps = [
        stamp
        for exchange in exchanges
        for stamp in (exchange.sent_ns, *(at for at, _ in exchange.answer.pieces), exchange.end_ns)
    ]
    assert stamps == sorted(stamps)
    assert all(stamp % 1000 == 0 and stamp < next(ticks) for stamp in stamps)


def test_events_carry_the_stamp_of_the_piece_that_completed_them() -> None:
    pieces = [(10, b"data: a"), (20, b"\n\ndata: b\n\nda"), (30, b"ta: c\n"), (40, b"\n")]
    assert list(Exchange(0, answer=Read(pieces=pieces)).events()) == [(20, b"a"), (20, b"b"), (40, b"c")]


@settings(max_examples=100)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12), st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_the_stream_is_cut(places: list[int], ending: bytes) -> None:
    stream = STREAM.replace(b"\n", ending)
    borders = [0, *sorted(places), len(stream)]
    pieces = [(number, stream[begin:end]) for number, (begin, end) in enumerate(itertools.pairwise(borders))]
    events = list(Exchange(0, answer=Read(pieces=pieces)).events())
    assert [data for _, data in events] == [data for _, data in Exchange(0, answer=Read(pieces=[(0, STREAM)])).events()]
    for stamp, data in events:
        end = stream.index(data) + len(data) + 2 * len(ending)
        assert borders[stamp] < end <= borders[stamp + 1]


@pytest.mark.parametrize("pieces", [1, 7], ids=["at once", "in pieces"])
def test_a_packed_stream_that_was_not_asked_for_is_read_all_the_same(
    serve: Serve, connect: Connect, pieces: int
) -> None:
    packed = gzip.compress(STREAM)
    size = -(-len(packed) // pieces)
    cut = [packed[at : at + size] for at in range(0, len(packed), size)]
    server = serve([[head(more="Content-Encoding: gzip\r\n") + chunked(*cut)]])
    record = record_of(post(connect(server.url)))
    assert (record.error, record.output_tokens) == (None, 2)


@pytest.mark.parametrize("cut", [4, 12])
@pytest.mark.parametrize("framed", [True, False])
def test_a_packed_stream_that_ends_too_soon_is_truncated(
    serve: Serve, connect: Connect, cut: int, framed: bool
) -> None:
    packed, more = gzip.compress(STREAM)[:-cut], "Content-Encoding: gzip\r\n"
    closing = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + more.encode() + b"\r\n"
    server = serve([[answer(packed, more=more)] if framed else [closing, packed]], [[answer(STREAM)]])
    connection = connect(server.url)
    first, second = (record_of(post(connection)) for _ in range(2))
    assert (first.error, first.error_detail) == ("truncated", "the answer ended inside its packed data")
    assert second.error is None


def test_an_empty_answer_that_claims_to_be_packed_is_only_empty(serve: Serve, connect: Connect) -> None:
    packed = answer(b"", "503 Service Unavailable", more="Content-Encoding: gzip\r\n")
    assert post(connect(serve([[packed]]).url)).error is None


def test_a_stream_that_only_claims_to_be_packed_is_malformed(serve: Serve, connect: Connect) -> None:
    server = serve([[head(more="Content-Encoding: gzip\r\n") + chunked(STREAM)]])
    assert record_of(post(connect(server.url))).error == "malformed"


def test_a_huge_event_is_read_and_an_endless_answer_is_not(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = FIRST.replace(b'"a"', b'"' + b"a" * 3_000_000 + b'"') + LAST
    assert record_of(post(connect(serve([[answer(huge)]]).url))).output_tokens == 2
    monkeypatch.setattr("loadtest.client.http.MAX_ANSWER_BYTES", 1_000_000)
    record = record_of(post(connect(serve([[answer(huge)]]).url)))
    assert record.error == "malformed"
    assert "larger than" in str(record.error_detail)


def test_a_stream_without_data_for_too_long_is_a_timeout_before_the_deadline(serve: Serve, connect: Connect) -> None:
    server = serve([[]])
    server.scripts[0][0] = [head() + chunked(FIRST)[:-5], pause, chunked(FIRST)[:-5], server.wait]
    begun = time.monotonic_ns()
    exchange = post(connect(server.url, timeout=30, token_timeout=0.2))
    assert exchange.error == "timeout"
    assert "0.2 s" in str(exchange.error_detail)
    assert 0.25e9 <= exchange.end_ns - begun < 3e9


def test_comments_are_no_sign_of_life(serve: Serve, connect: Connect) -> None:
    pings = [pause, b"8\r\n: ping\n\n\r\n"] * 40
    server = serve([[head() + chunked(FIRST)[:-5], *pings, chunked(LAST)]])
    exchange = post(connect(server.url, timeout=30, token_timeout=0.3))
    assert (exchange.error, exchange.error_detail) == ("timeout", "no data came for 0.3 s")
    assert exchange.end_ns - exchange.sent_ns < 1.5e9
    assert len(list(exchange.events())) == 1


def test_a_stream_that_stalls_keeps_its_tokens_when_its_time_is_up(serve: Serve, connect: Connect) -> None:
    server = serve([[]])
    server.scripts[0][0] = [head(), pause, part(event(1)), pause, part(event(2)), pause, part(event(3)), server.wait]
    record = record_of(post(connect(server.url, timeout=0.5)))
    assert (record.error, record.chunk_tokens) == ("timeout", [1, 1, 1])
    assert record.error_detail == "no last token until the deadline"


OPEN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    "steps",
    [
        [head(), pause, part(FIRST), pause, part(LAST), part(b"data: [DONE]\n\n")],
        [OPEN, pause, FIRST, pause, LAST + b"data: [DONE]\n\n"],
        [OPEN, STREAM.replace(b"\n", b"\r\n"), pause, b": ping\r\n\r\n"],
    ],
    ids=["chunked", "until the connection ends", "with a comment after it"],
)
@pytest.mark.parametrize("patience", [0, 0.1])
def test_a_stream_that_is_done_is_complete_although_its_body_stays_open(
    serve: Serve, connect: Connect, steps: Answer, patience: float
) -> None:
    server = serve([[]], [[answer(STREAM)]])
    server.scripts[0][0] = [*steps, lambda connection: connection.recv(1)]
    connection = connect(server.url, timeout=30, token_timeout=patience)
    first, second = post(connection), post(connection)
    assert first.end_ns - first.sent_ns < 3e9
    assert [(record.error, record.output_tokens) for record in map(record_of, (first, second))] == [(None, 2)] * 2
    assert [number for number, _ in server.requests] == [0, 1]


@pytest.mark.parametrize("cut", [b"[DONE]", b"[DO"])
def test_a_stream_that_is_done_in_pieces_is_complete_at_the_deadline(
    serve: Serve, connect: Connect, cut: bytes
) -> None:
    server = serve([[]])
    before, middle, after = (head() + part(STREAM)).partition(cut)
    server.scripts[0][0] = [before + middle, pause, after[:-1], server.wait]
    record = record_of(post(connect(server.url, timeout=0.5)))
    assert (record.error, record.output_tokens) == (None, 2)


def test_a_body_that_ends_a_moment_after_its_stream_leaves_the_connection_for_the_next(
    serve: Serve, connect: Connect
) -> None:
    server = serve([[head() + part(STREAM), pause, pause, b"0\r\n\r\n"], [answer(STREAM)]])
    connection = connect(server.url)
    assert [post(connection).error for _ in range(2)] == [None, None]
    assert [number for number, _ in server.requests] == [0, 0]


def test_a_refusal_before_the_request_was_read_is_seen(serve: Serve, connect: Connect) -> None:
    """A server that has read enough of a request refuses it, and does not read the rest."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer(b"too long", "413 Content Too Large", "text/plain", "Connection: close\r\n"))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        thread = threading.Thread(target=refuse)
        thread.start()
        connection = connect(f"http://127.0.0.1:{listener.getsockname()[1]}")
        exchange = connection.post("/v1/completions", b"x" * 20_000_000)
        thread.join(5)
    assert (exchange.status, exchange.answer.body) == (413, b"too long")


def test_a_greenlet_that_is_killed_while_it_waits_leaves_what_had_come(serve: Serve, connect: Connect) -> None:
    server = serve([[]], [[answer(STREAM)]])
    server.scripts[0][0] = [head(), *(step for n in (1, 2, 4) for step in (pause, part(event(n)))), server.wait]
    connection = connect(server.url)
    waiting = gevent.spawn(post, connection)
    gevent.sleep(0.4)
    waiting.kill()
    assert waiting.value
    record = record_of(waiting.value)
    assert (record.error, record.chunk_tokens, record.stamp_source) == ("cancelled", [1, 1, 2], "kernel")
    assert record.sent_ns < record.chunk_ns[0] < record.chunk_ns[1] - 20_000_000 < record.chunk_ns[2] - 40_000_000
    assert (record.status, record.output_tokens, record.e2e_seconds) == (200, None, None)
    server.stop.set()
    assert record_of(post(connection)).error is None


def test_the_key_of_a_server_is_sent_as_a_header(serve: Serve) -> None:
    server = serve([[answer(STREAM)]])
    receiver = Receiver()
    connection = Connection(server.url, receiver, 5, headers={"Authorization": "Bearer secret"})
    post(connection)
    connection.close()
    receiver.close()
    assert b"\r\nAuthorization: Bearer secret\r\n" in server.requests[0][1]


def test_a_host_that_is_no_name_is_a_connect_error(connect: Connect) -> None:
    assert post(connect("http://a..b")).error == "connect"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://:80", "/v1"])
def test_a_url_that_names_no_server_is_refused_with_what_is_expected(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected http://HOST\[:PORT\] or https://HOST\[:PORT\]") as refused:
        Connection(url, Receiver(), 1)
    assert repr(url) in str(refused.value)
