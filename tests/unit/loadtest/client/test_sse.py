"""Server-sent events from the bytes of a whole stream."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadtest.client.sse import holds_data, holds_several, is_done, read_events, read_pieces

STREAM = "data: é€😀\n\n: comment\n\nevent: x\ndata: one\ndata:two\n\ndata: [DONE]\n\n"
STREAM_EVENTS = ["é€😀", "one\ntwo", "[DONE]"]

LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=6)


def decode(stream: bytes) -> list[str]:
    return [data.decode() for _, data in read_events(stream)]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """The lines of one block, and the events that they make."""
    lines = draw(st.lists(LINES, min_size=1, max_size=3))
    kind = draw(st.sampled_from(["data: ", "data:", ": ", "event: ", "retry: "]))
    if not kind.startswith("data"):
        return [kind + line for line in lines], []
    values = lines if kind == "data: " else [line.removeprefix(" ") for line in lines]
    return [kind + line for line in lines], ["\n".join(values)]


@settings(max_examples=200)
@given(st.lists(blocks(), max_size=5), st.sampled_from(["\n", "\r\n", "\r"]))
@example([(["data: €"], ["€"])], "\r\n")
def test_a_stream_holds_its_blocks_whatever_ends_its_lines(
    parts: list[tuple[list[str], list[str]]], ending: str
) -> None:
    lines = [line for block, _ in parts for line in (*block, "")]
    expected = [event for _, events in parts for event in events]
    assert decode("".join(line + ending for line in lines).encode()) == expected


def test_line_endings_may_be_mixed() -> None:
    assert decode(b"data: a\r\n\ndata: b\n\r\ndata: c\r\r") == ["a", "b", "c"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_an_event_ends_with_the_last_byte_of_its_empty_line(ending: str) -> None:
    stream = STREAM.replace("\n", ending).encode()
    assert decode(stream) == STREAM_EVENTS
    for number, (end, data) in enumerate(read_events(stream), 1):
        assert [one for _, one in read_events(stream[:end])][-1] == data
        before_its_empty_line = stream[: end - len(ending)]
        assert len(list(read_events(before_its_empty_line))) == number - 1


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([b"data: a\n\n", b"data: \n\n", b"data: \xe2\x82\xac\n\n", STREAM.encode()])), st.data()
)
@example([b"data: a\n\n", b"data:b\r\n\r\ndata: c\n\n"], None)
def test_an_event_has_the_stamp_of_the_piece_that_held_its_end_wherever_the_stream_was_cut(
    parts: list[bytes], data: st.DataObject | None
) -> None:
    stream = b"".join(parts)
    places = list(accumulate(len(part) for part in parts))
    if data:  # also where a part ends: pieces of one event are read in a way of their own
        places = data.draw(st.lists(st.sampled_from(places) | st.integers(0, len(stream)))) if places else []
    cuts = sorted({0, *places, len(stream)})
    pieces = [(end, stream[begin:end]) for begin, end in pairwise(cuts)]
    expected = [(next(cut for cut in cuts if cut >= end), event) for end, event in read_events(stream)]
    assert list(read_pieces(pieces)) == expected


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


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_the_first_event(ending: str) -> None:
    stream = "\ufeffdata: a\n\ndata: b\n\n".replace("\n", ending).encode()
    second = stream.index(b"data: b")
    assert list(read_events(stream)) == [(second, b"a"), (len(stream), b"b")]
    assert list(read_pieces([(1, stream[:2]), (2, stream[2:second]), (3, stream[second:])])) == [(2, b"a"), (3, b"b")]
    assert list(read_pieces([(1, b"data: a\n\n"), (2, "\ufeffdata: b\n\n".encode())])) == [(1, b"a")]


@pytest.mark.parametrize(
    ("piece", "holds"),
    [
        (b"data: a\n\n", True),
        (b": ping\n\n", False),
        (b":\r\n\r\n", False),
        (b"event: ping\nid: 1\n\n", False),
        (b": ping\n\ndata: a\n\n", True),
        (b"the rest of a large event", True),
        (b"", False),
    ],
)
def test_comments_and_other_fields_hold_no_data(piece: bytes, holds: bool) -> None:
    assert holds_data(piece) is holds


@pytest.mark.parametrize(
    ("data", "several"),
    [
        (b"data: 1\n\n", False),
        (b"data: 1\n\ndata: 2\n\n", True),
        (b"9\r\ndata: 1\r\n\r\n\r\n9\r\ndata: 2\r\n\r\n\r\n", True),
        (b": ping\n\ndata: 1\n\n", False),
        (b"data: 1\n\ndata: [DONE]\n\n", False),
        (b"", False),
    ],
)
def test_bytes_that_hold_several_events_are_told_from_those_of_one_and_of_an_end(data: bytes, several: bool) -> None:
    assert holds_several(data) is several


@pytest.mark.parametrize(
    ("stream", "done"),
    [
        (b"", False),
        (b"data: a\n\n", False),
        (b'data: {"text": "data: [DONE]"}\n\n', False),
        (b"data: a\n\n: [DONE]\n\n", False),
        (b"data: a\n\ndata: [DONE]\n\n", True),
        (b"data: a\r\n\r\ndata:[DONE]\r\n\r\n: ping\r\n\r\n", True),
    ],
)
def test_a_stream_is_done_when_an_event_says_so(stream: bytes, done: bool) -> None:
    assert is_done(stream) is done
