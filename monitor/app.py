"""The monitor's HTTP API: /timeline, /metrics and /health."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from aiohttp import web
from multidict import MultiMapping
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from monitor.nvml import Devices
from monitor.sampler import Sampler
from monitor.timeline import Timeline

ARROW_STREAM = "application/vnd.apache.arrow.stream"
MAX_NS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Monitor:
    """What the app serves, and the samplers that it runs while it is up."""

    timeline: Timeline
    samplers: Sequence[Sampler]
    devices: Devices
    registry: CollectorRegistry
    hz: int


MONITOR = web.AppKey("monitor", Monitor)


def make_app(monitor: Monitor) -> web.Application:
    """Build the app; sampling starts and ends with it."""
    app = web.Application()
    app[MONITOR] = monitor
    app.router.add_get("/timeline", timeline)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", make_aiohttp_handler(monitor.registry))
    app.cleanup_ctx.append(sampling)
    return app


async def sampling(app: web.Application) -> AsyncIterator[None]:
    """Sample while the app is up."""
    samplers = app[MONITOR].samplers
    for sampler in samplers:
        sampler.start()
    yield
    await asyncio.gather(*(asyncio.to_thread(sampler.stop) for sampler in samplers))


async def timeline(request: web.Request) -> web.Response:
    """Answer the rows with since_ns <= time_ns < until_ns (CLOCK_MONOTONIC) as an Arrow IPC stream."""
    since_ns, until_ns = window(request.query)
    # In a thread, because a full timeline has hundreds of thousands of rows.
    body = await asyncio.to_thread(_arrow_stream, request.app[MONITOR].timeline, since_ns, until_ns)
    return web.Response(body=body, content_type=ARROW_STREAM)


def window(query: MultiMapping[str]) -> tuple[int, int]:
    """Parse since_ns and until_ns; raises HTTPBadRequest that names the field, its value and what is allowed."""
    bounds = {"since_ns": 0, "until_ns": MAX_NS}
    for field, value in query.items():
        if field not in bounds:
            raise _bad_request(field, value, f"only {' and '.join(bounds)}")
        if len(query.getall(field)) > 1:
            raise _bad_request(field, value, "one value")
        if not (re.fullmatch("[0-9]{1,19}", value) and int(value) <= MAX_NS):
            raise _bad_request(field, value, f"a whole number of ns from 0 to {MAX_NS}")
        bounds[field] = int(value)
    return bounds["since_ns"], bounds["until_ns"]


async def health(request: web.Request) -> web.Response:
    """Answer whether samples are being taken, and of how many GPUs; 503 when a sampler has ended."""
    for field, value in request.query.items():
        raise _bad_request(field, value, "no parameter")
    monitor = request.app[MONITOR]
    alive = all(sampler.alive() for sampler in monitor.samplers)
    report = {
        "status": "ok" if alive else "a sampler has ended",
        "gpus": len(monitor.devices.found),
        "gpu_reason": monitor.devices.reason,
        "hz": monitor.hz,
    }
    return web.json_response(report, status=200 if alive else 503)


def _arrow_stream(timeline: Timeline, since_ns: int, until_ns: int) -> bytes:
    table = timeline.window(since_ns, until_ns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _bad_request(field: str, value: str, allowed: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(
        text=web.json_response({"error": {"field": field, "value": value, "allowed": allowed}}).text,
        content_type="application/json",
    )
