"""The HF server as a process: how it ends, what it does not start with, and what it says of each request's time."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import aiohttp
import pytest

from experiment.environment import find_gpus
from experiment.run.stack import get
from servers.models import resolve
from tests.integration.harness import vllm_knows
from tests.integration.hf_server import JSON, OFFLINE, HfServer, events, post, post_raw, rest_of

#: Options with which a second request waits while one runs.
ENGINES = {
    "sequential": [],
    "batch": ["--engine", "batch"],
    "continuous": ["--engine", "continuous", "--max-batch", "1"],
}
HELLO: JSON = {"model": "random:tiny", "prompt": "Hello!"}
LONG: JSON = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True}
SHUTTING_DOWN = "the server is shutting down"

Start = Callable[..., HfServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers.hf with options and wait until it is ready; ended after the test."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(HfServer(tmp_path / "hf.log", *options)).wait_until_ready()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


async def begin(session: aiohttp.ClientSession, server: HfServer, **fields: Any) -> aiohttp.ClientResponse:
    """Start a long stream and read its first event."""
    response = await post(session, server.url, **LONG | fields)
    assert response.status == 200
    assert (await response.content.readline()).startswith(b"data: {")
    return response


async def until(server: HfServer, condition: Callable[[dict[str, float]], bool]) -> None:
    """Wait until the metrics fulfil the condition."""
    deadline = time.monotonic() + 90
    while not condition(found := server.metrics()):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)


async def until_draining(server: HfServer) -> None:
    """Wait until the signal has come in."""
    deadline = time.monotonic() + 5
    while get(server.url + "/health") is not None:
        assert time.monotonic() < deadline, server.output()
        await asyncio.sleep(0.01)


async def begin_one_and_queue_one(
    session: aiohttp.ClientSession, server: HfServer, tokens: int
) -> tuple[aiohttp.ClientResponse, asyncio.Future[aiohttp.ClientResponse]]:
    """A stream that runs, and a request behind it that waits until the stream has ended."""
    running = await begin(session, server, max_tokens=tokens)
    waiting = asyncio.ensure_future(post(session, server.url, max_tokens=20, ignore_eos=True))
    await until(server, lambda found: found["hf:num_requests_waiting"] == 1)
    return running, waiting


@pytest.mark.parametrize("engine", ENGINES)
async def test_sigterm_lets_what_runs_and_what_waits_end_and_takes_no_more(
    start: Start, session: aiohttp.ClientSession, engine: str
) -> None:
    server = start(*ENGINES[engine], "--drain-seconds", "100")
    running, waiting = await begin_one_and_queue_one(session, server, 800)
    server.interrupt()
    await until_draining(server)
    assert (await session.get(server.url + "/health")).status == 503
    refused = await post(session, server.url, max_tokens=1)
    assert (refused.status, (await refused.json())["error"]["message"]) == (503, SHUTTING_DOWN)
    found = server.metrics()
    assert (found["hf:num_requests_running"], found["hf:num_requests_waiting"]) == (1, 1)
    chunks, last = await rest_of(running)
    assert last == "[DONE]"
    assert len(chunks) == 800 - 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    answer = await waiting
    assert answer.status == 200
    assert (await answer.json())["usage"]["completion_tokens"] == 20
    assert await server.exit_code() == 0
    assert "Traceback" not in server.output()


@pytest.mark.parametrize("engine", ENGINES)
async def test_past_the_drain_what_runs_and_what_waits_ends_with_an_error(
    start: Start, session: aiohttp.ClientSession, engine: str
) -> None:
    server = start(*ENGINES[engine], "--drain-seconds", "0.5")
    running, waiting = await begin_one_and_queue_one(session, server, 1500)
    signalled = time.monotonic()
    server.interrupt()
    chunks, last = await rest_of(running)
    error = json.loads(last)["error"]
    assert (error["message"], error["type"], error["code"]) == (SHUTTING_DOWN, "unavailable", 503)
    assert 0.5 <= time.monotonic() - signalled < 5
    assert len(chunks) < 1500
    answer = await waiting
    assert answer.status == 503
    assert (await answer.json())["error"]["message"] == SHUTTING_DOWN
    assert await server.exit_code() == 0
    assert time.monotonic() - signalled < 10
    assert "Traceback" not in server.output()


async def test_a_second_signal_ends_it_at_once(start: Start, session: aiohttp.ClientSession) -> None:
    server = start(*ENGINES["batch"], "--drain-seconds", "600")
    running, waiting = await begin_one_and_queue_one(session, server, 1500)
    server.interrupt()
    await until_draining(server)
    signalled = time.monotonic()
    server.interrupt(signal.SIGINT)
    _, last = await rest_of(running)
    assert json.loads(last)["error"]["message"] == SHUTTING_DOWN
    assert (await waiting).status == 503
    assert await server.exit_code() == 0
    assert time.monotonic() - signalled < 10
    assert "Traceback" not in server.output()


async def test_a_server_whose_only_client_is_idle_ends_at_once(start: Start, session: aiohttp.ClientSession) -> None:
    server = start("--drain-seconds", "600")
    await (await session.get(server.url + "/health")).read()
    assert server.footprint().connections == 1
    signalled = time.monotonic()
    server.interrupt()
    assert await server.exit_code() == 0
    assert time.monotonic() - signalled < 10


async def test_a_client_that_never_sends_its_whole_body_does_not_keep_the_server_alive(start: Start) -> None:
    server = start("--drain-seconds", "1")
    async with post_raw(server.url, "/v1/completions", json.dumps(HELLO).encode(), share=0.5):
        assert get(server.url + "/health") is not None  # by its answer the request before it has begun
        server.interrupt()
        assert await server.exit_code(20) == 0


async def test_a_client_that_never_reads_does_not_keep_the_server_alive(start: Start, tmp_path: Path) -> None:
    """Each chunk names the model, so a long name makes a stream that the buffers of both sockets cannot hold."""
    folder = tmp_path.joinpath(*["long" * 60] * 12)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(resolve("random:tiny").source)
    server = start("--drain-seconds", "1", "--model", str(folder))
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "model": str(folder), "prompt": "Hello!", "max_tokens": 1000}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await until(server, lambda found: found["hf:request_queue_time_seconds_count"] == 1)
        await until(server, lambda found: found["hf:num_requests_running"] == 0)
        # All tokens are made, and the end of the stream is not sent.
        assert server.metrics()["hf:request_total length"] == 0
        server.interrupt()
        assert await server.exit_code(20) == 0


def run(options: list[str], memory_bytes: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the server to its end, which is to come by itself, with at most that much memory if it is given."""

    def limit() -> None:
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    command = [sys.executable, "-m", "servers.hf", "--port", "0", "--dtype", "float32", *options]
    environment = {**os.environ, **OFFLINE}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment, preexec_fn=limit
    )


def test_a_budget_that_is_too_small_ends_it_with_one_line_that_names_it_and_the_least() -> None:
    """A static row is as long as the context: 2,048 tokens."""
    ended = run(["--engine", "batch", "--cache", "static", "--kv-budget", "8388607"])
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("servers.hf: --kv-budget: 8388607: 8388608 bytes are the least, 2048 tokens of 4096 bytes")


@pytest.mark.skipif(bool(find_gpus()[0]), reason="on a GPU the cache is not in the memory that can be limited")
def test_a_cache_that_does_not_fit_into_memory_ends_it_with_one_line_that_says_so() -> None:
    """Each of its tensors has 4 GiB; the process and its libraries may take 9 GiB in all."""
    ended = run(["--engine", "continuous", "--max-batch", "4096"], memory_bytes=9 * 2**30)
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("servers.hf:")]
    assert "memory" in line
    assert "Traceback" not in ended.stderr


@pytest.fixture(scope="module", params=ENGINES)
def measuring(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HfServer]:
    log = tmp_path_factory.mktemp("measuring") / "hf.log"
    with HfServer(log, "--engine", request.param, "--max-batch", "2", "--per-request-metrics") as server:
        yield server.wait_until_ready()


@dataclass(frozen=True)
class Timed:
    """First and last token by the client's clock, in seconds since it sent the request, and what the server says."""

    first: float
    last: float
    metrics: dict[str, float]


async def timed(session: aiohttp.ClientSession, server: HfServer, tokens: int, **fields: Any) -> Timed:
    sent = time.monotonic()
    options = {"include_usage": True}
    response = await post(session, server.url, **LONG | fields | {"max_tokens": tokens, "stream_options": options})
    read = [(at, json.loads(event)) async for at, event in events(response) if event != "[DONE]"]
    assert [bool(chunk["choices"]) for _, chunk in read] == [True] * tokens + [False]
    times = [at - sent for at, chunk in read if chunk["choices"]]
    return Timed(times[0], times[-1], read[-1][1]["metrics"])


@pytest.mark.skipif(not vllm_knows("enable_per_request_metrics"), reason="this vLLM does not say them")
async def test_what_is_said_of_a_request_has_vllms_names(measuring: HfServer, session: aiohttp.ClientSession) -> None:
    # Imported here: it takes seconds. The class has another name and place in each version, its field has not.
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    (theirs, _) = get_args(CompletionResponse.model_fields["metrics"].annotation)
    streamed = (await timed(session, measuring, 4)).metrics
    whole = (await (await post(session, measuring.url, max_tokens=4, ignore_eos=True)).json())["metrics"]
    # There is no draft model.
    assert set(streamed) == set(whole) == set(theirs.model_fields) - {"speculative_decoding"}


async def test_what_is_said_of_requests_is_what_their_clients_saw(
    measuring: HfServer, session: aiohttp.ClientSession
) -> None:
    """Four at once, of which one or two can run; the way to the client and back is short beside 1,000 tokens."""
    found = await asyncio.gather(*[timed(session, measuring, 1000) for _ in range(4)])
    for client in found:
        queue, ttft, generation = [
            client.metrics[f"{name}_ms"] / 1000 for name in ("queue_time", "time_to_first_token", "generation_time")
        ]
        assert 0 < queue + ttft < client.first < queue + ttft + 0.25 * client.last
        assert client.last / 2 < queue + ttft + generation < client.last
        assert client.metrics["mean_itl_ms"] == pytest.approx(generation / 999 * 1000)
        assert client.metrics["tokens_per_second"] == pytest.approx(1000 / (ttft + generation))
    # The last one waited for another to be generated.
    longest_wait = max(client.metrics["queue_time_ms"] for client in found)
    assert longest_wait > min(client.metrics["generation_time_ms"] for client in found) / 2


async def test_the_time_to_the_first_token_is_that_of_the_prompt(
    measuring: HfServer, session: aiohttp.ClientSession
) -> None:
    client = await timed(session, measuring, 2, prompt=[7] * 2000)
    assert 0.5 * client.first < client.metrics["time_to_first_token_ms"] / 1000 < client.first


@pytest.mark.parametrize("measuring", ["sequential"], indirect=True)
async def test_a_prompt_of_megabytes_holds_nobody_up(measuring: HfServer, session: aiohttp.ClientSession) -> None:
    """It is refused for its length, not after minutes in the tokenizer."""
    asking = asyncio.ensure_future(post(session, measuring.url, prompt="Tell me a story. " * 2**20))
    longest = 0.0
    while not asking.done():
        began = time.monotonic()
        await (await session.get(measuring.url + "/health")).read()
        longest = max(longest, time.monotonic() - began)
    assert ((await asking).status, longest < 2) == (400, True), longest


@pytest.mark.parametrize("measuring", ["sequential"], indirect=True)
async def test_a_body_that_is_too_large_is_refused_like_any_other_request(
    measuring: HfServer, session: aiohttp.ClientSession
) -> None:
    before = measuring.metrics()["hf:request_total rejected"]
    response = await session.post(measuring.url + "/v1/completions", data=b" " * (64 * 2**20 + 1))
    assert response.status == 413
    assert (await response.json())["error"]["code"] == 413
    assert measuring.metrics()["hf:request_total rejected"] - before == 1
