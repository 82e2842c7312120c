"""One process's part of a run: hands out requests in order, sends them on time and passes the records on."""

import gc
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import gevent
from gevent.event import Event
from gevent.pool import Group

from loadtest.alarm import Alarm, Precedence
from loadtest.client.connection import Connection, Exchange
from loadtest.client.receiver import Receiver, make_room_for_connections
from loadtest.client.tokens import read_answer
from loadtest.options import Options
from loadtest.outcome import error_of, make_record
from loadtest.records import ErrorKind, Phase, Record, to_bytes
from loadtest.selfcheck import SelfCheck
from loadtest.work.schedule import schedule
from loadtest.work.workloads import WORKLOADS, Request, next_turn, skipped

FLUSH_SECONDS, FLUSH_RECORDS = 0.5, 32
# From the start of a run to its first arrival, so that every process has begun by then.
START_SECONDS = 1.0
# Only the youngest objects are looked through, the older ones practically never, and fewer at a time than Python would:
# a send that is due meanwhile is late.
GC_THRESHOLDS = 100, 1_000_000, 1_000_000
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
RETRIED: tuple[ErrorKind, ...] = ("connect", "reset", "http_5xx")

Item = TypeVar("Item")

# pyarrow imports pandas, where there is one, with its first array: 0.3 s in which all requests would wait.
to_bytes([])


class Watcher(Protocol):
    """Sees a run while it goes on."""

    def begin(self, target: str) -> None:
        """A request is sent to the target."""

    def add(self, record: Record) -> None:
        """A request that was begun has ended."""

    def client(self, cpu_share: float, lag_p99: float) -> None:
        """What this process measured of itself since the last time."""


@dataclass(frozen=True)
class Share:
    """A process's part of one target's requests: every `of`-th, from the `rank`-th on."""

    rank: int = 0
    of: int = 1

    def pick(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items of this share."""
        return islice(items, self.rank, None, self.of)

    def size(self, total: int, turns: int) -> int:
        """The number of `total` requests that are in this share; the turns of a conversation stay together."""
        return sum(min(turns, total - first) for first in range(self.rank * turns, total, self.of * turns))


@dataclass(frozen=True)
class Part:
    """What one process does of a run: its share of each target's requests, none where it is not among the targets.

    All processes of a run have the same `run_id` and `start_ns`, from which arrivals are counted: CLOCK_MONOTONIC of
    the master, which is `clock_offset_ns` ahead of this process's. `models`: what to ask each target for where the
    option `model` names none.
    """

    start_ns: int
    run_id: str
    shares: dict[str, Share]
    worker: int = 0
    clock_offset_ns: int = 0
    models: dict[str, str] = field(default_factory=dict)


def whole(targets: Iterable[str]) -> Part:
    """All of a run that starts now."""
    start_ns = time.monotonic_ns() + int(START_SECONDS * 1e9)
    return Part(start_ns, os.urandom(4).hex(), {target: Share() for target in targets})


class Run:
    """What this process sends to each target, and what came back.

    Each target gets the same requests in the same order. `keep` takes batches of records, `on_end` is called when the
    last one was kept, or with the failure that ends the run: records cannot be kept (OSError), or a conversation cannot
    go on (ValueError). Raises ValueError for options that do not work here.
    """

    def __init__(
        self,
        options: Options,
        part: Part,
        keep: Callable[[bytes], None],
        on_end: Callable[[Exception | None], None],
        watcher: Watcher | None = None,
    ):
        self.options, self._part = options, part
        self._keep, self._on_end, self._watcher = keep, on_end, watcher
        shares = part.shares
        if options.min_seconds and any(share.of > 1 for share in shares.values()):
            raise ValueError(f"min_seconds: {options.min_seconds:g}: needs one process for each server, got several")
        measured_end = options.warmup + options.requests if options.requests else None
        # The index after the last measured request of each target: it moves on until `min_seconds` are over, and until
        # there is an `until_file`.
        self._measured_end = dict.fromkeys(shares, measured_end)
        # When the first of each target's measured requests that have ended was sent, and when the last one ended.
        self._measured_ns: dict[str, tuple[int, int]] = {}
        for target in shares:
            api_key(target)
        schedules = {target: schedule(options) for target in shares}
        self._requests = {t: WORKLOADS[options.workload](options, s.rank, s.of) for t, s in shares.items()}
        self._precedence = Precedence()
        awaited = options.arrival == "closed" or options.turns > 1
        self._receiver = Receiver(options.stamps, awaited=awaited, turn=self._precedence.wait)
        self._idle: defaultdict[str, list[Connection]] = defaultdict(list)
        self._in_flight = Group()
        self._handed_out: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._measuring = False
        self._planned = {
            target: None if options.total is None or options.min_seconds else share.size(options.total, options.turns)
            for target, share in shares.items()
        }
        self._pending: list[Record] = []
        self._full = Event()
        # A larger collection walks all that Locust has loaded, or all requests in flight: the loop would stand still
        # for tens of milliseconds each time. Nothing here makes cycles that grow old.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        make_room_for_connections()
        self._self_check = SelfCheck()
        self._greenlets: list[gevent.Greenlet[..., None]] = [gevent.spawn(self._flush_regularly)]
        if not any(self._planned[target] is None or self._planned[target] for target in shares):
            self._greenlets.append(gevent.spawn(self._end_if_done))
        for target, offsets in schedules.items():
            if offsets:
                self._greenlets.append(self._watched(gevent.spawn(self._dispatch, target, offsets)))

    def next_request(self, target: str) -> Request | None:
        """The next request for a target, or None when all were handed out, or others send them."""
        if target not in self._requests:
            return None
        request = next(self._requests[target], None)
        if request and self._goes_on(target, request):
            self._measured_end[target] = request.index + 1
        if request is None or self._is_past_end(target, request):
            if self._planned[target] is None and self.options.arrival == "closed":
                self._plan(target)  # the list, or the time that it goes on for, has come to its end
            return None
        total = self._end(target)
        self._handed_out[target] += request.turns if total is None else min(request.turns, total - request.index)
        return request

    def perform(self, target: str, request: Request, body: bytes = b"", scheduled_ns: int | None = None) -> None:
        """Send one request, and those that follow it in its conversation; their records are kept.

        Also when the greenlet is killed while it waits. In an open loop its `body` is made before it is due.
        """
        turn: Request | None = request
        while turn and not self._is_past_end(target, turn):
            exchange = self._send(target, turn, body or self._body(target, turn), scheduled_ns)
            # The next turn waits for the answer and for nothing else.
            body, scheduled_ns = b"", None
            try:
                turn = next_turn(self.options, turn, read_answer(exchange.events())) if turn.turns > 1 else None
            except ValueError as error:
                self._on_end(error)
                return

    def _body(self, target: str, request: Request) -> bytes:
        model = self.options.model or self._part.models[target]
        chat = self.options.endpoint == "chat"
        return json.dumps(request.chat_body(model) if chat else request.body(model)).encode()

    def _send(self, target: str, request: Request, body: bytes, scheduled_ns: int | None) -> Exchange:
        if self._phase(target, request) == "measured" and not self._measuring:
            self._measuring = True
            self._self_check.begin()
        connection = self._idle[target].pop() if self._idle[target] else self._connect(target)
        path = PATHS[self.options.endpoint]
        if self._watcher:
            self._watcher.begin(target)
        exchange = connection.post(path, body, f"{self._part.run_id}-{request.index}")
        retries, first_ns = 0, exchange.sent_ns
        while retries < self.options.retries and exchange.error != "cancelled" and error_of(exchange) in RETRIED:
            retries += 1
            exchange = connection.post(path, body, f"{self._part.run_id}-{request.index}-{retries}")
        exchange.sent_ns = first_ns
        self._idle[target].append(connection)
        try:
            if scheduled_ns is not None and request.turns == 1:
                self._precedence.wait()
        finally:  # killed meanwhile, it is a record all the same
            self._record(target, request, exchange, scheduled_ns=scheduled_ns, retries=retries)
        if exchange.error == "cancelled":
            raise gevent.GreenletExit
        return exchange

    def _record(self, target: str, request: Request, exchange: Exchange, **fields: int | None) -> None:
        key = api_key(target)
        fields |= {"worker": self._part.worker}
        record = make_record(request, exchange, secret=key, target=target, phase=self._phase(target, request), **fields)
        if record.error_detail and key:  # an error's own words may hold it too
            record = replace(record, error_detail=record.error_detail.replace(key, "***"))
        if record.phase == "measured":
            sent_ns, end_ns = self._measured_ns.get(target, (record.sent_ns, record.end_ns))
            self._measured_ns[target] = min(sent_ns, record.sent_ns), max(end_ns, record.end_ns)
        self._self_check.sent(record.late_seconds)
        self._self_check.received(record.chunk_ns, exchange.answer.pieces)
        self._append(record)

    def close(self) -> dict[str, object]:
        """End what is under way, pass on the last records; returns what this process measured of itself."""
        for greenlet in self._greenlets:
            greenlet.kill()
        self._in_flight.kill()
        self._flush()
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._receiver.close()
        return {
            "worker": self._part.worker,
            **self._self_check.finish(),
            "requests_ended": dict(self._ended),
            "skipped_lines": dict(skipped(self.options)),
        }

    def _connect(self, target: str) -> Connection:
        return connect(self.options, target, self._receiver)

    def _dispatch(self, target: str, offsets: Iterator[float]) -> None:
        """Start each request at its time, whatever has or has not come back."""
        # Before the first arrival, which it would delay.
        connection = self._connect(target)
        connection.open()
        self._idle[target].append(connection)
        with closing(Alarm()) as alarm:
            for offset in self._part.shares[target].pick(offsets):
                request = self.next_request(target)
                if request is None:
                    break
                due_ns = self._part.start_ns - self._part.clock_offset_ns + round(offset * 1e9)
                sending = self._watched(
                    gevent.Greenlet(self.perform, target, request, self._body(target, request), due_ns)
                )
                with self._precedence.of(target, due_ns):
                    alarm.wait_until(due_ns)
                    self._in_flight.start(sending)
                    gevent.sleep(0)  # now, before the next one is prepared
        self._plan(target)

    def _watched(self, greenlet: Any) -> Any:
        """What fails in a greenlet ends the run instead of leaving it without an end."""
        greenlet.link_exception(lambda failed: self._on_end(failed.exception))
        return greenlet

    def _plan(self, target: str) -> None:
        """No more requests are handed out: the run ends with the last record of those that were."""
        self._planned[target] = self._handed_out[target]
        self._end_if_done()

    def _goes_on(self, target: str, request: Request) -> bool:
        """Whether a request that would be the first of the drain is still to be measured."""
        if request.index != self._measured_end[target] or not self.options.min_seconds:
            return False
        sent_ns, end_ns = self._measured_ns.get(target, (0, 0))
        until = self.options.until_file
        return end_ns - sent_ns < self.options.min_seconds * 1e9 or bool(until and not Path(until).exists())

    def _end(self, target: str) -> int | None:
        """The index after the target's last request, as far as is known; None: there is no end."""
        measured_end = self._measured_end[target]
        return None if measured_end is None else measured_end + self.options.drain

    def _is_past_end(self, target: str, request: Request) -> bool:
        end = self._end(target)
        return end is not None and request.index >= end

    def _phase(self, target: str, request: Request) -> Phase:
        if request.index < self.options.warmup:
            return "warmup"
        measured_end = self._measured_end[target]
        return "drain" if measured_end is not None and request.index >= measured_end else "measured"

    def _append(self, record: Record) -> None:
        self._pending.append(record)
        self._ended[record.target] += 1
        if self._watcher:
            self._watcher.add(record)
        if len(self._pending) >= FLUSH_RECORDS:
            self._full.set()
        self._end_if_done()

    def _end_if_done(self) -> None:
        if all(self._ended[target] == planned for target, planned in self._planned.items()) and self._flush():
            # Here and not in `close`: Locust stands still for some 40 ms when a test is stopped.
            self._self_check.finish()
            self._on_end(None)

    def _flush(self) -> bool:
        """Pass on the records that wait; False when they cannot be kept."""
        if self._pending:
            batch, self._pending = to_bytes(self._pending, self._part.clock_offset_ns), []
            try:
                self._keep(batch)
            except OSError as error:
                self._on_end(error)
                return False
        return True

    def _flush_regularly(self) -> None:
        watched = time.monotonic()
        while True:
            self._full.wait(FLUSH_SECONDS)
            self._full.clear()
            self._precedence.wait()
            self._flush()
            if self._watcher and time.monotonic() >= watched + FLUSH_SECONDS:
                watched = time.monotonic()
                self._watcher.client(*self._self_check.recent())


def api_key(target: str) -> str:
    """Key of a server, from the environment and nowhere else; empty: it needs none.

    Raises ValueError, which does not show it, for one with a line break or another control character inside.
    """
    name = f"HEADROOM_{target.upper()}_API_KEY"
    key = os.environ.get(name, "").strip()
    if not key.isprintable():
        raise ValueError(f"{name}: holds a line break or another control character; expected a key on one line")
    return key


def connect(options: Options, target: str, receiver: Receiver) -> Connection:
    """Make a connection to a server, which opens when it is needed."""
    headers = {"Authorization": f"Bearer {key}"} if (key := api_key(target)) else {}
    url = getattr(options, f"{target}_url")
    return Connection(url, receiver, options.timeout, options.token_timeout, headers)
