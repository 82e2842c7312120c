"""The HF server as a process of its own, as a user starts it, and short ways to ask it."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from experiment.run.stack import end, get, spawn

JSON = dict[str, Any]
#: Seconds for a start, which may compile the model, and for an end; a busy machine needs more than a free one.
START_SECONDS = 240.0
END_SECONDS = 30.0
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Footprint:
    """What a server's processes hold: memory without that of files, open files and connections, threads."""

    memory_bytes: int
    files: int
    threads: int
    connections: int


class HfServer:
    """`python -m servers.hf` with options, on a port that it chooses; a context manager that ends it."""

    def __init__(self, log: Path, *options: str):
        self.log = log
        # float32, in which greedy outputs do not depend on the batch, and a size that is the same on any device.
        command = [sys.executable, "-m", "servers.hf", "--port", "0", "--dtype", "float32", *options]
        self.process = spawn(command, log, OFFLINE)
        self.url = ""

    def __enter__(self) -> "HfServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            end(self.process, END_SECONDS)

    def wait_until_ready(self) -> "HfServer":
        """Wait for the line that says where it listens."""
        deadline = time.monotonic() + START_SECONDS
        while not (ready := re.search(r"ready at (http://\S+)", self.output())):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)
        self.url = ready[1]
        return self

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def interrupt(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def exit_code(self, seconds: float = END_SECONDS) -> int:
        """Wait for its end."""
        try:
            return await asyncio.to_thread(self.process.wait, seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}") from None

    def metrics(self) -> dict[str, float]:
        """All samples of one scrape, by name and, where there is one, outcome or reason."""
        text = (get(self.url + "/metrics") or b"").decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {
            " ".join([s.name, *(s.labels[label] for label in ("outcome", "reason") if label in s.labels)]): s.value
            for s in samples
        }

    def footprint(self) -> Footprint:
        server = psutil.Process(self.process.pid)
        processes = [server, *server.children(recursive=True)]
        # First: one that closes in between would still be among the files of a server without connections.
        connections = [one for one in server.net_connections("tcp") if one.status != psutil.CONN_LISTEN]
        memory = sum(process.memory_info().rss - process.memory_info().shared for process in processes)
        files = sum(process.num_fds() for process in processes)
        threads = sum(process.num_threads() for process in processes)
        return Footprint(memory, files, threads, len(connections))


async def post(session: aiohttp.ClientSession, url: str, **fields: Any) -> aiohttp.ClientResponse:
    """Send a completion request."""
    return await session.post(url + "/v1/completions", json={"model": "random:tiny", "prompt": "Hello!", **fields})


@asynccontextmanager
async def post_raw(url: str, path: str, body: bytes, share: float = 1.0) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request, or with a `share` below 1 that much of its body; at the end the connection is closed as it is."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[: int(share * len(body))])
    try:
        yield reader
    finally:
        writer.close()


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, str]]:
    """The data of each event of a stream, with the time at which it was read."""
    async for line in response.content:
        if line.startswith(b"data: "):
            yield time.monotonic(), line.removeprefix(b"data: ").strip().decode()


async def rest_of(response: aiohttp.ClientResponse) -> tuple[list[JSON], str]:
    """What is left of a stream: its chunks, and its last event as it is."""
    found = [event async for _, event in events(response)]
    return [json.loads(event) for event in found if event != "[DONE]"], found[-1]
