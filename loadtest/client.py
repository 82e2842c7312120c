"""One streaming HTTP/1.1 client: the loop that receives only receives and stamps; events are read afterwards.

It is written with plain sockets; inside Locust gevent makes them cooperative.
"""

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from loadtest.records import ErrorKind
from loadtest.sse import Decoder

CONNECT_SECONDS = 10.0
RECEIVE_BYTES = 64 * 1024


@dataclass
class Exchange:
    """One request and its answer: the status, the body's pieces with the stamp at which each came, and what failed."""

    sent_ns: int
    end_ns: int = 0
    status: int | None = None
    content_type: str = ""
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    complete: bool = False
    error: ErrorKind | None = None
    error_detail: str | None = None

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(piece for _, piece in self.pieces)

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Yield the data of each server-sent event with the stamp of its last byte."""
        decoder = Decoder()
        for stamp, piece in self.pieces:
            for data in decoder.feed(piece):
                yield stamp, data


class Connection:
    """A keep-alive connection to one server, opened when it is needed; `clock` gives CLOCK_MONOTONIC ns."""

    def __init__(self, url: str, timeout_seconds: float, clock: Callable[[], int] = time.monotonic_ns):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r}: expected http://HOST[:PORT] or https://HOST[:PORT]")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = parts.port or (443 if self._tls else 80)
        self._authority = parts.netloc.rpartition("@")[2]
        self._base = parts.path.rstrip("/")
        self._timeout_ns = int(timeout_seconds * 1e9)
        self._clock = clock
        self._socket: socket.socket | None = None

    def post(self, path: str, body: dict[str, Any]) -> Exchange:
        """Send JSON and receive the whole answer; never raises for what the network or the server does."""
        return self._exchange("POST", path, json.dumps(body).encode())

    def get(self, path: str) -> Exchange:
        """Fetch a path; errors as in `post`."""
        return self._exchange("GET", path, b"")

    def close(self) -> None:
        """Close the connection."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def _exchange(self, method: str, path: str, body: bytes) -> Exchange:
        deadline_ns = self._clock() + self._timeout_ns
        try:
            sock = self._connected()
        except OSError as error:
            return self._failed(Exchange(self._clock()), "connect", error)
        head = (
            f"{method} {self._base}{path} HTTP/1.1\r\nHost: {self._authority}\r\nAccept: */*\r\n"
            f"Accept-Encoding: identity\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        exchange = Exchange(sent_ns=self._clock())
        try:
            sock.sendall(head.encode() + body)
            self._receive(sock, exchange, deadline_ns)
        except TimeoutError as error:
            return self._failed(exchange, "timeout", error)
        except httptools.HttpParserError as error:
            return self._failed(exchange, "malformed", error)
        except OSError as error:
            return self._failed(exchange, "reset", error)
        exchange.end_ns = self._clock()
        return exchange

    def _receive(self, sock: socket.socket, exchange: Exchange, deadline_ns: int) -> None:
        clock = self._clock
        answer = _Answer(exchange)
        parser = answer.parser
        while not exchange.complete:
            left_ns = deadline_ns - clock()
            if left_ns <= 0:
                raise TimeoutError(f"no last token within {self._timeout_ns / 1e9:g} s")
            sock.settimeout(left_ns / 1e9)
            data = sock.recv(RECEIVE_BYTES)
            answer.stamp = clock()
            if not data:
                self.close()
                if exchange.status is None:
                    raise ConnectionResetError("the server closed the connection before it answered")
                if answer.length_known:
                    exchange.error, exchange.error_detail = "truncated", "the connection ended inside the answer"
                exchange.complete = not answer.length_known
                return
            parser.feed_data(data)
        if not answer.keep_alive:
            self.close()

    def _connected(self) -> socket.socket:
        if self._socket and self._server_hung_up(self._socket):
            self.close()
        if not self._socket:
            sock = socket.create_connection((self._host, self._port), CONNECT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = self._tls.wrap_socket(sock, server_hostname=self._host) if self._tls else sock
        self._socket.settimeout(self._timeout_ns / 1e9)
        return self._socket

    @staticmethod
    def _server_hung_up(sock: socket.socket) -> bool:
        """Whether an idle connection was closed by the server; nothing else makes it readable."""
        sock.settimeout(0)
        try:
            sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            return True
        return True

    def _failed(self, exchange: Exchange, kind: ErrorKind, error: Exception) -> Exchange:
        self.close()
        exchange.error, exchange.error_detail = kind, str(error) or type(error).__name__
        exchange.end_ns = self._clock()
        return exchange


class _Answer:
    """Callbacks of the HTTP parser; `stamp` is that of the bytes being parsed."""

    def __init__(self, exchange: Exchange):
        self.stamp = 0
        self.keep_alive = False
        self.length_known = False  # else the body ends with the connection (RFC 9112, section 6.3)
        self.parser = httptools.HttpResponseParser(self)
        self._exchange = exchange

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._exchange.content_type = value.decode("latin-1")
        self.length_known = self.length_known or name in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        # An interim answer (1xx) is not the answer.
        self._exchange.status = status if status >= 200 else None

    def on_body(self, body: bytes) -> None:
        self._exchange.pieces.append((self.stamp, body))

    def on_message_complete(self) -> None:
        self._exchange.complete = self._exchange.status is not None
        # The parser forgets it with the next line.
        self.keep_alive = self.parser.should_keep_alive()
