"""Token ids to text, as they come, up to a stop string."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from servers.hf.text import TextStream

TOKENS = st.lists(st.integers(0, 2047), max_size=25)


def push_all(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    """Push tokens until one meets a stop string, then flush; one text for each, and the flushed one."""
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()]


def until_stop(texts: list[str], stops: Sequence[str], min_tokens: int = 0) -> tuple[str, bool]:
    """What should be said: all text before the stop string that is complete first, and whether there was one."""
    exempt, text = "".join(texts[:min_tokens]), ""
    for piece in texts[min_tokens:]:
        text += piece
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return exempt + text[: min(found)], True
    return exempt + text, False


@st.composite
def stops_for(draw: st.DrawFn, text: str) -> list[str]:
    """Stop strings, most of which are in the text."""
    stops = draw(st.lists(st.text("aeiost \n", min_size=1, max_size=3), max_size=2))
    for _ in range(draw(st.integers(0, 2)) if text else 0):
        start = draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + draw(st.integers(1, 8))])
    return stops


@settings(max_examples=60)
@given(st.data(), TOKENS, TOKENS)
def test_what_is_pushed_and_flushed_is_the_whole_text_up_to_the_first_stop(
    tokenizer: Any, data: st.DataObject, prompt: list[int], tokens: list[int]
) -> None:
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in tokens]
    stops = data.draw(stops_for("".join(texts)))
    min_tokens = data.draw(st.integers(0, 5))
    stream = TextStream(tokenizer.backend_tokenizer, prompt, stops, min_tokens)
    text, stopped = until_stop(texts, stops, min_tokens)
    assert "".join(push_all(stream, tokens)) == text
    assert stream.stopped == stopped


@settings(max_examples=60)
@given(TOKENS, TOKENS)
def test_without_stops_nothing_is_held_back(tokenizer: Any, prompt: list[int], tokens: list[int]) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, prompt)
    expected = [tokenizer.decode([token], skip_special_tokens=True) for token in tokens]
    assert push_all(stream, tokens) == [*expected, ""]


@pytest.fixture
def spell(tokenizer: Any) -> Any:
    """Make tokens of one character each."""
    return lambda text: [tokenizer(character)["input_ids"][0] for character in text]


def test_a_stop_across_tokens_is_held_back_and_never_said(tokenizer: Any, spell: Any) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, [], ["end"])
    assert push_all(stream, spell("a enend b")) == ["a", " ", "", "", "en", "", "", ""]
    assert stream.stopped


def test_what_was_held_back_is_said_when_the_output_ends_otherwise(tokenizer: Any, spell: Any) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, [], ["end"])
    assert push_all(stream, spell("aen")) == ["a", "", "", "en"]
    assert not stream.stopped
    assert stream.flush() == ""


def test_the_earliest_of_several_stops_ends_the_text(tokenizer: Any) -> None:
    tokens = tokenizer("one two three")["input_ids"]
    stream = TextStream(tokenizer.backend_tokenizer, [], ["three", "two", "e t"])
    assert "".join(push_all(stream, tokens)) == "on"


def test_a_stop_inside_one_token_cuts_it(tokenizer: Any) -> None:
    token = max(range(2048), key=lambda token: len(tokenizer.decode([token], skip_special_tokens=True)))
    text = tokenizer.decode([token])
    stream = TextStream(tokenizer.backend_tokenizer, [], [text[2:4]])
    assert stream.push(token) == text[:2]
    assert stream.stopped


def test_stops_count_only_after_the_least_number_of_tokens(tokenizer: Any, spell: Any) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, [], ["x"], min_tokens=3)
    assert push_all(stream, spell("axbcxd")) == ["a", "x", "b", "c", "", ""]


def test_the_end_of_text_is_no_text(tokenizer: Any, spell: Any) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, [])
    assert push_all(stream, [*spell("a"), tokenizer.eos_token_id]) == ["a", "", ""]


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
def test_characters_of_several_tokens_are_said_whole(text: str) -> None:
    # One token for each byte: the worst that a vocabulary can do.
    vocabulary = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = tokenizer.encode(text).ids
    assert len(tokens) == len(text.encode())
    pieces = push_all(TextStream(tokenizer, []), tokens)
    assert "".join(pieces) == text
