"""The HF server over HTTP: the real application and engine around the real tiny model."""

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from servers.hf.app import Service, make_app
from servers.hf.engines import SequentialEngine
from servers.hf.metrics import Metrics

JSON = dict[str, Any]
PROMPT = [300, 301, 302]
# Long enough to still run when the test is through with it.
ENDLESS: JSON = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


@dataclass
class Server:
    """A running server, and short ways to ask it."""

    service: Service
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
        response = await self.post(path, stream=True, **fields)
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        *events, done, rest = (await response.text()).split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    async def error(self, path: str = "completions", **fields: Any) -> tuple[int, str | None, str]:
        response = await self.post(path, **fields)
        error = (await response.json())["error"]
        assert error["code"] == response.status
        return response.status, error["param"], error["message"]

    async def metric(self, name: str, **labels: str) -> float:
        """Read a metric of the engine; 0 if it was never counted."""
        text = await (await self.client.get("/metrics")).text()
        wanted = {"engine": "sequential", **labels}
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == f"hf:{name}" and sample.labels == wanted)

    async def until(self, running: int, waiting: int = 0) -> None:
        """Wait until the engine is as busy as that."""
        engine, deadline = self.service.engine, time.monotonic() + 5
        while (engine.running, engine.waiting) != (running, waiting):
            assert time.monotonic() < deadline, (engine.running, engine.waiting)
            await asyncio.sleep(0.002)


Serve = Callable[..., Awaitable[Server]]


@pytest.fixture
async def serve(weights: Any, tokenizer: Any) -> AsyncIterator[Serve]:
    """Starts a server; arguments replace parts of its service."""
    async with AsyncExitStack() as stack:

        async def serve(max_waiting: int = 8, eos: int = 0, **changes: Any) -> Server:
            registry = CollectorRegistry()
            engine = SequentialEngine(weights, frozenset([eos]), max_waiting)
            metrics = Metrics(registry, engine.name)
            service = Service("random:tiny", engine, tokenizer, 2048, 2048, metrics, registry)
            app = make_app(replace(service, **changes))
            return Server(service, await stack.enter_async_context(TestClient(TestServer(app))))

        yield serve


@pytest.fixture
async def server(serve: Serve) -> Server:
    return await serve()


def said(chunks: list[JSON]) -> str:
    """The text of a stream of either shape."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"]["content"] for choice in choices)


HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "max_tokens": 20},
        {"temperature": 1.5, "seed": 7, "max_tokens": 20},
        {"temperature": 1.5, "seed": 7, "top_p": 0.9, "top_k": 50, "max_tokens": 20},
        {"temperature": 0, "max_tokens": 1},
        {"temperature": 1.0, "seed": 3, "max_tokens": 20, "stop": ["a", "on"]},
    ],
)
async def test_a_stream_says_the_same_as_a_whole_answer(server: Server, fields: JSON) -> None:
    for path, more in (("completions", {"prompt": "Hello!"}), ("chat/completions", HELLO)):
        whole = await server.choice(path, **fields, **more)
        chunks = await server.stream(path, **fields, **more)
        assert said(chunks) == (whole["text"] if path == "completions" else whole["message"]["content"])
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


async def test_the_answer_is_what_the_model_says(server: Server, weights: Any, tokenizer: Any) -> None:
    choice = await server.choice(max_tokens=12, temperature=0, return_token_ids=True)
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(weights(torch.tensor([ids])).logits[0, -1].argmax()))
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (PROMPT, ids[3:])
    assert choice["text"] == tokenizer.decode(ids[3:])


async def test_a_text_prompt_is_the_same_as_its_tokens(server: Server, tokenizer: Any) -> None:
    text = "Thanks for the fish"
    ids = tokenizer(text)["input_ids"]
    from_text, from_ids = [await server.whole(prompt=prompt, max_tokens=8, temperature=0) for prompt in (text, ids)]
    assert from_text["choices"] == from_ids["choices"]
    assert from_text["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 8, "total_tokens": len(ids) + 8}


async def test_sixteen_tokens_are_the_default(server: Server) -> None:
    assert (await server.whole(ignore_eos=True))["usage"]["completion_tokens"] == 16


async def test_every_chunk_has_its_usage_when_asked(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields: JSON = {"max_tokens": 5, "ignore_eos": True, "stream_options": options, "return_token_ids": True}
    for path, more, first in (("completions", {}, [1]), ("chat/completions", HELLO, [0, 1])):
        *chunks, last = await server.stream(path, **fields, **more)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [*first, 2, 3, 4, 5]
        assert [len(chunk["choices"][0].get("token_ids", [])) for chunk in chunks] == [*first[:-1], 1, 1, 1, 1, 1]
        assert last["choices"] == []
        assert last["usage"] == chunks[-1]["usage"]
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 5


async def test_usage_comes_once_at_the_end_or_not_at_all_when_no_more_is_asked(server: Server) -> None:
    *chunks, last = await server.stream(max_tokens=3, stream_options={"include_usage": True})
    assert last["usage"]["prompt_tokens"] == 3
    assert not any("usage" in chunk for chunk in chunks)
    assert not any("usage" in chunk for chunk in await server.stream(max_tokens=3))


async def test_a_seed_repeats_and_another_differs(server: Server) -> None:
    fields: JSON = {"temperature": 2.0, "max_tokens": 24, "return_token_ids": True, "ignore_eos": True}
    seeds: list[JSON] = [{"seed": 5}, {"seed": 5}, {"seed": 6}, {}, {}]
    one, again, other, free, free_again = [(await server.choice(**fields, **seed))["token_ids"] for seed in seeds]
    assert one == again
    assert one != other
    assert free != free_again


async def test_a_temperature_near_zero_is_greedy(server: Server) -> None:
    greedy, near = [await server.choice(max_tokens=12, temperature=heat, seed=1) for heat in (0, 1e-40)]
    assert near == greedy


async def test_an_end_of_text_token_ends_the_output_unless_it_is_ignored(serve: Serve) -> None:
    fields: JSON = {"temperature": 2.0, "seed": 5, "max_tokens": 10, "return_token_ids": True}
    ids = (await (await serve()).choice(**fields))["token_ids"]
    last = next(n for n in range(2, 10) if ids[n] not in ids[:n])
    server = await serve(eos=ids[last])
    ended = await server.whole(**fields)
    assert ended["choices"][0]["token_ids"] == ids[: last + 1]
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", last + 1)
    ignored = await server.choice(**fields, ignore_eos=True)
    assert (ignored["token_ids"], ignored["finish_reason"]) == (ids, "length")


async def test_an_end_of_text_token_does_not_come_before_min_tokens(serve: Serve) -> None:
    fields: JSON = {"temperature": 0, "max_tokens": 10, "return_token_ids": True}
    first = (await (await serve()).choice(**fields))["token_ids"][0]
    server = await serve(eos=first)
    assert (await server.choice(**fields))["token_ids"] == [first]
    later = (await server.choice(**fields, min_tokens=4))["token_ids"]
    assert len(later) >= 4
    assert first not in later[:4]


async def test_a_stop_string_ends_the_text_before_it(server: Server) -> None:
    fields: JSON = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    text = (await server.choice(**fields))["text"]
    stop = text[10:13]
    stopped = await server.whole(**fields, stop=["never said", stop])
    assert stopped["choices"][0]["text"] == text[: text.index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] < 30
    await server.until(running=0)


async def test_the_beginning_of_a_stop_string_at_the_end_of_the_output_is_said(server: Server) -> None:
    fields: JSON = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    text = (await server.choice(**fields))["text"]
    stop = text[-2:] + "never said"
    assert (await server.choice(**fields, stop=stop))["text"] == text
    assert said(await server.stream(**fields, stop=stop)) == text


async def test_a_stop_string_counts_only_after_min_tokens(server: Server) -> None:
    fields: JSON = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    text = (await server.choice(**fields))["text"]
    everything = await server.choice(**fields, min_tokens=30, stop=text[10:13])
    assert (everything["text"], everything["finish_reason"]) == (text, "length")


async def test_chat_parts_are_one_text(server: Server) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    fields: JSON = {"temperature": 0, "max_tokens": 8}
    whole = await server.whole("chat/completions", **HELLO, **fields)
    split = await server.whole("chat/completions", messages=[{"role": "user", "content": parts}], **fields)
    assert split["choices"] == whole["choices"]
    assert split["usage"] == whole["usage"]
    assert whole["choices"][0]["message"]["role"] == "assistant"


async def test_a_chat_may_fill_the_context(serve: Serve) -> None:
    server = await serve(max_model_len=64)
    usage = (await server.whole("chat/completions", **HELLO, ignore_eos=True))["usage"]
    assert usage["total_tokens"] == 64
    assert usage["completion_tokens"] > 10
    limited = await server.whole("chat/completions", **HELLO, ignore_eos=True, max_completion_tokens=3)
    assert limited["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "message"),
    [
        ("completions", {"model": "gpt5"}, 404, "model", "this server serves 'random:tiny'"),
        ("completions", {"prompt": []}, 400, "prompt", "at least one token"),
        ("completions", {"prompt": ""}, 400, "prompt", "at least one token"),
        ("completions", {"prompt": [1, 2048]}, 400, "prompt", "token id 2048 is not in 0..2047"),
        ("completions", {"prompt": [-1]}, 400, "prompt", "token id -1 is not in 0..2047"),
        ("completions", {"prompt": [10**30]}, 400, "prompt", "is not in 0..2047"),
        ("completions", {"max_tokens": 2046}, 400, "max_tokens", "3 prompt tokens + 2046"),
        ("completions", {"max_tokens": 4, "min_tokens": 5}, 400, "min_tokens", "5 is more than max_tokens, 4"),
        ("completions", {"min_tokens": 17}, 400, "min_tokens", "17 is more than max_tokens, 16"),
        ("completions", {"echo": True}, 400, "echo", "does not support the field"),
        ("completions", {"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", HELLO | {"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens", "either"),
        ("chat/completions", HELLO | {"prompt": "x"}, 400, "prompt", "does not support the field"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    server: Server, path: str, fields: JSON, status: int, param: str, message: str
) -> None:
    got_status, got_param, got_message = await server.error(path, **fields)
    assert (got_status, got_param) == (status, param)
    assert message in got_message
    assert await server.metric("request_total", outcome="rejected") == 1
    assert await server.metric("prompt_tokens_total") == 0


async def test_a_prompt_and_output_that_just_fit_are_served(serve: Serve) -> None:
    server = await serve(max_model_len=19)
    assert (await server.whole(ignore_eos=True))["usage"]["total_tokens"] == 19
    assert (await server.error(max_tokens=17))[0] == 400


async def test_a_model_without_a_chat_template_says_so(serve: Serve, tokenizer: Any) -> None:
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    server = await serve(tokenizer=bare)
    assert (await server.error("chat/completions", **HELLO))[:2] == (400, "messages")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "m", "prompt": "\xff"}', b'{"prompt": "\\ud800"}'])
async def test_a_body_that_is_no_request_is_a_400(server: Server, body: bytes) -> None:
    response = await server.client.post("/v1/completions", data=body)
    assert response.status == 400
    assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_the_model_and_its_context_are_listed(server: Server) -> None:
    listed = await (await server.client.get("/v1/models")).json()
    assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [("random:tiny", 2048)]


async def test_health_is_that_of_the_engine(server: Server) -> None:
    assert (await server.client.get("/health")).status == 200
    server.service.engine.close()
    assert (await server.client.get("/health")).status == 503


async def test_requests_are_served_one_at_a_time_in_the_order_they_came(server: Server) -> None:
    first = await server.post(**ENDLESS, stream=True)
    await server.until(running=1)
    order: list[int] = []

    async def ask(number: int) -> None:
        await server.whole(max_tokens=3)
        order.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(ask(number))
            await server.until(running=1, waiting=number + 1)
        assert await server.metric("num_requests_waiting") == 4
        assert await server.metric("num_requests_running") == 1
        first.close()
    assert order == [0, 1, 2, 3]


async def test_a_full_queue_is_a_429_that_says_when_to_come_again(serve: Serve) -> None:
    server = await serve(max_waiting=1)
    running = await server.post(**ENDLESS, stream=True)
    await server.until(running=1)
    waiting = asyncio.ensure_future(server.post(max_tokens=1))
    await server.until(running=1, waiting=1)
    refused = await server.post(max_tokens=1)
    assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
    assert (await refused.json())["error"]["type"] == "rate_limit_error"
    running.close()
    assert (await waiting).status == 200


async def test_where_none_may_wait_an_idle_engine_still_serves(serve: Serve) -> None:
    server = await serve(max_waiting=0)
    running = await server.post(**ENDLESS, stream=True)
    assert running.status == 200
    await server.until(running=1)
    assert (await server.post(max_tokens=1)).status == 429


async def test_a_client_that_leaves_a_stream_frees_the_engine(server: Server) -> None:
    response = await server.post(**ENDLESS, stream=True)
    await response.content.readline()
    assert server.service.engine.running == 1
    response.close()
    await server.until(running=0)
    assert await server.metric("request_total", outcome="cancelled") == 1
    assert 0 < await server.metric("generation_tokens_total") < 2000
    assert (await server.whole(max_tokens=2, ignore_eos=True))["usage"]["completion_tokens"] == 2


async def leave(asking: asyncio.Future[aiohttp.ClientResponse]) -> None:
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_a_client_that_leaves_before_the_whole_answer_frees_the_engine(server: Server) -> None:
    asking = asyncio.ensure_future(server.post(**ENDLESS))
    await server.until(running=1)
    await leave(asking)
    await server.until(running=0)
    assert await server.metric("request_total", outcome="cancelled") == 1


async def test_a_client_that_leaves_while_it_waits_loses_its_place(server: Server) -> None:
    running = await server.post(**ENDLESS, stream=True)
    await server.until(running=1)
    asking = asyncio.ensure_future(server.post(max_tokens=1))
    await server.until(running=1, waiting=1)
    await leave(asking)
    await server.until(running=1, waiting=0)
    assert await server.metric("request_total", outcome="cancelled") == 1
    running.close()


async def test_a_server_that_is_stopped_ends_its_work_at_once(server: Server) -> None:
    running = await server.post(**ENDLESS, stream=True)
    await server.until(running=1)
    begun = time.monotonic()
    server.service.engine.close()
    assert time.monotonic() - begun < 1
    assert server.service.engine.running == 0
    running.close()


async def test_outcomes_tokens_and_latencies_are_counted(server: Server) -> None:
    await server.whole(max_tokens=4, ignore_eos=True)
    await server.stream(max_tokens=6, ignore_eos=True)
    text = (await server.choice(temperature=0, max_tokens=8))["text"]
    stopped = await server.whole(temperature=0, max_tokens=8, stop=text[3:6])
    generated = 4 + 6 + 8 + stopped["usage"]["completion_tokens"]
    assert await server.metric("request_total", outcome="length") == 3
    assert await server.metric("request_total", outcome="stop") == 1
    assert await server.metric("prompt_tokens_total") == 4 * 3
    assert await server.metric("generation_tokens_total") == generated
    assert await server.metric("time_to_first_token_seconds_count") == 4
    assert await server.metric("inter_token_latency_seconds_count") == generated - 4
    assert await server.metric("e2e_request_latency_seconds_count") == 4
    parts = [await server.metric(f"{name}_seconds_sum") for name in ("time_to_first_token", "inter_token_latency")]
    assert sum(parts) == pytest.approx(await server.metric("e2e_request_latency_seconds_sum"))
    await server.until(running=0)
    assert await server.metric("num_requests_running") == 0


@pytest.fixture
def fail_once(weights: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the model's next generation fail after that many tokens."""

    def arm(tokens: int) -> None:
        generate = weights.generate

        def failing(ids: torch.Tensor, streamer: Any, **_: Any) -> None:
            monkeypatch.setattr(weights, "generate", generate)
            streamer.put(ids)
            for token in range(tokens):
                streamer.put(torch.tensor([400 + token]))
            raise RuntimeError("device lost")

        monkeypatch.setattr(weights, "generate", failing)

    return arm


async def test_an_engine_that_fails_is_a_500_and_serves_the_next(
    server: Server, fail_once: Callable[[int], None]
) -> None:
    fail_once(2)
    assert await server.error() == (500, None, "the engine failed: RuntimeError: device lost")
    assert await server.metric("request_total", outcome="error") == 1
    assert await server.metric("request_total", outcome="rejected") == 0
    assert (await server.whole(max_tokens=2, ignore_eos=True))["usage"]["completion_tokens"] == 2


async def test_an_engine_that_fails_inside_a_stream_says_so_in_it_and_serves_the_next(
    server: Server, fail_once: Callable[[int], None], tokenizer: Any
) -> None:
    fail_once(2)
    response = await server.post(stream=True)
    assert response.status == 200
    *chunks, error, rest = (await response.text()).split("\n\n")
    assert rest == ""
    assert said([json.loads(chunk.removeprefix("data: ")) for chunk in chunks]) == tokenizer.decode([400, 401])
    assert (
        json.loads(error.removeprefix("data: "))["error"]["message"] == "the engine failed: RuntimeError: device lost"
    )
    assert await server.metric("request_total", outcome="error") == 1
    assert await server.metric("generation_tokens_total") == 2
    assert len(await server.stream(max_tokens=2, ignore_eos=True)) == 2
