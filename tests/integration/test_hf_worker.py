"""The two processes of the HF server: neither outlives the other, and no request waits for one that has ended."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from experiment.run.stack import get
from tests.integration.hf_server import HfServer, post, rest_of

PATIENCE_SECONDS = 10


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HfServer]:
    with HfServer(tmp_path / "hf.log") as started:
        yield started


def of_the_model(server: HfServer) -> psutil.Process:
    (process,) = psutil.Process(server.process.pid).children()
    return process


async def begin(session: aiohttp.ClientSession, server: HfServer) -> aiohttp.ClientResponse:
    """A stream that has begun and is far from its end."""
    response = await post(session, server.url, max_tokens=1500, ignore_eos=True, stream=True)
    assert (await response.content.readline()).startswith(b"data: {")
    return response


async def test_a_killed_model_fails_what_runs_and_what_comes_at_once(server: HfServer) -> None:
    server.wait_until_ready()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS)) as session:
        stream = await begin(session, server)
        of_the_model(server).kill()
        *_, last = await rest_of_lines(stream)
        assert "the process of the model has ended" in last
        assert get(server.url + "/health") is None
        assert (await post(session, server.url)).status == 503
    figures = server.metrics()
    assert (figures["hf:request_total error"], figures["hf:request_total unavailable"]) == (1, 1)
    assert (figures["hf:num_requests_running"], figures["hf:kv_allocated_bytes"]) == (0, 0)
    assert "the process of the model has ended" in server.output()
    server.interrupt()
    assert await server.exit_code() == 0


async def rest_of_lines(stream: aiohttp.ClientResponse) -> list[str]:
    return [line.decode() async for line in stream.content if line.startswith(b"data: ")]


async def test_a_model_that_hangs_holds_nothing_else_up_and_its_end_is_noticed(server: HfServer) -> None:
    """More is asked for than the pipe between the processes holds; a scrape tells what the other process knows."""
    server.wait_until_ready()
    model = of_the_model(server)
    model.suspend()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        asked = [asyncio.create_task(post(session, server.url, prompt=[300] * 1500)) for _ in range(200)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await session.get(server.url + "/metrics")
        async with asyncio.timeout(PATIENCE_SECONDS), session.get(server.url + "/metrics") as scrape:
            found = await scrape.text()
        assert "hf:request_total" in found
        assert "hf:num_requests_running" not in found
        async with asyncio.timeout(PATIENCE_SECONDS), session.get(server.url + "/health") as healthy:
            assert healthy.status == 200
        model.kill()
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert {response.status for response in await asyncio.gather(*asked)} == {503}
    assert get(server.url + "/health") is None
    assert server.metrics()["hf:request_total unavailable"] == 200


async def test_requests_that_the_pipe_could_not_hold_for_a_busy_model_are_all_answered(server: HfServer) -> None:
    server.wait_until_ready()
    model = of_the_model(server)
    model.suspend()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        fields: dict[str, Any] = {"prompt": [300] * 1500, "max_tokens": 1, "ignore_eos": True}
        asked = [asyncio.create_task(post(session, server.url, **fields)) for _ in range(100)]
        async with asyncio.timeout(PATIENCE_SECONDS), session.get(server.url + "/health") as healthy:
            assert healthy.status == 200
        await asyncio.sleep(1)  # all are on their way
        model.resume()
        async with asyncio.timeout(120):
            assert [response.status for response in await asyncio.gather(*asked)] == [200] * 100
    after = server.metrics()
    assert (after["hf:request_total length"], after["hf:num_requests_running"]) == (100, 0)


async def test_a_killed_server_leaves_no_model_behind(server: HfServer) -> None:
    server.wait_until_ready()
    model = of_the_model(server)
    async with aiohttp.ClientSession() as session:
        stream = await begin(session, server)
        server.process.kill()
        with pytest.raises(aiohttp.ClientError):
            await rest_of(stream)
    assert await asyncio.to_thread(ended, model)


async def test_an_interrupt_from_the_terminal_drains_though_both_processes_get_it(server: HfServer) -> None:
    server.wait_until_ready()
    model = of_the_model(server)
    async with aiohttp.ClientSession() as session:
        stream = await post(session, server.url, max_tokens=100, ignore_eos=True, stream=True)
        os.killpg(os.getpgid(server.process.pid), signal.SIGINT)
        chunks, last = await rest_of(stream)
    assert last == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert await server.exit_code() == 0
    assert await asyncio.to_thread(ended, model)


async def test_a_signal_while_the_model_is_loaded_ends_both(server: HfServer) -> None:
    children: list[psutil.Process] = []
    while not children:
        await asyncio.sleep(0.01)
        children = psutil.Process(server.process.pid).children()
    server.interrupt()
    assert await server.exit_code() != 0
    assert await asyncio.to_thread(ended, children[0])
    assert "Traceback" not in server.output()


def ended(process: psutil.Process) -> bool:
    """Whether it ends soon; one that nobody has waited for yet has ended too."""
    try:
        process.wait(PATIENCE_SECONDS)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True
