"""Starts the HF server around the real tiny model, with any engine, and asks it over HTTP."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from servers.hf.app import Service, make_app
from servers.hf.continuous import ContinuousEngine
from servers.hf.engine import Limits, ModelEngine
from servers.hf.kv import bytes_per_token
from servers.hf.metrics import Metrics
from servers.hf.padded import PaddedEngine

JSON = dict[str, Any]
RUNGS = ("sequential", "batch", "batch static", "continuous")
PROMPT = [300, 301, 302]
CONTEXT = 2048
BLOCK_SIZE = 16
#: Keys and values of 4 layers, each 2 heads of 64 numbers of 4 bytes.
BYTES_PER_TOKEN = 2 * 4 * 128 * 4
#: How long anything may take that is not a wait for tokens; far more than it needs, since the machine may be busy.
PATIENCE_SECONDS = 20
#: Long enough to still run when the test is through with it.
ENDLESS: JSON = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
HELLO: JSON = {"messages": [{"role": "user", "content": "Hello!"}]}


def make_engine(rung: str, weights: Any, limits: Limits, max_wait: float = 0.005) -> ModelEngine:
    """An engine of the rung; one that is sequential has no other limit of rows than 1."""
    if rung == "continuous":
        return ContinuousEngine(weights, limits, BLOCK_SIZE)
    if rung == "sequential":
        return PaddedEngine(weights, replace(limits, max_batch=1))
    return PaddedEngine(weights, limits, max_wait, static=rung == "batch static")


@dataclass
class Server:
    """A running server, and short ways to ask it."""

    service: Service
    engine: ModelEngine
    client: TestClient[Any, Any]

    def post(self, path: str = "completions", **fields: Any) -> Awaitable[aiohttp.ClientResponse]:
        body = {"model": "random:tiny", **({"prompt": PROMPT} if path == "completions" else {}), **fields}
        return self.client.post(f"/v1/{path}", json=body)

    async def whole(self, path: str = "completions", **fields: Any) -> JSON:
        response = await self.post(path, **fields)
        body: JSON = await response.json()
        assert response.status == 200, body
        return body

    async def choice(self, path: str = "completions", **fields: Any) -> JSON:
        body = await self.whole(path, **fields)
        (choice,) = body["choices"]
        return dict(choice)

    async def stream(self, path: str = "completions", **fields: Any) -> list[JSON]:
        """Return the chunks of a stream, which ends as it should."""
        response = await self.post(path, **{**fields, "stream": True})
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        *chunks, done = events(await response.text())
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    async def error(self, path: str = "completions", **fields: Any) -> tuple[int, str | None, str]:
        response = await self.post(path, **fields)
        error = (await response.json())["error"]
        assert error["code"] == response.status
        return response.status, error["param"], error["message"]

    async def begin(self, count: int = 1, **fields: Any) -> list[aiohttp.ClientResponse]:
        """Start streams that run at the same time, and read the first event of each."""
        streams = await asyncio.gather(*[self.post(**{**ENDLESS, **fields}, stream=True) for _ in range(count)])
        for response in streams:
            assert response.status == 200
            assert (await response.content.readline()).startswith(b"data: {")
        return streams

    async def metric(self, name: str, **labels: str) -> float:
        """Read a metric of the engine; 0 if it was never counted."""
        wanted = {"engine": self.engine.name, **labels}
        return sum(value for sample, found, value in await self.samples() if sample == f"hf:{name}" and found == wanted)

    async def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """All samples of one scrape: name, labels and value."""
        text = await (await self.client.get("/metrics")).text()
        families = text_string_to_metric_families(text)
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def outcomes(self) -> dict[str, int]:
        """Requests that ended, by outcome; only those that occurred."""
        samples = [sample for family in self.service.registry.collect() for sample in family.samples]
        return {s.labels["outcome"]: int(s.value) for s in samples if s.name == "hf:request_total" and s.value}

    async def until_ended(self, **outcomes: int) -> None:
        """Wait until just these requests have ended."""
        await eventually(lambda: self.outcomes() == outcomes, self.outcomes)

    async def held(self, unit: str = "tokens") -> dict[str, float]:
        """The exported KV ledger: live, allocated, capacity and each reason of waste, from one scrape."""
        held = {}
        for name, labels, value in await self.samples():
            if name.startswith("hf:kv_") and name.endswith(f"_{unit}"):
                held[labels.get("reason") or name.removeprefix("hf:kv_").removesuffix(f"_{unit}")] = value
        return held

    async def health(self) -> int:
        return (await self.client.get("/health")).status

    async def until(self, running: int, waiting: int = 0) -> None:
        """Wait until the engine is as busy as that."""
        engine = self.engine

        def busy() -> tuple[int, int]:
            return engine.running, engine.waiting

        await eventually(lambda: busy() == (running, waiting), busy)

    async def until_released(self) -> None:
        """Wait until no slot of the KV cache is set aside and nothing runs or waits."""
        await self.until(running=0)
        engine = self.engine
        await eventually(lambda: engine.held.allocated == 0, lambda: engine.held)


async def eventually(condition: Callable[[], bool], say: Callable[[], object]) -> None:
    """Wait until the condition holds; fails with what `say` returns."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, say()
        await asyncio.sleep(0.002)


def events(text: str) -> list[str]:
    """The data of each event of a complete stream."""
    *found, rest = text.split("\n\n")
    assert rest == ""
    return [event.removeprefix("data: ") for event in found]


def said(chunks: list[JSON]) -> str:
    """The text of a stream of either shape."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"]["content"] for choice in choices)


class Serve:
    """Starts servers; arguments are those of the engine or replace parts of the service."""

    def __init__(self, weights: Any, tokenizer: Any, stack: AsyncExitStack):
        self._weights = weights
        self._tokenizer = tokenizer
        self._stack = stack

    async def __call__(
        self,
        rung: str = "sequential",
        max_waiting: int = 8,
        eos: int = 0,
        max_batch: int = 4,
        max_wait: float = 0.005,
        kv_tokens: int | None = None,
        **changes: Any,
    ) -> Server:
        context = changes.pop("max_model_len", CONTEXT)
        limits = Limits(context, max_batch, max_waiting, kv_tokens, frozenset([eos]))
        engine = make_engine(rung, self._weights, limits, max_wait)
        registry = CollectorRegistry(auto_describe=True)
        size = bytes_per_token(self._weights.config, self._weights.dtype.itemsize)
        service = Service(
            name="random:tiny",
            engine=engine,
            tokenizer=self._tokenizer,
            vocab_size=2048,
            max_model_len=context,
            bytes_per_token=size,
            metrics=Metrics(registry, engine.name),
            registry=registry,
        )
        service = replace(service, **changes)
        app = make_app(service)
        server = TestServer(app)
        client = TestClient(server, timeout=aiohttp.ClientTimeout(total=60))
        await self._stack.enter_async_context(client)
        return Server(service, engine, client)


@asynccontextmanager
async def serving(weights: Any, tokenizer: Any) -> AsyncIterator[Serve]:
    """Offer servers that end with the context."""
    async with AsyncExitStack() as stack:
        yield Serve(weights, tokenizer, stack)


class Hold:
    """A forward pass that is kept from beginning until it is released."""

    def __init__(self) -> None:
        self._reached, self._released = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self._reached.set()
        assert self._released.wait(PATIENCE_SECONDS)

    async def reached(self) -> None:
        await eventually(self._reached.is_set, lambda: "the pass never came")

    def release(self) -> None:
        self._released.set()


class Probe:
    """Sits before the model's forward pass: counts passes, and makes one fail or wait when the test says so."""

    def __init__(self, weights: Any):
        self.passes = 0
        self._planned: list[tuple[int, Callable[[], None]]] = []
        self._holds: list[Hold] = []
        self._handle = weights.register_forward_pre_hook(self._before)

    def fail(self, error: Exception, after: int = 0) -> None:
        """Let that many passes through, then raise the error in place of one."""

        def fail() -> None:
            raise error

        self._planned.append((self.passes + after, fail))

    async def hold(self, after: int = 0) -> Hold:
        """Let that many passes through, keep the next from beginning, and return when it would."""
        hold = self.plan_hold(after)
        await hold.reached()
        return hold

    def plan_hold(self, after: int = 0) -> Hold:
        """As `hold`, but return at once."""
        self._holds.append(Hold())
        self._planned.append((self.passes + after, self._holds[-1]))
        return self._holds[-1]

    def remove(self) -> None:
        for hold in self._holds:
            hold.release()
        self._handle.remove()

    def _before(self, *_: object) -> None:
        at, self.passes = self.passes, self.passes + 1
        for act in [act for when, act in self._planned if when == at]:
            act()


def out_of_memory() -> torch.OutOfMemoryError:
    """What a GPU says when an allocation fails."""
    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB"
    )


each_rung = pytest.mark.parametrize("rung", RUNGS)
