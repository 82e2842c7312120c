"""Server-sent events from bytes that come in any pieces."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadtest import sse
from loadtest.sse import Decoder

STREAM = "data: é€😀\n\n: comment\n\nevent: x\ndata: one\ndata:two\n\ndata: [DONE]\n\n"
STREAM_EVENTS = ["é€😀", "one\ntwo", "[DONE]"]

LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=6)


def decode(*pieces: bytes) -> list[str]:
    decoder = Decoder()
    return [data.decode() for piece in pieces for data in decoder.feed(piece)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[start:end] for start, end in pairwise(borders)]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """The lines of one block, and the events that they make."""
    lines = draw(st.lists(LINES, min_size=1, max_size=3))
    kind = draw(st.sampled_from(["data: ", "data:", ": ", "event: ", "retry: "]))
    if not kind.startswith("data"):
        return [kind + line for line in lines], []
    values = lines if kind == "data: " else [line.removeprefix(" ") for line in lines]
    return [kind + line for line in lines], ["\n".join(values)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(blocks(), max_size=5), st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 300), max_size=12)
)
@example([(["data: €"], ["€"])], "\r\n", list(range(20)))
def test_events_are_the_same_however_the_bytes_are_cut(
    parts: list[tuple[list[str], list[str]]], ending: str, places: list[int]
) -> None:
    lines = [line for block, _ in parts for line in (*block, "")]
    expected = [event for _, events in parts for event in events]
    # More follows, so that a last CR is known to be a whole line ending.
    stream = "".join(line + ending for line in lines).encode() + b":"
    assert decode(stream) == expected
    assert decode(*cut(stream, places)) == expected


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_every_split_in_two_gives_the_same_events(ending: str) -> None:
    stream = STREAM.replace("\n", ending).encode()
    assert all(decode(stream[:at], stream[at:]) == STREAM_EVENTS for at in range(len(stream) + 1))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_an_event_comes_with_the_last_byte_of_its_empty_line(ending: str) -> None:
    stream = STREAM.replace("\n", ending).encode()
    assert decode(*(stream[at : at + 1] for at in range(len(stream)))) == STREAM_EVENTS


def test_an_event_without_its_empty_line_is_not_given() -> None:
    assert decode(b"data: whole\n\ndata: half\n") == ["whole"]


# The examples of https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
@pytest.mark.parametrize(
    ("stream", "events"),
    [
        ("data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
        (
            ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            ["first event", "second event", " third event"],
        ),
        ("data\n\ndata\ndata\n\ndata:", ["", "\n"]),
        ("data:test\n\ndata: test\n\n", ["test", "test"]),
    ],
)
def test_the_examples_of_the_standard_are_read_as_it_says(stream: str, events: list[str]) -> None:
    assert decode(stream.encode()) == events


@pytest.mark.parametrize(
    "piece", [b"data: " + b"x" * 50, b"data: " + b"x" * 43 + b"\n"], ids=["one endless line", "many lines of one event"]
)
def test_an_event_that_is_too_large_is_an_error_and_not_a_full_memory(
    piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    with pytest.raises(ValueError, match="an event is larger"):
        decode(*[piece] * 100)


def test_many_small_events_may_hold_more_than_one_event_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    assert len(decode(*[b"data: " + b"x" * 43 + b"\n\n"] * 100)) == 100
