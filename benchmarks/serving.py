"""What the benchmarks share: server processes, a client that streams, and what it makes of a stream."""

import argparse
import asyncio
import ctypes
import json
import multiprocessing
import signal
import socket
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import aiohttp
import psutil
import torch
import transformers

from experiment.environment import describe, installed
from experiment.run.stack import Program, RunError, end, get, spawn
from loadtest.client.sse import read_pieces

JSON = dict[str, Any]

#: Options of `servers.hf` for each rung; {batch} is how many requests may run at once.
RUNGS = {
    "sequential": "--engine sequential",
    "sequential-compile": "--engine sequential --compile",
    "batch": "--engine batch --max-batch {batch}",
    "batch-static": "--engine batch --cache static --max-batch {batch}",
    "batch-static-compile": "--engine batch --cache static --compile --max-batch {batch}",
    "continuous": "--engine continuous --max-batch {batch}",
}
STOP_SECONDS = 30
RETRY_SECONDS = 0.2
PR_SET_PDEATHSIG = 1


@dataclass
class Exchange:
    """One request and what came back: the stamp (CLOCK_MONOTONIC, ns) and the bytes of each piece as it arrived."""

    sent_ns: int
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    complete: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """What a stream said.

    `stamps` are those of the chunks with output, `counts` the output tokens so far at each, 0 where the server does not
    say. Token counts come from the server's usage, never from counting chunks.
    """

    sent_ns: int
    stamps: tuple[int, ...]
    counts: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    complete: bool
    error: str | None

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first chunk with output."""
        return (self.stamps[0] - self.sent_ns) / 1e9


def read(exchange: Exchange) -> Result:
    """Make sense of a stream after it has ended, so that parsing delays no stamp."""
    stamps: list[int] = []
    counts, usage, error = [0], JSON(), exchange.error
    for stamp, data in _events(exchange):
        event = json.loads(data)
        error = error or (str(event["error"]) if "error" in event else None)
        now = event.get("usage") or {}
        usage = now or usage
        text = any(choice.get("text") for choice in event.get("choices", ()))
        so_far = now.get("completion_tokens", 0) if event.get("choices") else 0
        # A token may have no text of its own. A count that comes only with the last chunk tells of no new token.
        if text or (so_far > counts[-1] and (counts[-1] or not stamps)):
            stamps.append(stamp)
            counts.append(max(so_far, counts[-1]))
    error = error or ("the stream ended without output" if exchange.complete and not (usage and stamps) else None)
    told = (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
    return Result(exchange.sent_ns, tuple(stamps), tuple(counts[1:]), *told, exchange.complete, error)


def _events(exchange: Exchange) -> Iterator[tuple[int, bytes]]:
    return ((stamp, data) for stamp, data in read_pieces(exchange.pieces) if data != b"[DONE]")


async def closed_loop(
    url: str, bodies: Iterator[JSON], concurrency: int, seconds: float | None = None
) -> list[Exchange]:
    """Keep `concurrency` requests in flight until there are no more bodies, or cut all off after some seconds."""
    exchanges: list[Exchange] = []

    async def user(session: aiohttp.ClientSession) -> None:
        for body in bodies:
            exchange = Exchange(time.monotonic_ns())
            exchanges.append(exchange)
            await _post(session, url, body, exchange)
            if exchange.error:
                await asyncio.sleep(RETRY_SECONDS)

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        users = [asyncio.create_task(user(session)) for _ in range(concurrency)]
        done, running = await asyncio.wait(users, timeout=seconds)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    for task in done:
        task.result()
    return exchanges


async def _post(session: aiohttp.ClientSession, url: str, body: JSON, exchange: Exchange) -> None:
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            async for piece in response.content.iter_any():
                exchange.pieces.append((time.monotonic_ns(), piece))
            if response.status != 200:
                exchange.error = f"HTTP {response.status}: {b''.join(piece for _, piece in exchange.pieces)[:300]!r}"
                exchange.pieces.clear()
        exchange.complete = exchange.error is None
    except aiohttp.ClientError as error:
        exchange.error = f"{type(error).__name__}: {error}"


class Servers:
    """Servers of this machine, each with a log in the folder `logs`; a context manager that leaves none behind."""

    def __init__(self, logs: Path, start_seconds: float):
        self._logs = logs
        self._start_seconds = start_seconds
        # So that the monitor of a comparison beside these does not count them.
        self._stack = uuid.uuid4().hex
        self.programs: dict[str, Program] = {}

    def __enter__(self) -> "Servers":
        signal.signal(signal.SIGTERM, _exit)
        return self

    def __exit__(self, *_: object) -> None:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        self.stop()
        for number, handler in before.items():
            signal.signal(number, handler)

    def start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> Program:
        """Start a Python module that is told to listen on a free port, which its command names as {port}."""
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = str(sock.getsockname()[1])
        arguments = [sys.executable, "-m", *(part.replace("{port}", port) for part in command)]
        log = self._logs / f"{name}.log"
        program = Program(
            name, spawn(arguments, log, environment | {"HEADROOM_STACK": self._stack}), log, f"http://127.0.0.1:{port}"
        )
        self.programs[name] = program
        return program

    def wait(self) -> None:
        """Wait until all servers are healthy; raises RunError with the end of its log when one is not."""
        deadline = time.monotonic() + self._start_seconds
        for program in self.programs.values():
            while get(program.url + "/health") is None:
                program.check()
                if time.monotonic() > deadline:
                    late = f"{program.name} was not healthy after {self._start_seconds:g} s"
                    raise RunError(f"{late}. The end of {program.log}:\n{program.tail()}")
                time.sleep(0.2)

    def stop(self) -> None:
        """End all servers and their children: at first by a signal, then by force."""
        processes = [program.process for program in self.programs.values()]
        self.programs.clear()
        family = []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                family += psutil.Process(process.pid).children(recursive=True)
            process.terminate()
        for process in processes:
            end(process, STOP_SECONDS)
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


@dataclass(frozen=True)
class Request:
    """A prompt as text and as token ids, and how long its output is."""

    text: str
    ids: tuple[int, ...]
    max_tokens: int


class Bare:
    """`model.generate` in a process of its own, one request after the other and nothing around it."""

    def __init__(self, source: str, device: str, dtype: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _load, (source, device, dtype, threads))

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._pool._processes.values():
            process.kill()
        self._pool.shutdown(cancel_futures=True)

    def run(self, requests: Sequence[Request], first_tokens: bool) -> tuple[float, tuple[int, ...], list[float]]:
        """Run all requests without a streamer; returns the seconds that took and the tokens that each made.

        With `first_tokens` they run once more, to the first token, with the least streamer there can be: seconds each.
        """
        try:
            return self._pool.submit(_loop, requests, first_tokens).result()
        except BrokenProcessPool:
            raise RunError("the process of the bare generate loop ended; what it said is above") from None


LOADED: dict[str, Any] = {}


def _load(source: str, device: str, dtype: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config = transformers.GenerationConfig()
    LOADED["model"] = model


def _loop(requests: Sequence[Request], first_tokens: bool) -> tuple[float, tuple[int, ...], list[float]]:
    started = time.monotonic()
    made = tuple(_generate(request) for request in requests)
    seconds, ttfts = time.monotonic() - started, []
    for request in requests if first_tokens else []:
        stamps: list[float] = []
        streamer = SimpleNamespace(put=lambda _, at=stamps: at.append(time.monotonic()), end=lambda: None)
        sent = time.monotonic()
        _generate(replace(request, max_tokens=1), streamer)
        ttfts.append(stamps[1] - sent)  # the prompt is put first
    return seconds, made, ttfts


def _generate(request: Request, streamer: object = None) -> int:
    model = LOADED["model"]
    ids = torch.tensor([request.ids], device=model.device)
    config = transformers.GenerationConfig(max_new_tokens=request.max_tokens, do_sample=False, pad_token_id=0)
    return int(model.generate(ids, generation_config=config, streamer=streamer).shape[1]) - len(request.ids)


def environment(model: str, threads: int | None = None) -> dict[str, str]:
    """What servers get beside our own environment."""
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    return counts | ({"HF_HUB_OFFLINE": "1"} if model.startswith("random:") else {})


def about(device: str, dtype: str) -> JSON:
    """Versions and hardware that the figures depend on."""
    found = describe()
    found["packages"]["accelerate"] = installed("accelerate")
    name = found["gpus"][0]["name"] if device == "cuda" and found["gpus"] else found["processor"]
    return {"device": device, "device_name": name, "dtype": dtype} | found


def new_file(text: str) -> Path:
    """Read the path of a file that can be made."""
    found = Path(text)
    if found.is_dir() or not found.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a folder that is there")
    return found


def number(text: str) -> int:
    """Read a positive number."""
    found = numbers(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one positive number")
    return found[0]


def numbers(text: str) -> tuple[int, ...]:
    """Read a list of positive numbers with commas between."""
    found = tuple(int(part) for part in text.split(",") if part)
    if any(number < 1 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive numbers with commas between")
    return found


def names(text: str, allowed: Collection[str]) -> tuple[str, ...]:
    """Read a list of names with commas between."""
    found = tuple(part for part in text.split(",") if part)
    if unknown := sorted(set(found) - set(allowed)):
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(allowed)}")
    return found
