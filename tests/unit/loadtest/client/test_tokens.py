"""From the events of a stream to tokens and times."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.client.tokens import Output, read_stream

DONE = "[DONE]"


def usage(output: int, prompt: int = 7) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def text(content: str, finish: str | None = None, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": content, "finish_reason": finish, **choice}]}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def read(*events: dict[str, Any] | str, max_tokens: int = 100) -> Output:
    """Read events that come 10 ns apart; the first at 10."""
    data = [(event if isinstance(event, str) else json.dumps(event)).encode() for event in events]
    return read_stream([(10 * n, piece) for n, piece in enumerate(data, 1)], max_tokens)


def test_a_completion_with_usage_in_every_chunk() -> None:
    out = read(text("a") | {"usage": usage(1)}, text("b", "length") | {"usage": usage(2)}, DONE)
    assert out == Output(7, 2, "usage", "length", [10, 20], [1, 1])


def test_a_chat_whose_first_chunk_holds_only_the_role_starts_with_its_first_token() -> None:
    out = read(
        delta(role="assistant", content="") | {"usage": usage(0)},
        delta(content="a") | {"usage": usage(1)},
        delta("stop", content="b") | {"usage": usage(2)},
        {"choices": [], "usage": usage(2)},
        DONE,
    )
    assert out == Output(7, 2, "usage", "stop", [20, 30], [1, 1])


def test_a_role_without_usage_is_no_output_either() -> None:
    out = read(delta(role="assistant", content=""), delta(content="a"), delta("stop"), DONE)
    assert (out.chunk_ns, out.error) == ([20], None)


@pytest.mark.parametrize("field", ["content", "reasoning", "reasoning_content", "refusal", "tool_calls"])
def test_whatever_a_delta_says_is_output(field: str) -> None:
    assert read(delta(role="assistant"), delta(**{field: "x"}), delta("stop"), DONE).chunk_ns == [20]


def test_several_tokens_in_a_chunk_are_counted_from_usage() -> None:
    out = read(text("a") | {"usage": usage(1)}, text("bcd") | {"usage": usage(4)}, text("e", "length"), DONE)
    assert (out.output_tokens, out.chunk_ns) == (4, [10, 20, 30])
    out = read(text("a") | {"usage": usage(1)}, text("bcd", "length") | {"usage": usage(4)}, DONE)
    assert (out.output_tokens, out.chunk_ns, out.chunk_tokens) == (4, [10, 20], [1, 3])


def test_a_token_whose_text_is_held_back_counts_when_usage_tells_of_it() -> None:
    out = read(text("") | {"usage": usage(1)}, text("é") | {"usage": usage(2)}, text("", "length"), DONE)
    assert (out.output_tokens, out.chunk_ns, out.chunk_tokens) == (2, [10, 20], [1, 1])


def test_empty_chunks_hold_no_tokens() -> None:
    out = read(text("") | {"usage": usage(0)}, text("a") | {"usage": usage(1)}, text("", "stop") | {"usage": usage(1)})
    assert (out.chunk_ns, out.chunk_tokens, out.error) == ([20], [1], None)


def test_usage_that_comes_only_at_the_end_gives_the_count_but_not_the_tokens_of_each_chunk() -> None:
    out = read(
        text("a") | {"usage": None}, text("b", "stop") | {"usage": None}, {"choices": [], "usage": usage(5)}, DONE
    )
    assert out == Output(7, 5, "usage", "stop", [10, 20], [])


def test_usage_of_the_whole_in_an_empty_last_chunk_is_no_output() -> None:
    out = read(text("a"), text("b"), text("", "length") | {"usage": usage(5)}, DONE)
    assert out == Output(7, 5, "usage", "length", [10, 20], [])


def test_without_usage_token_ids_are_counted() -> None:
    out = read(text("a", token_ids=[5]), text("bc", token_ids=[6, 7]), text("", "length", token_ids=[]), DONE)
    assert out == Output(None, 3, "token_ids", "length", [10, 20], [1, 2])


def test_usage_is_believed_before_token_ids() -> None:
    out = read(text("a", "stop", token_ids=[5, 6]), {"choices": [], "usage": usage(3)}, DONE)
    assert (out.output_tokens, out.token_source, out.chunk_tokens) == (3, "usage", [])


def test_without_any_count_an_output_that_was_cut_at_its_length_has_max_tokens_and_says_so() -> None:
    out = read(text("a"), text("b", "length"), DONE, max_tokens=50)
    assert out == Output(None, 50, "max_tokens", "length", [10, 20], [])


def test_without_any_count_the_length_of_an_output_that_ended_by_itself_is_unknown() -> None:
    out = read(text("a"), text("b", "stop"), DONE)
    assert out == Output(None, None, "unknown", "stop", [10, 20], [])


def test_a_missing_done_is_no_error_once_the_reason_of_the_end_was_given() -> None:
    assert read(text("a", "stop") | {"usage": usage(1)}).error is None


def test_a_missing_reason_of_the_end_is_no_error_when_done_follows_output() -> None:
    out = read(text("a") | {"usage": usage(1)}, DONE, max_tokens=1)
    assert (out.error, out.output_tokens) == (None, 1)
    assert read(text("a"), DONE).error is None  # nobody counts


@pytest.mark.parametrize("counts", [{"usage": usage(2)}, {}])
def test_an_answer_without_a_reason_of_its_end_and_with_fewer_tokens_than_asked_for_is_truncated(
    counts: dict[str, Any],
) -> None:
    out = read(text("ab", token_ids=[5, 6]) | counts, DONE, max_tokens=10)
    assert (out.error, out.output_tokens, out.chunk_tokens) == ("truncated", None, [2])
    assert out.error_detail == "the answer ended after 2 of 10 tokens without a finish_reason"


@pytest.mark.parametrize("reason", ["abort", "error", "insufficient_system_resource"])
def test_an_answer_that_the_server_gave_up_is_a_failure(reason: str) -> None:
    out = read(text("a") | {"usage": usage(1)}, text("b", reason) | {"usage": usage(2)}, DONE, max_tokens=10)
    assert (out.error, out.finish_reason, out.output_tokens, out.chunk_tokens) == ("truncated", reason, None, [1, 1])
    assert out.error_detail == f"the server gave the answer up: finish_reason '{reason}'"


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "function_call", "content_filter"])
def test_the_ends_that_the_api_knows_are_no_failures(reason: str) -> None:
    out = read(text("a") | {"usage": usage(1)}, text("b", reason) | {"usage": usage(2)}, DONE, max_tokens=10)
    assert (out.error, out.output_tokens) == (None, 2)


def test_a_number_of_prompt_tokens_that_is_null_is_unknown() -> None:
    unknown = {"prompt_tokens": None, "completion_tokens": 1}
    out = read(text("a", "stop") | {"usage": unknown}, DONE)
    assert (out.error, out.prompt_tokens, out.output_tokens) == (None, None, 1)
    out = read(text("a", "stop") | {"usage": usage(1)}, {"choices": [], "usage": unknown}, DONE)
    assert (out.error, out.prompt_tokens, out.output_tokens) == (None, 7, 1)


@pytest.mark.parametrize(
    "events",
    [[], [DONE], [text("a")], [text("a") | {"usage": usage(1)}], [{"choices": [], "usage": usage(0)}, DONE]],
    ids=["nothing", "only done", "no end", "no end, with usage", "no output"],
)
def test_a_stream_without_its_last_token_is_truncated(events: list[dict[str, Any] | str]) -> None:
    out = read(*events)
    assert (out.error, out.error_detail) == ("truncated", "the stream ended without its last token")
    assert out.output_tokens is None


def test_chunks_of_a_stream_that_is_cut_off_are_not_taken_for_tokens() -> None:
    assert read(text("a") | {"usage": usage(1)}, text("bc") | {"usage": usage(3)}).chunk_tokens == [1, 2]
    out = read(text("a"), text("bc"))
    assert (out.error, out.chunk_ns, out.chunk_tokens) == ("truncated", [10, 20], [])


@pytest.mark.parametrize("before", [[], [text("a") | {"usage": usage(1)}], [text("a", "stop") | {"usage": usage(1)}]])
def test_an_error_event_inside_a_200_is_an_error(before: list[dict[str, Any]]) -> None:
    out = read(*before, {"error": {"message": "out of memory", "code": 500}}, DONE)
    assert out.error == "sse_error"
    assert "out of memory" in str(out.error_detail)
    assert out.output_tokens is None


def test_a_flat_error_event_is_an_error_too() -> None:
    out = read(text("a") | {"usage": usage(1)}, {"object": "error", "message": "out of memory", "code": 500}, DONE)
    assert out.error == "sse_error"
    assert "out of memory" in str(out.error_detail)


def test_an_error_that_is_null_is_none() -> None:
    assert read(text("a", "stop") | {"error": None}).error is None


@pytest.mark.parametrize(
    "data",
    [
        '{"choices": [',
        "not JSON",
        "",
        "5",
        "null",
        '["a"]',
        '{"choices": 5}',
        '{"choices": {"text": "a"}}',
        '{"choices": ["a"]}',
        '{"choices": [{"delta": "a"}]}',
        '{"choices": [{"text": "a", "token_ids": 5}]}',
        '{"choices": [], "usage": 5}',
        '{"choices": [], "usage": {"prompt_tokens": 5}}',
        '{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": "six"}}',
        '{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": null}}',
        '{"choices": [{"text": "a"}], "usage": {"prompt_tokens": 5, "completion_tokens": "six"}}',
        pytest.param("[" * 100_000, id="nested too deep"),
    ],
)
def test_what_is_no_chunk_is_malformed_and_shown(data: str) -> None:
    out = read(text("a"), data, text("b", "stop"), DONE)
    assert out.error == "malformed"
    assert repr(data.encode())[2:20].rstrip("'") in str(out.error_detail)


def test_bytes_that_are_no_utf_8_are_malformed() -> None:
    assert read_stream([(1, b'{"choices": [{"text": "\xff"}]}')], 1).error == "malformed"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "choices usage error text delta finish_reason token_ids content prompt_tokens completion_tokens".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=50)
@given(st.lists(JSON, max_size=4))
def test_no_json_makes_the_reader_raise(chunks: list[Any]) -> None:
    out = read(*(json.dumps(chunk) for chunk in chunks), DONE)
    assert len(out.chunk_tokens) in (0, len(out.chunk_ns))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.booleans())
def test_the_tokens_of_the_chunks_add_up_to_the_output(sizes: list[int], from_usage: bool) -> None:
    events, total = [], 0
    for size in sizes:
        total += size
        chunk = text("x", token_ids=[9] * size)
        events.append(chunk | {"usage": usage(total)} if from_usage else chunk)
    out = read(*events, text("", "length", token_ids=[]) | ({"usage": usage(total)} if from_usage else {}), DONE)
    assert out.output_tokens == total
    assert out.chunk_tokens == [size for size in sizes if size]
    assert out.chunk_ns == [10 * n for n, size in enumerate(sizes, 1) if size]
