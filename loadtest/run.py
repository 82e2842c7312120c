"""One run: hands out requests in order, sends them, keeps the records and watches the client itself."""

import gc
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gevent

from loadtest.client import Connection, Exchange
from loadtest.options import Options
from loadtest.records import Phase, Record, RecordWriter
from loadtest.tokens import read_stream
from loadtest.workloads import WORKLOADS, Request

LAG_PROBE_SECONDS = 0.005


class Run:
    """The state that all users of one run share.

    Each target gets the same requests in the same order. `on_end` is called when the last one has ended, or with the
    failure when records cannot be kept. Raises OSError when the records' file cannot be made.
    """

    def __init__(self, options: Options, targets: list[str], on_end: Callable[[Exception | None], None]):
        self.options = options
        self.path = Path(options.records) if options.records else _default_path()
        self._requests: dict[str, Iterator[Request]] = {t: WORKLOADS[options.workload](options) for t in targets}
        self._total = options.warmup + options.requests + options.drain if options.requests else None
        self._ended: Counter[str] = Counter()
        self._on_end = on_end
        self._writer = RecordWriter(self.path)
        # A full collection walks all that Locust has loaded: the loop would stand still for 20 to 30 ms each time.
        gc.collect()
        gc.freeze()
        self._self_check = SelfCheck()

    def next_request(self, target: str) -> Request | None:
        """The next request for a target, or None when all were handed out."""
        request = next(self._requests[target])
        if request.index == self.options.warmup:
            self._self_check.begin()
        return request if self._total is None or request.index < self._total else None

    def perform(self, target: str, request: Request, connection: Connection, model: str) -> Record:
        """Send one request and keep its record, also when the user is killed while it waits."""
        exchange = Exchange(sent_ns=time.monotonic_ns())
        try:
            exchange = connection.post("/v1/completions", request.body(model))
        except gevent.GreenletExit:
            exchange.error, exchange.error_detail, exchange.end_ns = "cancelled", "the run ended", time.monotonic_ns()
            self._keep(make_record(target, request, exchange, self._phase(request)))
            raise
        record = make_record(target, request, exchange, self._phase(request))
        self._keep(record)
        return record

    def close(self) -> None:
        """Close the records and write what the client measured of itself next to them."""
        self._writer.close()
        summary = self._self_check.finish() | {"requests_ended": dict(self._ended)}
        self.path.with_name("client.json").write_text(json.dumps(summary, indent=2) + "\n")

    def _phase(self, request: Request) -> Phase:
        if request.index < self.options.warmup:
            return "warmup"
        measured_end = self.options.warmup + self.options.requests
        return "drain" if self.options.requests and request.index >= measured_end else "measured"

    def _keep(self, record: Record) -> None:
        try:
            self._writer.append(record)
        except OSError as error:
            self._on_end(error)
            return
        self._ended[record.target] += 1
        if self._total is not None and all(self._ended[target] == self._total for target in self._requests):
            self._on_end(None)


def make_record(target: str, request: Request, exchange: Exchange, phase: Phase) -> Record:
    """Turn what came back into a record."""
    fields: dict[str, Any] = {
        "index": request.index,
        "target": target,
        "phase": phase,
        "max_tokens": request.max_tokens,
        "sent_ns": exchange.sent_ns,
        "end_ns": exchange.end_ns,
        "status": exchange.status,
    }
    error, detail = exchange.error, exchange.error_detail
    if exchange.status and exchange.status >= 400:
        error = "http_4xx" if exchange.status < 500 else "http_5xx"
        detail = exchange.body[:500].decode(errors="replace")
    elif not error and not exchange.content_type.startswith("text/event-stream"):
        error = "malformed"
        detail = f"expected an event stream, got {exchange.content_type!r}: {exchange.body[:200]!r}"
    if error and not exchange.pieces:
        return Record(**fields, error=error, error_detail=detail)
    try:
        output = read_stream(exchange.events(), request.max_tokens)
    except ValueError as problem:
        return Record(**fields, error="malformed", error_detail=str(problem))
    if error:
        output.error, output.error_detail = error, detail
    return Record(**fields, **vars(output))


def go_first() -> bool:
    """Ask Linux to run this thread before others; False where it may not (root or CAP_SYS_NICE may).

    vLLM's processes spin with sched_yield while they wait for each other. With few cores that delays a normal client by
    hundreds of milliseconds, which would be reported as the server's latency.
    """
    if not hasattr(os, "sched_setscheduler"):
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        return False
    return True


class SelfCheck:
    """Measures the client's own CPU share and the lag of its event loop, from the first measured request on."""

    def __init__(self) -> None:
        self._goes_first = go_first()
        self._probe = gevent.spawn(self._watch)
        self.begin()

    def begin(self) -> None:
        """Forget what was measured so far: the warm-up."""
        self._lags: list[float] = []
        self._started = time.monotonic()
        self._cpu = time.process_time()

    def _watch(self) -> None:
        due = time.monotonic()
        while True:
            due += LAG_PROBE_SECONDS
            gevent.sleep(max(0.0, due - time.monotonic()))
            # One lag for each time that a stall has missed, so that a long one counts for as long as it was.
            while (now := time.monotonic()) >= due:
                self._lags.append(now - due)
                due += LAG_PROBE_SECONDS
            due -= LAG_PROBE_SECONDS

    def finish(self) -> dict[str, object]:
        """CPU share of this process (0..1 of a core) and the loop's lag in seconds, at p50, p99 and most."""
        self._probe.kill()
        wall = time.monotonic() - self._started
        lags = sorted(self._lags) or [0.0]
        return {
            "pid": os.getpid(),
            "wall_seconds": wall,
            "goes_first": self._goes_first,
            "cpu_share": (time.process_time() - self._cpu) / wall,
            "loop_lag_p50_seconds": lags[len(lags) // 2],
            "loop_lag_p99_seconds": lags[int(len(lags) * 0.99)],
            "loop_lag_max_seconds": lags[-1],
        }


def _default_path() -> Path:
    return Path("results") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-locust" / "records.jsonl"
