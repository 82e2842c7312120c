"""Receives the answers of all connections of a process: it only receives and stamps; reading them is done later.

One greenlet waits for all sockets at once (epoll). Linux stamps the data of a TCP segment when it arrives, so stamps
stay right when this process is late; elsewhere the stamp is that of the reading.
"""

import os
import resource
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import gevent
from gevent import monkey
from gevent.event import Event

from loadtest.client.http import Answer
from loadtest.client.sse import holds_data, holds_several, is_done
from loadtest.client.tls import Tls

Clock = Literal["kernel", "user"]
Stamps = Literal["auto", "kernel", "user"]

RECEIVE_BYTES = 16 * 1024
# The number of SO_TIMESTAMPNS, which the socket module lacks: asm-generic/socket.h, as on x86-64 and arm64.
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("@ll")
ANCILLARY_BYTES = socket.CMSG_SPACE(TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0
# gevent takes it away from programs, because it blocks; here it is only asked for what is there.
Epoll = monkey.get_original("select", "epoll")
# While that many answers stream, data is left to gather for this long: it is stamped already, and each waking up costs
# as much as the reading of several segments. Where nobody waits for an answer's end it may be longer, until events of
# an answer come so fast that more than a share of the readings hold several, which then have one stamp.
GATHER_STREAMS, GATHER_SECONDS, LONG_GATHER_SECONDS = 64, 0.001, 0.005
JUDGED_READINGS, SEVERAL_SHARE = 256, 0.01
# How long until every stream has been looked at for being late. With thousands a look at all takes a millisecond, in
# which nothing is sent: while data gathers each gathering looks at some, and a long one makes it 0.25 s.
SWEEP_SECONDS = 0.05
GATHERINGS_A_SWEEP = round(SWEEP_SECONDS / GATHER_SECONDS)
# How long a body may stay open after [DONE]: the connection of one that ends is of use for the next request.
DONE_NS = 500_000_000
# A wall clock that moved by more between two readings was set.
CLOCK_WAS_SET_NS = 1_000_000
# Clocks that are read within this time are read at once.
TOGETHER_NS = 20_000


@dataclass(slots=True, eq=False)
class Stream:
    """An answer that is being received; `done` is set at its end, `failure` says why it is not whole.

    It is whole with its last byte, or when its stream says so and the body stays open for a moment. It fails at
    `deadline_ns`, or when no data has come for `patience_ns` (0: no such limit): what keeps a connection alive, such as
    a comment, is none. `alive_ns` is when the last was seen to come, or the request was sent.
    """

    sock: socket.socket
    answer: Answer
    deadline_ns: int
    patience_ns: int
    alive_ns: int
    tls: Tls | None = None
    clock: Clock = "kernel"
    failure: Exception | None = None
    done: Event = field(default_factory=Event)


class Receiver:
    """Receives for all connections of a process; `clock` gives CLOCK_MONOTONIC ns.

    `stamps` says where the time of a piece of data comes from: the kernel, this process, or auto: the kernel where it
    can. `awaited`: something goes on as soon as an answer has ended. `turn` waits until data that has gathered may be
    received. Raises ValueError when the kernel is asked for and cannot.
    """

    def __init__(
        self,
        stamps: Stamps = "auto",
        clock: Callable[[], int] = time.monotonic_ns,
        awaited: bool = True,
        turn: Callable[[], None] = lambda: None,
    ):
        if stamps == "kernel" and not kernel_stamps():
            raise ValueError("stamps: 'kernel': this system does not stamp received data; use auto or user")
        self.clock = clock
        self.kernel = stamps != "user" and kernel_stamps()
        self._streams: dict[int, Stream] = {}
        self._epoll = Epoll()
        self._wall_offset_ns = time.time_ns() - clock()
        # The kernel begins to stamp when the first socket asks for it: not in the middle of a first answer.
        self._first = _stamped(socket.socket()) if self.kernel else None
        # Their callbacks run in gevent's loop itself: no switch to a greenlet for each piece of data.
        loop = gevent.get_hub().loop
        self._readable = loop.io(self._epoll.fileno(), 1)
        self._short, self._long = (loop.timer(each, each) for each in (GATHER_SECONDS, LONG_GATHER_SECONDS))
        self._gather = self._short if awaited else self._long
        self._sweep = loop.timer(SWEEP_SECONDS, SWEEP_SECONDS)
        self._wait: Any = None  # the one of these that is on and receives
        self._turn = turn
        self._taker: gevent.Greenlet[..., None] | None = None
        self._readings = self._several = 0
        self._unswept: list[Stream] = []

    @property
    def gather_seconds(self) -> float:
        """How long data is left to gather while many answers stream."""
        return GATHER_SECONDS if self._gather is self._short else LONG_GATHER_SECONDS

    def prepare(self, sock: socket.socket) -> None:
        """Make a connected socket ready: not blocking, stamped."""
        sock.setblocking(False)
        if self.kernel:
            _stamped(sock)

    def receive(self, stream: Stream) -> None:
        """Wait for the end of a stream; its answer is whole then, or it has a failure."""
        descriptor = stream.sock.fileno()
        self._streams[descriptor] = stream
        self._epoll.register(descriptor, select.EPOLLIN)
        self._choose_wait()
        try:
            stream.done.wait()
        finally:
            if not stream.done.is_set():  # the wait was given up
                self._forget(stream)

    def close(self) -> None:
        """Give back what the system lent; no stream may be left."""
        if self._taker:
            self._taker.kill()
        for watcher in (self._readable, self._short, self._long, self._sweep):
            watcher.stop()
            watcher.close()
        self._epoll.close()
        if self._first:
            self._first.close()

    def _choose_wait(self) -> None:
        """Wait for the next piece of data, or for some to gather, or not at all."""
        number = len(self._streams)
        wait = None if not number else self._gather if self.kernel and number >= GATHER_STREAMS else self._readable
        if wait is self._wait:
            return
        if self._wait:
            self._wait.stop()
            self._sweep.stop()
            self._unswept.clear()
        if wait is self._gather:
            wait.start(self._take_turn)
        elif wait:
            wait.start(self._receive_all)
            self._sweep.start(self._end_late)
        self._wait = wait

    def _take_turn(self) -> None:
        if not self._taker:
            self._taker = gevent.spawn(self._receive_in_turn)

    def _receive_in_turn(self) -> None:
        try:
            self._turn()
            if self._wait is self._gather:
                self._receive_gathered()
        finally:
            self._taker = None

    def _receive_gathered(self) -> None:
        self._receive_all()
        if self._readings >= JUDGED_READINGS:
            if self._several > SEVERAL_SHARE * self._readings:
                self._gather = self._short
                self._choose_wait()
            self._readings = self._several = 0
        if not self._unswept:
            self._unswept = list(self._streams.values())
        size = 1 + len(self._streams) // GATHERINGS_A_SWEEP
        some = self._unswept[-size:]
        del self._unswept[-size:]
        # Those that have ended since are not looked at.
        self._end_late([stream for stream in some if self._streams.get(stream.sock.fileno()) is stream])

    def _receive_all(self) -> None:
        streams, offset_ns = self._streams, self._wall_offset()
        ready = self._epoll.poll(0)
        self._readings += len(ready)
        for descriptor, _ in ready:
            stream = streams[descriptor]
            try:
                data, ancillary, _, _ = stream.sock.recvmsg(RECEIVE_BYTES, ANCILLARY_BYTES)
                if ancillary and offset_ns is not None:
                    seconds, ns = TIMESPEC.unpack(ancillary[0][2])
                    stamp_ns = seconds * 1_000_000_000 + ns - offset_ns
                else:
                    stamp_ns, stream.clock = self.clock(), "user"
                if stream.tls and data:
                    data = stream.tls.decrypt(data)
                    if stream.tls.ended:
                        stream.answer.take(stamp_ns, data)
                        data = b""
                    elif not data:
                        continue
                self._several += holds_several(data)
                if data and not stream.answer.take(stamp_ns, data):
                    continue
                if not _is_whole(stream, stamp_ns, data):
                    continue
            except BlockingIOError:
                continue
            except (OSError, ValueError) as error:
                stream.failure = error.with_traceback(None)  # which would refer to the stream
            self._forget(stream)
            stream.done.set()

    def _wall_offset(self) -> int | None:
        """Wall time, which the kernel's stamps are, less our clock (ns); None without them or if it was just set."""
        if not self.kernel:
            return None
        before_ns, wall_ns, after_ns = self.clock(), time.time_ns(), self.clock()
        if after_ns - before_ns > TOGETHER_NS:
            return self._wall_offset_ns  # something came in between: it is not known better than before
        offset_ns = wall_ns - (before_ns + after_ns) // 2
        was_set = abs(offset_ns - self._wall_offset_ns) > CLOCK_WAS_SET_NS
        self._wall_offset_ns = offset_ns
        return None if was_set else offset_ns

    def _end_late(self, some: list[Stream] | None = None) -> None:
        """End the streams whose time is up, of some or of all."""
        now_ns = self.clock()
        for stream in list(self._streams.values()) if some is None else some:
            if _is_over(stream, now_ns):
                self._forget(stream)
                stream.done.set()

    def _forget(self, stream: Stream) -> None:
        descriptor = stream.sock.fileno()
        del self._streams[descriptor]
        self._epoll.unregister(descriptor)
        self._choose_wait()


def _is_whole(stream: Stream, stamp_ns: int, data: bytes) -> bool:
    """Read what was taken of an answer, up to `data`; answers whether it has ended. Raises as `Answer` does."""
    answer = stream.answer
    if not data:
        answer.end()
        return True
    answer.read()
    if not answer.complete and b"[DONE]" in data and is_done(answer.body):
        stream.deadline_ns = min(stream.deadline_ns, stamp_ns + DONE_NS)
    return answer.complete


def _is_over(stream: Stream, now_ns: int) -> bool:
    """Whether a stream ends before its last byte, with its `failure`; looks for data only when its time is up."""
    late = now_ns >= stream.deadline_ns
    if not late and (not stream.patience_ns or now_ns - stream.alive_ns < stream.patience_ns):
        return False
    try:
        stream.answer.read()
    except (OSError, ValueError) as error:
        stream.failure = error.with_traceback(None)
        return True
    if is_done(stream.answer.body):
        return True
    if late:
        stream.failure = TimeoutError("no last token until the deadline")
        return True
    since = (stamp for stamp, piece in reversed(stream.answer.pieces) if stamp <= stream.alive_ns or holds_data(piece))
    stream.alive_ns = max(stream.alive_ns, next(since, 0))
    if now_ns - stream.alive_ns < stream.patience_ns:
        return False
    stream.failure = TimeoutError(f"no data came for {stream.patience_ns / 1e9:g} s")
    return True


def make_room_for_connections(most: int = 65_536) -> None:
    """Have Linux make its table of open files as large as it may become.

    It grows by doubling, and each time a process with several threads stands still for some 20 ms.
    """
    highest = min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - 1
    with socket.socket() as any_file:
        os.close(os.dup2(any_file.fileno(), highest))


def kernel_stamps() -> bool:
    """Tell whether this system stamps received data."""
    try:
        with socket.socket() as sock:
            _stamped(sock)
    except OSError:
        return False
    return bool(ANCILLARY_BYTES) and time.get_clock_info("time").resolution <= 1e-6


def _stamped(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return sock
