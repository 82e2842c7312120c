"""The HF server over HTTP: the real application and every engine around the real tiny model."""

import asyncio
import copy
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import torch
import transformers

from tests.unit.servers.harness import ENDLESS, HELLO, JSON, PROMPT, RUNGS, Serve, Server, each_rung, said, serving


@pytest.fixture
async def serve(weights: Any, tokenizer: Any) -> AsyncIterator[Serve]:
    async with serving(weights, tokenizer) as serve:
        yield serve


@pytest.fixture(params=RUNGS)
async def server(serve: Serve, request: pytest.FixtureRequest) -> Server:
    """A server with each of the engines: they differ in speed and memory, and in nothing that is said over HTTP."""
    return await serve(request.param)


@pytest.fixture
async def sequential(serve: Serve) -> Server:
    return await serve("sequential")


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


async def test_requests_at_the_same_time_get_the_answers_that_they_get_alone(server: Server) -> None:
    """Prompts of different lengths, greedy and seeded rows, early ends and stop strings share the batches."""
    text = (await server.choice(temperature=0, max_tokens=30, ignore_eos=True))["text"]
    asked: list[JSON] = [
        {"temperature": 0, "max_tokens": 30, "ignore_eos": True},
        {"temperature": 0, "max_tokens": 30, "ignore_eos": True, "stop": text[10:13]},
        {"prompt": list(range(100, 190)), "temperature": 0, "max_tokens": 3},
        {"temperature": 1.0, "seed": 11, "max_tokens": 25, "prompt": "Once upon a time"},
        {"temperature": 1.0, "seed": 12, "max_tokens": 12, "top_k": 40, "prompt": [7]},
        {"temperature": 1.3, "seed": 11, "max_tokens": 1},
        {"temperature": 0, "max_tokens": 20, "prompt": "Tell me a story. " * 10},
    ]
    alone = [await server.choice(**fields, return_token_ids=True) for fields in asked]
    together = await asyncio.gather(*[server.choice(**fields, return_token_ids=True) for fields in asked])
    assert together == alone


async def test_a_text_prompt_is_the_same_as_its_tokens(sequential: Server, tokenizer: Any) -> None:
    text = "Thanks for the fish"
    ids = tokenizer(text)["input_ids"]
    from_text, from_ids = [await sequential.whole(prompt=prompt, max_tokens=8, temperature=0) for prompt in (text, ids)]
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
    *chunks, last = await server.stream(max_tokens=3, ignore_eos=True, stream_options={"include_usage": True})
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
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


async def test_one_of_one_token_is_greedy_at_any_temperature(server: Server) -> None:
    fields: JSON = {"max_tokens": 12, "temperature": 2.0, "seed": 1}
    greedy = await server.choice(max_tokens=12, temperature=0)
    assert await server.choice(**fields, top_k=1) == greedy
    assert await server.choice(**fields, top_p=1e-6) == greedy
    assert await server.choice(**fields) != greedy


@each_rung
async def test_an_end_of_text_token_ends_the_output_unless_it_is_ignored(serve: Serve, rung: str) -> None:
    fields: JSON = {"temperature": 2.0, "seed": 5, "max_tokens": 10, "return_token_ids": True}
    ids = (await (await serve(rung)).choice(**fields))["token_ids"]
    last = next(n for n in range(2, 10) if ids[n] not in ids[:n])
    server = await serve(rung, eos=ids[last])
    ended = await server.whole(**fields)
    assert ended["choices"][0]["token_ids"] == ids[: last + 1]
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", last + 1)
    ignored = await server.choice(**fields, ignore_eos=True)
    assert (ignored["token_ids"], ignored["finish_reason"]) == (ids, "length")


@each_rung
async def test_an_end_of_text_token_does_not_come_before_min_tokens(serve: Serve, rung: str) -> None:
    fields: JSON = {"temperature": 0, "max_tokens": 10, "return_token_ids": True}
    first = (await (await serve(rung)).choice(**fields))["token_ids"][0]
    server = await serve(rung, eos=first)
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
    await server.until_released()


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


async def test_chat_parts_are_one_text(sequential: Server) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    fields: JSON = {"temperature": 0, "max_tokens": 8}
    whole = await sequential.whole("chat/completions", **HELLO, **fields)
    split = await sequential.whole("chat/completions", messages=[{"role": "user", "content": parts}], **fields)
    assert split["choices"] == whole["choices"]
    assert split["usage"] == whole["usage"]
    assert whole["choices"][0]["message"]["role"] == "assistant"


@each_rung
async def test_a_chat_may_fill_the_context(serve: Serve, rung: str) -> None:
    server = await serve(rung, max_model_len=64)
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
        ("completions", {"prompt": [5] * 2048, "max_tokens": 1}, 400, "max_tokens", "2048 prompt tokens + 1"),
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
    sequential: Server, path: str, fields: JSON, status: int, param: str, message: str
) -> None:
    got_status, got_param, got_message = await sequential.error(path, **fields)
    assert (got_status, got_param) == (status, param)
    assert message in got_message
    assert sequential.outcomes() == {"rejected": 1}
    assert await sequential.metric("prompt_tokens_total") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_an_http_status_with_every_engine_streamed_or_not(server: Server, stream: bool) -> None:
    assert (await server.error(max_tokens=2046, stream=stream))[:2] == (400, "max_tokens")
    assert (await server.error(model="gpt5", stream=stream))[:2] == (404, "model")
    assert server.outcomes() == {"rejected": 2}


@each_rung
@pytest.mark.parametrize("rows", [1, 3])
async def test_a_prompt_and_output_that_just_fit_are_served(serve: Serve, rung: str, rows: int) -> None:
    """19 tokens are no whole number of blocks; the context must be usable to its end nevertheless."""
    server = await serve(rung, max_model_len=19, max_batch=rows)
    assert (await server.whole(ignore_eos=True))["usage"]["total_tokens"] == 19
    assert (await server.error(max_tokens=17))[0] == 400


async def test_a_model_without_a_chat_template_says_so(serve: Serve, tokenizer: Any) -> None:
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    server = await serve(tokenizer=bare)
    assert (await server.error("chat/completions", **HELLO))[:2] == (400, "messages")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "m", "prompt": "\xff"}', b'{"prompt": "\\ud800"}'])
async def test_a_body_that_is_no_request_is_a_400(sequential: Server, body: bytes) -> None:
    response = await sequential.client.post("/v1/completions", data=body)
    assert response.status == 400
    assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_the_model_and_its_context_are_listed(sequential: Server) -> None:
    listed = await (await sequential.client.get("/v1/models")).json()
    assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [("random:tiny", 2048)]


async def test_it_says_what_serves(sequential: Server) -> None:
    told = await (await sequential.client.get("/version")).json()
    assert told == {"transformers": transformers.__version__, "torch": torch.__version__}


async def test_health_is_that_of_the_engine(server: Server) -> None:
    assert await server.health() == 200
    await server.engine.close()
    assert await server.health() == 503


async def test_sequential_requests_are_served_one_at_a_time_in_the_order_they_came(sequential: Server) -> None:
    (first,) = await sequential.begin()
    await sequential.until(running=1)
    order: list[int] = []

    async def ask(number: int) -> None:
        await sequential.whole(max_tokens=3)
        order.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(ask(number))
            await sequential.until(running=1, waiting=number + 1)
        assert await sequential.metric("num_requests_waiting") == 4
        assert await sequential.metric("num_requests_running") == 1
        first.close()
    assert order == [0, 1, 2, 3]


async def test_a_client_that_leaves_a_stream_frees_the_engine(server: Server) -> None:
    (response,) = await server.begin()
    assert server.engine.running == 1
    response.close()
    await server.until_released()
    assert server.outcomes() == {"cancelled": 1}
    assert 0 < await server.metric("generation_tokens_total") < 2000
    assert (await server.whole(max_tokens=2, ignore_eos=True))["usage"]["completion_tokens"] == 2


async def leave(asking: asyncio.Future[aiohttp.ClientResponse]) -> None:
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_a_client_that_leaves_before_the_whole_answer_frees_the_engine(server: Server) -> None:
    asking = asyncio.ensure_future(server.post(**ENDLESS))
    await server.until(running=1)
    await leave(asking)
    await server.until_released()
    assert server.outcomes() == {"cancelled": 1}


@each_rung
async def test_a_client_that_leaves_while_it_waits_loses_its_place(serve: Serve, rung: str) -> None:
    server = await serve(rung, max_batch=2, max_wait=0.4)
    rows = server.engine.limits.max_batch
    running = await server.begin(rows)
    asking = asyncio.ensure_future(server.post(max_tokens=1))
    await server.until(running=rows, waiting=1)
    await leave(asking)
    await server.until(running=rows, waiting=0)
    assert server.outcomes() == {"cancelled": 1}
    for response in running:
        response.close()
    await server.until_released()
    assert server.outcomes() == {"cancelled": 1 + rows}


async def test_a_server_that_is_stopped_ends_its_work_at_once_and_says_why(server: Server) -> None:
    (running,) = await server.begin()
    begun = time.monotonic()
    await server.engine.close()
    assert time.monotonic() - begun < 2
    assert server.engine.running == 0
    last = (await running.text()).split("\n\n")[-2]
    assert '"message":"the server is shutting down"' in last
    assert '"code":503' in last
    assert (await server.error())[0] == 503
