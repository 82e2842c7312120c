"""One streaming HTTP/1.1 client, made of gevent's sockets: what it receives is stamped first and read afterwards."""

import errno
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.socket
from gevent import monkey

from loadtest.client.http import Answer, TruncatedError
from loadtest.client.receiver import Clock, Receiver, Stream
from loadtest.client.sse import read_pieces
from loadtest.client.tls import CHUNK_BYTES, Tls, send
from loadtest.records import ErrorKind

CONNECT_SECONDS = 10.0
# Not the one that waits cooperatively: the receiver reads all sockets itself.
PlainSocket: type[gevent.socket.socket] = monkey.get_original("socket", "socket")


@dataclass
class Exchange:
    """One request and its answer: when (ns), by which clock the answer's pieces were stamped, and what failed."""

    sent_ns: int
    end_ns: int = 0
    answer: Answer = field(default_factory=Answer)
    clock: Clock = "user"
    error: ErrorKind | None = None
    error_detail: str | None = None

    @property
    def status(self) -> int | None:
        """Status of the answer."""
        return self.answer.status

    def events(self) -> Iterator[tuple[int, bytes]]:
        """The data of each server-sent event with the stamp of its last byte."""
        return read_pieces(self.answer.pieces)

    def fail(self, kind: ErrorKind, detail: object) -> None:
        """Say what failed."""
        self.error, self.error_detail = kind, str(detail) or type(detail).__name__


class Connection:
    """A keep-alive connection to one server, opened when it is needed.

    A request fails with `timeout` when its last byte has not come after `timeout_seconds`, or when no data has come for
    `token_timeout_seconds` (0: no such limit); comments are no data. Raises ValueError for a URL that names no server.
    """

    def __init__(
        self,
        url: str,
        receiver: Receiver,
        timeout_seconds: float,
        token_timeout_seconds: float = 0,
        headers: Mapping[str, str] | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r}: expected http://HOST[:PORT] or https://HOST[:PORT]")
        self._context = _context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = parts.port or (443 if self._context else 80)
        self._base = parts.path.rstrip("/")
        self._timeout_ns = int(timeout_seconds * 1e9)
        self._patience_ns = int(token_timeout_seconds * 1e9)
        self._receiver = receiver
        fixed = {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*", "Accept-Encoding": "identity"}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {**fixed, **(headers or {})}.items())
        self._socket: gevent.socket.socket | None = None
        self._tls: Tls | None = None

    def post(self, path: str, body: bytes, request_id: str = "") -> Exchange:
        """Send JSON and receive the whole answer; never raises: what the network or the server does is in the answer.

        The error kind is `cancelled` when the greenlet is killed meanwhile.
        """
        more = f"X-Request-Id: {request_id}\r\n" if request_id else ""
        return self._exchange("POST", path, body, more)

    def get(self, path: str) -> Exchange:
        """Fetch a path; errors as in `post`."""
        return self._exchange("GET", path, b"", "")

    def open(self) -> None:
        """Connect now, so that the first request need not wait for it; when it fails that request will show why."""
        try:
            self._connected()
        except (OSError, UnicodeError):
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._socket:
            self._socket.close()
            self._socket = self._tls = None

    def _exchange(self, method: str, path: str, body: bytes, more: str) -> Exchange:
        clock = self._receiver.clock
        begun_ns = clock()
        head = (
            f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}{more}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        exchange = Exchange(begun_ns)
        try:
            sock = self._connected()
            exchange.sent_ns = clock()
            deadline_ns = begun_ns + self._timeout_ns
            stream = Stream(sock, exchange.answer, deadline_ns, self._patience_ns, exchange.sent_ns, self._tls)
            try:
                self._send_and_receive(stream, head.encode() + body)
            finally:  # also when the wait is given up
                exchange.clock = stream.clock
            if stream.failure:
                exchange.fail(_kind(stream.failure), stream.failure)
        except (OSError, UnicodeError) as error:  # a host's name may be none
            exchange.fail("connect", error)
        except gevent.GreenletExit:
            exchange.fail("cancelled", "the run ended")
        exchange.end_ns = clock()
        exchange.answer.close()
        if exchange.error or not exchange.answer.keep_alive:
            self.close()
        return exchange

    def _send_and_receive(self, stream: Stream, request: bytes) -> None:
        try:
            data = stream.tls.encrypt(request) if stream.tls else request
            send(stream.sock, data, self._timeout_ns / 1e9)
        except ConnectionError:
            pass  # a server may answer, and hang up, before it has read a long request: see what it says
        except OSError as error:
            stream.failure = error
            return
        self._receiver.receive(stream)

    def _connected(self) -> gevent.socket.socket:
        if self._socket and _hung_up(self._socket, self._tls):
            self.close()
        if not self._socket:
            try:
                self._socket = _connect(_addresses(self._host, self._port))
            except OSError:
                _addresses.cache_clear()  # a server that comes back may have another
                raise
            self._receiver.prepare(self._socket)
            if self._context:
                self._tls = Tls(self._context, self._host)
                self._tls.handshake(self._socket, CONNECT_SECONDS)
        return self._socket


@cache
def _context() -> ssl.SSLContext:
    """Made once: it reads all certificates that the system trusts."""
    return ssl.create_default_context()


@cache
def _addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """Look a server up, once: by far the dearest part of connecting."""
    return gevent.socket.getaddrinfo(host, port, type=gevent.socket.SOCK_STREAM)


def _connect(addresses: list[tuple[Any, ...]]) -> gevent.socket.socket:
    """Connect to the first address that answers; raises OSError."""
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        sock = PlainSocket(family, kind, protocol)
        sock.setblocking(False)
        sock.setsockopt(gevent.socket.IPPROTO_TCP, gevent.socket.TCP_NODELAY, 1)
        try:
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                gevent.socket.wait_write(sock.fileno(), CONNECT_SECONDS, TimeoutError("no connection in time"))
                code = sock.getsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_ERROR)
            if not code:
                return sock
            failure = OSError(code, os.strerror(code))
        except OSError as error:
            failure = error
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise failure


def _hung_up(sock: gevent.socket.socket, tls: Tls | None) -> bool:
    """Whether an idle connection was closed by the server; all that TLS may send on one is tickets for later ones."""
    if tls and tls.ended:
        return True
    try:
        while data := sock.recv(CHUNK_BYTES):
            if not tls or tls.decrypt(data) or tls.ended:
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _kind(failure: Exception) -> ErrorKind:
    if isinstance(failure, TimeoutError):
        return "timeout"
    if isinstance(failure, TruncatedError):
        return "truncated"
    return "reset" if isinstance(failure, OSError) else "malformed"
