"""Requests and responses of the OpenAI API."""

import json
from typing import Any

import pytest

from servers.hf.api import ApiError, ChatRequest, CompletionRequest, Delta, GenerationRequest, Reply, parse, timing


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "x", **fields}).encode())


def chat(content: Any = "x", role: Any = "user", **fields: Any) -> ChatRequest:
    message = {"role": role, "content": content}
    return parse(ChatRequest, json.dumps({"model": "m", "messages": [message], **fields}).encode())


def refusal(kind: type[GenerationRequest], body: bytes) -> dict[str, Any]:
    with pytest.raises(ApiError) as refused:
        parse(kind, body)
    assert refused.value.status == 400
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    error: dict[str, Any] = refused.value.body["error"]
    return error


def test_what_is_not_given_is_openais_default() -> None:
    asked = completion()
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.seed) == (None, 1.0, 1.0, None)
    assert (asked.stream, asked.stops, asked.ignore_eos, asked.min_tokens) == (False, (), False, 0)


@pytest.mark.parametrize(
    "field", [name for name in CompletionRequest.model_fields if name not in ("model", "prompt")] + ["n", "logprobs"]
)
def test_null_means_not_given(field: str) -> None:
    assert completion(**{field: None}) == completion()


@pytest.mark.parametrize("field", ["n", "best_of", "logprobs", "echo", "presence_penalty", "frequency_penaltyy"])
def test_an_unknown_field_is_refused_by_name(field: str) -> None:
    error = refusal(CompletionRequest, json.dumps({"model": "m", "prompt": "x", field: 2}).encode())
    assert error["message"] == f"{field}: this server does not support the field (value 2)"
    assert error["param"] == field


def test_an_unknown_field_inside_another_is_refused_by_its_whole_name() -> None:
    body = {"model": "m", "prompt": "x", "stream": True, "stream_options": {"include_obfuscation": True}}
    error = refusal(CompletionRequest, json.dumps(body).encode())
    assert error["param"] == "stream_options.include_obfuscation"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens: 0: Input should be greater than or equal to 1"),
        ("min_tokens", -1, "min_tokens: -1: Input should be greater than or equal to 0"),
        ("temperature", 2.5, "temperature: 2.5: Input should be less than or equal to 2"),
        ("temperature", -0.1, "temperature: -0.1: Input should be greater than or equal to 0"),
        ("top_p", 0, "top_p: 0: Input should be greater than 0"),
        ("top_p", 1.1, "top_p: 1.1: Input should be less than or equal to 1"),
        ("top_k", -2, "top_k: -2: Input should be greater than or equal to -1"),
        ("seed", 2**63, "seed: 9223372036854775808: Input should be less than 9223372036854775808"),
        ("max_tokens", "many", "max_tokens: 'many': Input should be a valid integer"),
        ("stream", "perhaps", "stream: 'perhaps': Input should be a valid boolean"),
        ("prompt", 5, "prompt: 5: Input should be a valid string"),
        ("prompt", ["a", "b"], "prompt: ['a', 'b']: Input should be a valid string"),
        ("stop", 5, "stop: 5: Input should be a valid string"),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_what_is_allowed(field: str, value: object, message: str) -> None:
    error = refusal(CompletionRequest, json.dumps({"model": "m", "prompt": "x", field: value}).encode())
    assert error["message"].startswith(message)
    assert error["param"] == field


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"stop": ["a", ""]}, "stop", "stop: an empty string is not allowed"),
        ({"stop": ""}, "stop", "stop: an empty string is not allowed"),
        ({"stream_options": {}}, "stream_options", "stream_options: only allowed with stream: true"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(CompletionRequest, json.dumps({"model": "m", "prompt": "x", **fields}).encode())
    assert (error["message"], error["param"]) == (message, param)


def test_a_missing_field_is_named() -> None:
    assert refusal(CompletionRequest, b'{"model": "m"}')["param"] == "prompt"
    assert refusal(ChatRequest, b'{"model": "m"}')["param"] == "messages"


def test_a_long_value_is_shown_in_part() -> None:
    error = refusal(CompletionRequest, json.dumps({"model": "m", "prompt": "x", "n": "y" * 10_000}).encode())
    assert len(error["message"]) < 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b'{"model": "m", "prompt": "\xff"}']
)
def test_a_body_that_is_no_object_is_refused_without_a_field(body: bytes) -> None:
    error = refusal(CompletionRequest, body)
    assert error["param"] is None
    assert error["message"]


def test_stops_are_one_or_several() -> None:
    assert completion(stop="a").stops == ("a",)
    assert completion(stop=["a", "b"]).stops == ("a", "b")
    assert completion(stop=[]).stops == ()


def test_a_prompt_is_text_or_token_ids() -> None:
    assert completion(prompt="abc").prompt == "abc"
    assert completion(prompt=[1, 2]).prompt == [1, 2]


def test_the_text_of_a_message_is_the_sum_of_its_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(parts).messages[0].text == chat("ab").messages[0].text == "ab"
    assert chat([]).messages[0].text == ""


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "tool", "content": "x"}, "messages.0.role"),
        ({"role": "user", "content": "x", "name": "y"}, "messages.0.name"),
    ],
)
def test_what_is_wrong_with_a_message_is_named(message: dict[str, Any], param: str) -> None:
    error = refusal(ChatRequest, json.dumps({"model": "m", "messages": [message]}).encode())
    assert error["param"] == param


def test_a_chat_needs_a_message() -> None:
    assert refusal(ChatRequest, b'{"model": "m", "messages": []}')["param"] == "messages"


def reply(is_chat: bool, ids: bool = False) -> Reply:
    return Reply("id", 5, "m", is_chat, (1, 2, 3), ids)


def test_a_whole_completion_and_a_whole_chat() -> None:
    delta = Delta("ab", (7, 8), "length")
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    common = {"id": "id", "created": 5, "model": "m", "usage": usage}
    choice = {"index": 0, "logprobs": None, "finish_reason": "length"}
    assert reply(False).whole(delta, {}) == common | {"object": "text_completion", "choices": [choice | {"text": "ab"}]}
    message = {"role": "assistant", "content": "ab"}
    assert reply(True).whole(delta, {}) == common | {
        "object": "chat.completion",
        "choices": [choice | {"message": message}],
    }


def test_token_ids_are_returned_where_vllm_returns_them() -> None:
    delta = Delta("ab", (7, 8))
    first, later = (reply(False, ids=True).chunk(delta, first)["choices"][0] for first in (True, False))
    assert (first["token_ids"], first["prompt_token_ids"]) == ([7, 8], [1, 2, 3])
    assert "prompt_token_ids" not in later
    assert reply(True, ids=True).role_chunk()["prompt_token_ids"] == [1, 2, 3]
    assert "prompt_token_ids" not in reply(True, ids=True).chunk(delta, first=True)["choices"][0]
    assert reply(False, ids=True).whole(delta, {})["choices"][0]["prompt_token_ids"] == [1, 2, 3]
    assert reply(True, ids=True).whole(delta, {})["prompt_token_ids"] == [1, 2, 3]


def test_token_ids_are_not_returned_unasked() -> None:
    for is_chat in (False, True):
        chunks = [reply(is_chat).chunk(Delta("a", (7,)), first=True), reply(is_chat).whole(Delta("a", (7,)), {})]
        assert "token_ids" not in json.dumps([*chunks, reply(is_chat).role_chunk()])


def test_the_usage_chunk_has_no_choices() -> None:
    chunk = reply(True).usage_chunk(4, {})
    assert (chunk["object"], chunk["choices"]) == ("chat.completion.chunk", [])
    assert chunk["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert "metrics" not in chunk


def test_what_was_measured_stands_beside_the_usage() -> None:
    measured = timing(arrived=1.0, started=1.5, first=2.0, last=5.0, tokens=4)
    for body in (reply(True).usage_chunk(4, measured), reply(False).whole(Delta("a", (7, 8, 9, 10)), measured)):
        assert body["usage"]["completion_tokens"] == 4
        assert body["metrics"] == {
            "queue_time_ms": 500.0,
            "time_to_first_token_ms": 500.0,
            "generation_time_ms": 3000.0,
            "mean_itl_ms": 1000.0,
            "tokens_per_second": pytest.approx(4 / 3.5),
        }


def test_one_token_has_no_latency_between_tokens() -> None:
    metrics = timing(arrived=1.0, started=1.0, first=2.0, last=2.0, tokens=1)["metrics"]
    assert metrics == {
        "queue_time_ms": 0.0,
        "time_to_first_token_ms": 1000.0,
        "generation_time_ms": 0.0,
        "tokens_per_second": 1.0,
    }


def test_a_rate_over_no_time_is_not_said() -> None:
    assert "tokens_per_second" not in timing(arrived=1.0, started=2.0, first=2.0, last=2.0, tokens=1)["metrics"]
