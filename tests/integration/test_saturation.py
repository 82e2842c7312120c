"""The search for the saturation under real load, against a server whose capacity is known."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from experiment.analysis import requests, stats
from experiment.analysis.saturation import Search

pytestmark = pytest.mark.alone

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
SEATS, SERVICE_SECONDS, TOKENS = 4, 0.16, 4
CAPACITY = SEATS / SERVICE_SECONDS
# In a constant process nothing waits below the capacity; above it the line grows with every request, and at the end is
# longer than the limit when the rate is two in a hundred too high.
LIMITS, SHARE, REQUESTS = {"ttft_seconds": SERVICE_SECONDS / TOKENS + 0.08}, 0.99, 150


class Seats:
    """A server that works on so many requests at once, in the order of their coming; each takes the same time."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(SEATS)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        async with self._free:
            # By the clock and not by the sum of sleeps, so that a seat takes its time and no more.
            begun = asyncio.get_running_loop().time()
            for number in range(1, TOKENS + 1):
                due = begun + SERVICE_SECONDS * number / TOKENS
                await asyncio.sleep(max(0, due - asyncio.get_running_loop().time()))
                choice = {"index": 0, "text": "x", "finish_reason": "length" if number == TOKENS else None}
                await self._send(
                    answer, {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": number}}
                )
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def _send(self, answer: web.StreamResponse, event: object) -> None:
        await answer.write(f"data: {json.dumps(event)}\n\n".encode())


@contextmanager
def serving() -> Iterator[str]:
    loop, found = asyncio.new_event_loop(), {}
    ready = threading.Event()

    async def start() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", Seats().complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found["port"] = runner.addresses[0][1]
        ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{found['port']}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def load(url: str, rate: float, path: Path) -> requests.Requests:
    options = {
        "arrival": "constant",
        "rate": rate,
        "warmup": 4,
        "requests": REQUESTS,
        "workload": "synthetic",
        "input-lengths": "constant",
        "input-mean": 8,
        "output-lengths": "constant",
        "output-mean": TOKENS,
        "model": "seats",
        "hf-url": url,
        "records": path,
    }
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "HF", "--headless", "--only-summary"]
    command += [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=LOCUSTFILE.parents[1])
    return requests.load(path)


def test_the_capacity_of_a_server_is_found_within_5_percent_in_at_most_12_cells(tmp_path: Path) -> None:
    search = Search(start=15.0, precision=0.03)
    told: list[tuple[float, float | None]] = []
    with serving() as url:
        while (rate := search.next_rate()) is not None:
            cell = load(url, rate, tmp_path / f"{len(told)}.arrow")
            assert stats.errors_by_kind(cell.error) == {}
            share = stats.attainment(cell, LIMITS)
            told.append((rate, share))
            search.tell(rate, (share or 0) >= SHARE)
    found = search.result
    assert len(told) <= 12, told
    assert found.rate == pytest.approx(CAPACITY, rel=0.05), (told, found)
