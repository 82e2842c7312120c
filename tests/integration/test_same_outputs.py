"""Both servers hold the same weights: greedy outputs in float32 are equal, token by token, with every engine."""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiment.run.stack import Stack
from tests.integration.hf_server import JSON, HfServer

PROMPTS: list[str | list[int]] = [
    "Hello!",
    "Tell me a story about artificial intelligence and machine learning. " * 10,
    "a",
    [300, 301, 302, 1299],
    list(range(300, 1300)),
]


#: Each with the options of the HF server that choose it. A batch waits long enough for all that is asked at once; a
#: compiled one is compiled for 1, 2 and 4 rows, which takes most of its time here.
BATCH = ["--engine", "batch", "--max-wait-ms", "500"]
RUNGS = {
    "sequential static": ["--cache", "static"],
    "sequential compiled": ["--compile"],
    "batch": BATCH,
    "batch static": [*BATCH, "--cache", "static"],
    "batch compiled": [*BATCH, "--compile", "--max-batch", "4"],
    "continuous": ["--engine", "continuous"],
}
CHOSEN: JSON = {"model": "random:tiny", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
#: Prompts of 1 to 1,000 tokens, each with a long and a short output; kernels round differently, and 100 tokens is how
#: far the outputs are known to agree on any device.
MIXED: list[JSON] = [CHOSEN | {"prompt": prompt, "max_tokens": count} for prompt in PROMPTS for count in (100, 9)]


def ask(url: str, body: JSON) -> Any:
    """The answer to a request, or the chunks of a stream."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        text = response.read().decode()
    if not body.get("stream"):
        return json.loads(text)
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def post(stack: Stack, server: str, path: str, body: JSON) -> Any:
    return ask(stack.programs[server].url + path, {"model": "random:tiny", **body})


def ask_at_once(url: str, bodies: Sequence[JSON]) -> list[JSON]:
    """The choices of completions that are asked for at the same time."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return [answer["choices"][0] for answer in pool.map(partial(ask, url + "/v1/completions"), bodies)]


@pytest.fixture(scope="module")
def of_vllm(stack: Stack) -> list[JSON]:
    """The answers that MIXED gets from vLLM."""
    return ask_at_once(stack.programs["vllm"].url, MIXED)


@pytest.fixture(params=["sequential", *RUNGS])
def url(request: pytest.FixtureRequest, stack: Stack, tmp_path: Path) -> Iterator[str]:
    """URL of an HF server with each engine; the one that is up for all tests is sequential."""
    if request.param not in RUNGS:
        yield stack.programs["hf"].url
        return
    with HfServer(tmp_path / "hf.log", *RUNGS[request.param]) as hf:
        yield hf.wait_until_ready().url


def test_every_engine_and_vllm_give_the_same_tokens_to_requests_of_mixed_lengths_at_once(
    url: str, of_vllm: list[JSON]
) -> None:
    choices = ask_at_once(url, MIXED)
    for asked, choice, other in zip(MIXED, choices, of_vllm, strict=True):
        assert len(choice["token_ids"]) == asked["max_tokens"]
        for field in ("prompt_token_ids", "token_ids", "text", "finish_reason"):
            assert choice[field] == other[field], (field, asked)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "long", "one letter", "few ids", "1,000 ids"])
def test_greedy_completions_are_equal_token_by_token(stack: Stack, prompt: str | list[int]) -> None:
    body = {
        "prompt": prompt,
        "max_tokens": 100,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    hf, vllm = (post(stack, server, "/v1/completions", body) for server in ("hf", "vllm"))
    for field in ("token_ids", "prompt_token_ids", "text", "finish_reason"):
        assert hf["choices"][0][field] == vllm["choices"][0][field], field
    assert len(hf["choices"][0]["token_ids"]) == 100
    assert all(hf["usage"][key] == vllm["usage"][key] for key in hf["usage"])


def test_greedy_chats_are_equal(stack: Stack) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    body = {"messages": messages, "max_completion_tokens": 40, "temperature": 0, "return_token_ids": True}
    hf, vllm = (post(stack, server, "/v1/chat/completions", body) for server in ("hf", "vllm"))
    assert hf["choices"][0]["message"]["content"] == vllm["choices"][0]["message"]["content"]
    assert hf["choices"][0]["token_ids"] == vllm["choices"][0]["token_ids"]
    assert hf["prompt_token_ids"] == vllm["prompt_token_ids"]


def test_streams_carry_the_same_chunks_of_tokens_and_usage(stack: Stack) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "Hello!", "max_tokens": 30, "temperature": 0, "stream": True, "stream_options": options}
    hf, vllm = (post(stack, server, "/v1/completions", body) for server in ("hf", "vllm"))
    for chunks in (hf, vllm):
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 30
        assert chunks[-1]["choices"] == []
    texts = ["".join(c["choices"][0]["text"] for c in chunks if c["choices"]) for chunks in (hf, vllm)]
    assert texts[0] == texts[1] != ""


def test_a_stop_string_cuts_both_outputs_at_the_same_place(stack: Stack) -> None:
    body = {"prompt": "Hello!", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    whole = post(stack, "hf", "/v1/completions", body)["choices"][0]["text"]
    stop = whole[20:26]
    hf, vllm = (post(stack, server, "/v1/completions", body | {"stop": stop}) for server in ("hf", "vllm"))
    assert hf["choices"][0]["text"] == vllm["choices"][0]["text"] == whole[: whole.index(stop)]
    assert hf["choices"][0]["finish_reason"] == vllm["choices"][0]["finish_reason"] == "stop"
    assert hf["usage"]["completion_tokens"] == vllm["usage"]["completion_tokens"]


def test_a_seed_gives_the_same_tokens_every_time(stack: Stack) -> None:
    body = {"prompt": "Hello!", "max_tokens": 40, "temperature": 0.7, "top_p": 0.9, "return_token_ids": True}
    for server in ("hf", "vllm"):
        runs = [
            post(stack, server, "/v1/completions", body | {"seed": seed})["choices"][0]["token_ids"]
            for seed in (7, 7, 8)
        ]
        assert runs[0] == runs[1] != runs[2], server
