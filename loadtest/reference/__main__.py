"""`python -m loadtest.reference`: a streaming server that keeps an exact schedule and stamps its own sends.

It shows how accurate a load generator is: what the generator reports is held against these stamps. It speaks the part
of OpenAI's API that load tests use and generates nothing. One thread, one epoll loop, one send for each chunk.
"""

import argparse
import gc
import heapq
import json
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from urllib.parse import parse_qs, urlsplit

from loadtest.reference.api import Answer, Ledger, Schedule, Sends, read_ask
from loadtest.reference.http import (
    ANCILLARY_BYTES,
    READ,
    WRITE,
    BadRequestError,
    Connection,
    HttpRequest,
    Receipt,
    Stream,
    listen,
    plain_answer,
    receipt_of,
)

MODEL = "reference"
RECEIVE_BYTES = 64 * 1024
# To be woken takes about this long, so the loop does not sleep when a piece is due sooner.
SPIN_SECONDS = 0.0003
CHAT = "/v1/chat/completions"
METHODS = {"/v1/completions": "POST", CHAT: "POST", "/v1/models": "GET", "/health": "GET", "/stamps": "GET"}


class Server:
    """The server: listens from the start, answers in `serve`. Raises OSError when the address is taken."""

    def __init__(self, host: str, port: int, schedule: Schedule, clock: Callable[[], int] = time.monotonic_ns):
        self._listener = listen(host, port)
        self.port: int = self._listener.getsockname()[1]
        self._schedule = schedule
        self._clock = clock
        self._ledger = Ledger(schedule)
        self._count = 0
        self._epoll = select.epoll()
        self._epoll.register(self._listener, READ)
        self._connections: dict[int, Connection] = {}
        # Streams before their first piece by due time, and all others in one line: they all move on by the same step,
        # so that whoever is served goes to its end and the line stays in order.
        self._starts: list[tuple[int, int, Stream]] = []
        self._line: deque[Stream] = deque()

    def serve(self) -> None:
        """Answer until interrupted."""
        while True:
            self._sleep()
            for number, events in self._epoll.poll(0):
                if number == self._listener.fileno():
                    self._accept()
                elif connection := self._connections.get(number):
                    self._handle(connection, events)
            self._send_due()

    def _sleep(self) -> None:
        """Wait for a client, or until a little before the next piece: select's timeouts are finer than epoll's 1 ms."""
        dues = [self._starts[0][0]] if self._starts else []
        if self._line:
            dues.append(self._line[0].due)
        seconds = (min(dues) - self._clock()) / 1e9 - SPIN_SECONDS if dues else None
        if seconds is None or seconds > 0:
            select.select([self._epoll], [], [], seconds)

    def _send_due(self) -> None:
        clock, line, starts, step = self._clock, self._line, self._starts, self._schedule.step_ns
        take, append = line.popleft, line.append
        while True:
            now = clock()
            limit = min(now, starts[0][0]) if starts else now
            while line and line[0].due <= limit:
                stream = take()
                piece = next(stream.pieces)
                stream.stamp(clock())
                try:
                    sent = stream.send(piece)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self._close(stream.connection)
                    continue
                if sent < len(piece):
                    stream.connection.write_later(piece[sent:])
                stream.left -= 1
                if stream.left:
                    stream.due += step
                    append(stream)
                else:
                    self._end(stream.connection)
            if not starts or starts[0][0] > now:
                return
            line.appendleft(heapq.heappop(starts)[2])

    def _end(self, connection: Connection) -> None:
        connection.stream = None
        connection.hang_up()

    def _close(self, connection: Connection) -> None:
        stream, connection.stream = connection.stream, None
        if stream:
            with suppress(ValueError):
                self._line.remove(stream)
            self._starts = [start for start in self._starts if start[2] is not stream]
            heapq.heapify(self._starts)
        del self._connections[connection.sock.fileno()]
        connection.sock.close()
        connection.reader.close()

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                self._connections[sock.fileno()] = Connection(sock, self._epoll)
                self._epoll.register(sock, READ)

    def _handle(self, connection: Connection, events: int) -> None:
        try:
            if events & WRITE:
                connection.flush()
                connection.hang_up()
            if events & ~WRITE:
                self._receive(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)

    def _receive(self, connection: Connection) -> None:
        data, ancillary, _, _ = connection.sock.recvmsg(RECEIVE_BYTES, ANCILLARY_BYTES)
        if not data:
            self._close(connection)
        if not data or connection.closing:
            return
        receipt = receipt_of(ancillary, self._clock)
        try:
            requests = connection.reader.feed(data)
        except BadRequestError as error:
            connection.refuse(error, keep_alive=False)
            requests = []
        for request in requests:
            if connection.stream:
                # No answer can be put into another; a client that wants one more opens one more connection.
                self._close(connection)
                return
            connection.closing = not request.keep_alive
            try:
                self._answer(connection, request, receipt)
            except BadRequestError as error:
                connection.refuse(error, request.keep_alive)
        connection.hang_up()

    def _answer(self, connection: Connection, request: HttpRequest, receipt: Receipt) -> None:
        url = urlsplit(request.target)
        if url.path not in METHODS:
            raise BadRequestError(404, f"{url.path}: expected one of {', '.join(METHODS)}")
        if request.method != METHODS[url.path]:
            raise BadRequestError(405, f"{request.method} {url.path}: expected {METHODS[url.path]}")
        if request.method == "POST":
            self._stream(connection, request, receipt, chat=url.path == CHAT)
        else:
            body = self._page(url.path, url.query)
            connection.write(plain_answer(200, body, request.keep_alive))

    def _stream(self, connection: Connection, request: HttpRequest, receipt: Receipt, chat: bool) -> None:
        ask = read_ask(request.body, chat)
        number, self._count = self._count, self._count + 1
        chunks = self._schedule.chunks(ask.tokens)
        request_id = request.headers.get("x-request-id", "")
        sends = Sends(number, request_id, receipt.clock, receipt.ns, ask.tokens, chunks)
        self._ledger.add(sends)
        answer = Answer(ask, number, int(time.time()), self._schedule.tokens_per_chunk, request.keep_alive)
        connection.write(answer.head)
        due = receipt.ns + self._schedule.ttft_ns
        connection.stream = Stream(connection, due, chunks, answer.pieces)
        connection.stream.stamp = sends.stamps.append
        heapq.heappush(self._starts, (due, number, connection.stream))

    def _page(self, path: str, query: str) -> bytes:
        if path == "/v1/models":
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "headroom"}
            return json.dumps({"object": "list", "data": [model]}).encode()
        if path == "/stamps":
            return self._ledger.lines(read_since(query))
        return json.dumps({"status": "ok", "streams": len(self._starts) + len(self._line)}).encode()


def read_since(query: str) -> int:
    """Read the number from which on stamps are wanted; raises BadRequestError."""
    given = parse_qs(query, keep_blank_values=True)
    if given.keys() - {"since"} or not all(text.isdecimal() for text in given.get("since", [])):
        raise BadRequestError(400, f"{query!r}: expected since=N, the number of a request")
    return int(given.get("since", ["0"])[0])


def read_arguments(arguments: Sequence[str]) -> tuple[str, int, Schedule]:
    """Read the command line: where to listen, and the schedule."""
    parser = argparse.ArgumentParser(prog="loadtest.reference", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port; 0 takes a free one, and the first line says which")
    parser.add_argument("--ttft", type=float, default=0.05, help="seconds from the request to its first token")
    parser.add_argument("--itl", type=float, default=0.02, help="seconds for each later token")
    parser.add_argument("--tokens-per-chunk", type=int, default=1, help="tokens in one server-sent event")
    given = parser.parse_args(arguments)
    try:
        schedule = Schedule.of_seconds(given.ttft, given.itl, given.tokens_per_chunk)
    except ValueError as error:
        parser.error(str(error))
    return given.host, given.port, schedule


def main() -> int:
    """Serve until interrupted; 1 when the address cannot be had."""
    host, port, schedule = read_arguments(sys.argv[1:])
    # As many connections as the system allows.
    setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    try:
        server = Server(host, port, schedule)
    except (OSError, OverflowError) as error:
        print(f"loadtest.reference: {host}:{port}: {error}", file=sys.stderr)
        return 1
    print(f"reference server on http://{host}:{server.port}", flush=True)
    # A collection would hold up all streams; what is made for a request leaves no cycles behind.
    gc.collect()
    gc.freeze()
    gc.disable()
    with suppress(KeyboardInterrupt):
        server.serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
