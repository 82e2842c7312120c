"""A server on a real socket that sends what a script says, and what the tests of the client share."""

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from loadtest.client.connection import Connection, Exchange
from loadtest.outcome import make_record
from loadtest.records import Record
from loadtest.work.workloads import Request

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


def event(tokens: int, finish: str | None = None) -> bytes:
    """The event of one more token, with how many there are by now."""
    choice = {"text": "x", "finish_reason": finish}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    return b"data: " + json.dumps({"choices": [choice], "usage": usage}).encode() + b"\n\n"


def part(*pieces: bytes) -> bytes:
    """The beginning of a chunked body."""
    return chunked(*pieces).removesuffix(b"0\r\n\r\n")


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def pause(_: socket.socket) -> None:
    """Let the client read what was sent before more comes."""
    time.sleep(0.05)


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
    tls: ssl.SSLContext | None = None

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
            with suppress(ssl.SSLError, BrokenPipeError), self._encrypted(connection) as connection:
                self._answer(number, connection, answers)
            self.closed[number].set()

    def _encrypted(self, connection: socket.socket) -> socket.socket:
        return self.tls.wrap_socket(connection, server_side=True) if self.tls else connection

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


Serve = Callable[..., Server]
Connect = Callable[..., Connection]


def post(connection: Connection) -> Exchange:
    return connection.post("/v1/completions", json.dumps(REQUEST.body("m")).encode())


def record_of(exchange: Exchange) -> Record:
    return make_record(REQUEST, exchange, target="hf", phase="measured")
