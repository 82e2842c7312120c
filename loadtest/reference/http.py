"""HTTP/1.1 for the reference server: requests from bytes cut anywhere, times of receipt, sends that never block."""

import json
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import httptools

MAX_BODY_BYTES, MAX_HEAD_BYTES = 16 * 2**20, 64 * 2**10
READ, WRITE = select.EPOLLIN, select.EPOLLOUT
# Linux's SO_TIMESTAMPNS and SCM_TIMESTAMPNS, which Python does not name: a struct timespec comes with what is received.
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("@qq")
ANCILLARY_BYTES = socket.CMSG_SPACE(TIMESPEC.size)
BACKLOG = 4096
OLDEST_STAMP_NS = 60 * 10**9
# How far apart the two clocks may be read, and how often that is tried.
OFFSET_NS, OFFSET_TRIES = 20_000, 5


class BadRequestError(ValueError):
    """Bytes that are no HTTP request, or too many; `status` is what to answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class HttpRequest:
    """One request as it came; header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool


class RequestReader:
    """Collects bytes, cut at any place, into requests; raises BadRequestError for what is no HTTP or too large."""

    def __init__(self) -> None:
        self._parts = _Parts()

    def feed(self, data: bytes) -> list[HttpRequest]:
        """Take bytes; returns the requests that they complete."""
        parts = self._parts
        try:
            parts.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise BadRequestError(400, "Upgrade: nothing but HTTP/1.1 is spoken here") from None
        except httptools.HttpParserError as error:
            raise BadRequestError(400, f"no HTTP request: {error}") from None
        if parts.head_bytes > MAX_HEAD_BYTES:
            raise BadRequestError(431, f"a head of {parts.head_bytes} bytes or more: at most {MAX_HEAD_BYTES} are read")
        if parts.body_bytes > MAX_BODY_BYTES:
            raise BadRequestError(413, f"a body of {parts.body_bytes} bytes or more: at most {MAX_BODY_BYTES} are read")
        complete, parts.complete = parts.complete, []
        return complete

    def close(self) -> None:
        """Let go of the parser: it and its callbacks hold each other, and the server collects no garbage."""
        del self._parts.parser


class _Parts:
    """Callbacks of the HTTP parser."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.complete: list[HttpRequest] = []
        self.on_message_begin()

    def on_message_begin(self) -> None:
        self._target, self._headers, self._body = b"", dict[str, str](), list[bytes]()
        self.head_bytes = self.body_bytes = 0

    def on_url(self, piece: bytes) -> None:
        self._target += piece
        self.head_bytes += len(piece)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        self.head_bytes += len(name) + len(value)

    def on_body(self, piece: bytes) -> None:
        self.body_bytes += len(piece)
        if self.body_bytes <= MAX_BODY_BYTES:
            self._body.append(piece)

    def on_message_complete(self) -> None:
        method, keep_alive = self.parser.get_method().decode(), self.parser.should_keep_alive()
        target, body = self._target.decode("latin-1"), b"".join(self._body)
        self.complete.append(HttpRequest(method, target, self._headers, body, keep_alive))


@dataclass(frozen=True)
class Receipt:
    """When bytes came (CLOCK_MONOTONIC, ns), and whether the kernel said so or the clock after they were read."""

    ns: int
    clock: Literal["kernel", "user"]


def listen(host: str, port: int) -> socket.socket:
    """Listen, with kernel stamps for all connections, which inherit them; raises OSError when the address is taken.

    The kernel begins to stamp a little after the first socket asks, and stops with the last: one that stays keeps it at
    it, so that the first request on a connection is stamped too.
    """
    listener = socket.create_server((host, port), backlog=BACKLOG)
    listener.setblocking(False)
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return listener


def receipt_of(ancillary: Iterable[tuple[int, int, bytes]], clock: Callable[[], int]) -> Receipt:
    """Read the kernel's stamp, which is CLOCK_REALTIME, and convert it with the offset of this moment."""
    now, now_real = clock(), time.time_ns()
    for _ in range(OFFSET_TRIES):
        if clock() - now < OFFSET_NS:
            break
        # Something else had the core in between; the offset would be off by as much.
        now, now_real = clock(), time.time_ns()
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS) and len(data) == TIMESPEC.size:
            seconds, rest = TIMESPEC.unpack(data)
            age = now_real - (seconds * 10**9 + rest)
            # Where the clock was set in between, the stamp says nothing.
            if 0 <= age < OLDEST_STAMP_NS:
                return Receipt(now - age, "kernel")
    return Receipt(now, "user")


def plain_answer(status: int, body: bytes, keep_alive: bool, kind: str = "application/json") -> bytes:
    """An answer with a known length."""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    )
    return head.encode() + body


def error_answer(status: int, message: str, keep_alive: bool) -> bytes:
    """An error in the form that OpenAI's API gives it."""
    error = {"message": message, "type": HTTPStatus(status).phrase, "code": status}
    return plain_answer(status, json.dumps({"error": error}).encode(), keep_alive)


class Stream:
    """An answer under way; `due` is when its next piece is to be sent, and `left` how many pieces there are still."""

    __slots__ = ("connection", "due", "left", "pieces", "send", "stamp")

    def __init__(self, connection: "Connection", due: int, left: int, pieces: Iterator[bytes]):
        self.connection = connection
        self.due = due
        self.left = left
        self.pieces = pieces
        self.send = connection.send
        self.stamp: Callable[[int], None]


class Connection:
    """A client's socket, what it has sent so far, and what it has not taken yet."""

    def __init__(self, sock: socket.socket, epoll: select.epoll):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.reader = RequestReader()
        self.stream: Stream | None = None
        self.closing = False
        self._waiting = bytearray()
        self._epoll = epoll
        self.send: Callable[[bytes], int] = sock.send

    def write(self, data: bytes) -> None:
        """Send, or keep what the client does not take yet; raises OSError when it has gone."""
        try:
            sent = self.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.write_later(data[sent:])

    def write_later(self, data: bytes) -> None:
        """Keep what the client does not take now; all that follows waits behind it."""
        self._waiting += data
        self._epoll.modify(self.sock, READ | WRITE)
        self._use(self._hold)

    def refuse(self, error: BadRequestError, keep_alive: bool) -> None:
        """Answer with an error."""
        self.closing = not keep_alive
        self.write(error_answer(error.status, str(error), keep_alive))

    def flush(self) -> None:
        """Send more of what waits; raises OSError when the client has gone."""
        with suppress(BlockingIOError):
            del self._waiting[: self.sock.send(self._waiting)]
        if not self._waiting:
            self._epoll.modify(self.sock, READ)
            self._use(self.sock.send)

    def hang_up(self) -> None:
        """End a connection that is to be closed once all is sent: the client closes it, so that nothing is lost."""
        if self.closing and not self._waiting and self.stream is None:
            self.sock.shutdown(socket.SHUT_WR)

    def _hold(self, data: bytes) -> int:
        self._waiting += data
        return len(data)

    def _use(self, send: Callable[[bytes], int]) -> None:
        self.send = send
        if self.stream:
            self.stream.send = send
