"""The streaming client over TLS."""

import socket
import ssl
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gevent
import pytest

from loadtest.client import connection as client
from loadtest.records import ErrorKind
from tests.unit.loadtest.client.scripted import (
    FIRST,
    LAST,
    STREAM,
    Answer,
    Connect,
    Serve,
    Server,
    answer,
    chunked,
    hang_up,
    head,
    part,
    pause,
    post,
    record_of,
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the key and the certificate of 127.0.0.1, signed by itself."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", path, "-out", path.with_name("crt")], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_name("crt").read_bytes())
    return path


@pytest.fixture
def encrypt(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], Server]:
    """Makes a server speak TLS with a certificate that clients trust."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("crt")))
    client._context.cache_clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def encrypt(server: Server) -> Server:
        server.tls, server.url = context, server.url.replace("http:", "https:")
        return server

    return encrypt


def test_tls_gives_the_same_answers_with_the_kernels_stamps(
    serve: Serve, connect: Connect, encrypt: Callable[[Server], Server]
) -> None:
    byte_by_byte = [bytes([byte]) for byte in answer(STREAM)]
    server = encrypt(serve([[answer(STREAM)], byte_by_byte, [answer(b"x" * 200_000)]]))
    connection = connect(server.url)
    first, second, long = (post(connection) for _ in range(3))
    assert [one.answer.body for one in (first, second, long)] == [STREAM, STREAM, b"x" * 200_000]
    assert {number for number, _ in server.requests} == {0}  # one connection
    assert first.clock == "kernel"
    assert first.sent_ns <= next(first.events())[0] <= first.end_ns


@pytest.mark.parametrize(
    ("steps", "kind"), [([hang_up], "reset"), ([head() + chunked(FIRST)[:-5], hang_up], "truncated")]
)
def test_tls_connections_break_as_others_do(
    serve: Serve, connect: Connect, encrypt: Callable[[Server], Server], steps: Answer, kind: ErrorKind
) -> None:
    server = encrypt(serve([steps]))
    assert record_of(post(connect(server.url))).error == kind


def say_goodbye(connection: socket.socket) -> None:
    """Send TLS's own end (close_notify) and leave the socket open until the client closes it, as uvicorn does."""
    assert isinstance(connection, ssl.SSLSocket)
    connection.settimeout(20)
    with suppress(OSError):
        connection.unwrap().recv(1)


OPEN = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("steps", "error", "tokens"),
    [
        ([], "reset", None),
        ([head() + part(FIRST)], "truncated", None),
        ([head(), pause, part(FIRST), pause, part(LAST)], "truncated", 2),
        ([OPEN + FIRST + LAST], None, 2),
        ([OPEN, pause, FIRST, pause, LAST, pause], None, 2),
        ([answer(STREAM)], None, 2),
    ],
)
def test_the_end_that_tls_tells_is_one_although_the_socket_stays_open(
    serve: Serve,
    connect: Connect,
    encrypt: Callable[[Server], Server],
    steps: Answer,
    error: ErrorKind | None,
    tokens: int | None,
) -> None:
    server = encrypt(serve([[*steps, say_goodbye]], [[answer(STREAM)]]))
    connection = connect(server.url, timeout=10)
    first = post(connection)
    gevent.sleep(0.1)
    second = post(connection)
    assert first.end_ns - first.sent_ns < 5e9
    assert second.end_ns - second.sent_ns < 5e9
    records = record_of(first), record_of(second)
    assert [(record.error, record.output_tokens) for record in records] == [(error, tokens), (None, 2)]
    assert [number for number, _ in server.requests] == [0, 1]


def test_a_certificate_that_nobody_signed_is_a_connect_error(
    serve: Serve, connect: Connect, encrypt: Callable[[Server], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = encrypt(serve([[answer(STREAM)]]))
    monkeypatch.delenv("SSL_CERT_FILE")
    client._context.cache_clear()
    exchange = post(connect(server.url))
    assert exchange.error == "connect"
    assert "certificate" in str(exchange.error_detail).lower()


def test_a_tls_connection_that_was_opened_ahead_is_the_one_that_is_used(
    serve: Serve, connect: Connect, encrypt: Callable[[Server], Server]
) -> None:
    """TLS 1.3 sends tickets for later sessions right after the handshake: they wait on the idle connection."""
    server = encrypt(serve([[answer(STREAM)], [answer(STREAM)]], [[answer(STREAM)]]))
    connection = connect(server.url)
    connection.open()
    gevent.sleep(0.1)
    assert [post(connection).error for _ in range(2)] == [None, None]
    assert [number for number, _ in server.requests] == [0, 0]


def test_an_idle_tls_connection_that_the_server_closed_is_no_error(
    serve: Serve, connect: Connect, encrypt: Callable[[Server], Server]
) -> None:
    server = encrypt(serve([[answer(STREAM), hang_up]], [[answer(STREAM)]]))
    connection = connect(server.url)
    assert post(connection).error is None
    assert server.closed[0].wait(30)
    assert post(connection).error is None
    assert [number for number, _ in server.requests] == [0, 1]
