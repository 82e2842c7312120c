"""The monitor's HTTP API: /timeline, /metrics and /health."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from aiohttp import web
from multidict import MultiMapping
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from monitor.collector import TimelineCollector
from monitor.gpus import Gpus
from monitor.host import Host
from monitor.sampler import Sampler, Source
from monitor.timeline import STALE_NS, Timeline
from monitor.window import stream

log = logging.getLogger(__name__)

ARROW_STREAM = "application/vnd.apache.arrow.stream"
MAX_NS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Monitor:
    """What the app serves and runs while it is up."""

    timeline: Timeline
    host: Host
    gpus: Gpus
    hz: int
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def sources(self) -> list[Source]:
        """All that is sampled."""
        return [self.host.source, *self.gpus.sources()]

    def samplers(self) -> list[Sampler]:
        """All threads that sample."""
        return [*self.host.samplers, *self.gpus.samplers()]


@dataclass(frozen=True, slots=True)
class Window:
    """What /timeline is asked for: moments of CLOCK_MONOTONIC in ns."""

    since_ns: int = 0
    until_ns: int = MAX_NS
    step_ns: int | None = None


MONITOR = web.AppKey("monitor", Monitor)
COLLECTOR = web.AppKey("collector", TimelineCollector)
READER = web.AppKey("reader", ThreadPoolExecutor)


def make_app(monitor: Monitor) -> web.Application:
    """Build the app; sampling starts and ends with it."""
    app = web.Application()
    app[MONITOR] = monitor
    app[COLLECTOR] = TimelineCollector(monitor.timeline, monitor.host.source, monitor.gpus, monitor.registry)
    # One thread for all requests, so that however many come, the samplers share the interpreter with one.
    app[READER] = ThreadPoolExecutor(1, "timeline")
    # A HEAD would make all of it, for nothing.
    app.router.add_get("/timeline", timeline, allow_head=False)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    app.cleanup_ctx.append(sampling)
    return app


async def sampling(app: web.Application) -> AsyncIterator[None]:
    """Sample while the app is up."""
    monitor = app[MONITOR]
    if not monitor.host.processes.of_host:
        log.warning(
            "in a PID namespace of its own it sees only the processes in there: those of servers elsewhere are "
            "missing, and what they have of a GPU is unattributed. Start it in the host's (`pid: host`)"
        )
    for sampler in monitor.host.samplers:
        sampler.start()
    monitor.gpus.start()
    yield
    app[READER].shutdown(wait=False)
    await asyncio.gather(*(asyncio.to_thread(sampler.stop) for sampler in monitor.samplers()))


async def timeline(request: web.Request) -> web.StreamResponse:
    """Answer the rows with since_ns <= time_ns < until_ns (CLOCK_MONOTONIC) as an Arrow IPC stream.

    With step_ns, of each series and each step of that many ns only the rows of its smallest and its largest value.
    """
    window = parse_window(request.query)
    pieces = stream(request.app[MONITOR].timeline.rings, window.since_ns, window.until_ns, window.step_ns)
    response = web.StreamResponse(headers={"Content-Type": ARROW_STREAM})
    await response.prepare(request)
    loop = asyncio.get_running_loop()
    with suppress(ConnectionResetError):  # the reader has gone away
        while (piece := await loop.run_in_executor(request.app[READER], next, pieces, None)) is not None:
            await response.write(piece)
        await response.write_eof()
    return response


def parse_window(query: MultiMapping[str]) -> Window:
    """Parse a query; raises HTTPBadRequest that names the field, its value and what is allowed."""
    least = {"since_ns": 0, "until_ns": 0, "step_ns": 1}
    given: dict[str, int] = {}
    for name, value in query.items():
        if name not in least:
            raise _bad_request(name, value, "only since_ns, until_ns and step_ns")
        if len(query.getall(name)) > 1:
            raise _bad_request(name, value, "one value")
        if not (re.fullmatch("[0-9]{1,19}", value) and least[name] <= int(value) <= MAX_NS):
            raise _bad_request(name, value, f"a whole number of ns from {least[name]} to {MAX_NS}")
        given[name] = int(value)
    return Window(**given)


async def metrics(request: web.Request) -> web.Response:
    """Answer a scrape, and keep how long that took for the next."""
    started = time.perf_counter()
    _take_no_parameters(request)
    encode, content_type = choose_encoder(",".join(request.headers.getall("Accept", [])))
    # In a thread, because it takes a millisecond or more, in which other requests would wait.
    response = web.Response(
        body=await asyncio.to_thread(encode, request.app[MONITOR].registry), headers={"Content-Type": content_type}
    )
    response.enable_compression()
    request.app[COLLECTOR].scrape_seconds = time.perf_counter() - started
    return response


async def health(request: web.Request) -> web.Response:
    """Answer whether samples are being taken, of how many GPUs and of which processes; 503 when a sampler has ended."""
    _take_no_parameters(request)
    monitor = request.app[MONITOR]
    alive = all(sampler.alive() for sampler in monitor.samplers())
    report = {
        "status": "ok" if alive else "a sampler has ended",
        "gpus": len(monitor.gpus.identities()),
        "gpu_reason": monitor.gpus.reason,
        "hz": monitor.hz,
        "sources_down": [source.name for source in monitor.sources() if not source.up(time.monotonic_ns())],
        "pid_namespace": "host" if monitor.host.processes.of_host else "own",
        "series_left_out": monitor.timeline.left_out(time.monotonic_ns() - STALE_NS),
    }
    return web.json_response(report, status=200 if alive else 503)


def _take_no_parameters(request: web.Request) -> None:
    for name, value in request.query.items():
        raise _bad_request(name, value, "no parameter")


def _bad_request(name: str, value: str, allowed: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(
        text=web.json_response({"error": {"field": name, "value": value, "allowed": allowed}}).text,
        content_type="application/json",
    )
