"""Prompts: their token counts, and that none comes twice unless it is shared."""

import random
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from loadtest.options import Options
from loadtest.work.prompts import TOKEN_IDS, Tokenizer, count, exact_text, load_tokenizer, shared, unique, words
from loadtest.work.workloads import WORKLOADS, Request, next_turn
from servers import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a byte-level BPE tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    models.tokenizer(2048).save_pretrained(path)
    return str(path)


def draw(number: int, **given: Any) -> list[Request]:
    options = Options(endpoint="chat", **given)
    return list(islice(WORKLOADS[options.workload](options), number))


def tokens(folder: str, request: Request) -> int:
    assert isinstance(request.prompt, str)
    return len(load_tokenizer(folder).encode(request.prompt))


@given(
    size=st.integers(2, 12),
    seed=st.integers(0),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=60),
    start=st.integers(0, 10_000),
)
def test_pieces_are_unique_up_to_as_many_as_their_length_can_tell_apart(
    size: int, seed: int, lengths: list[int], start: int
) -> None:
    rng = random.Random(seed)
    made = [tuple(unique(range(size), seed, start + place, length, rng)) for place, length in enumerate(lengths)]
    assert list(map(len, made)) == lengths
    for place, one in enumerate(made):
        equal = [other for other in range(place) if made[other] == one]
        assert all((place - other) % size ** min(len(one), 4) == 0 for other in equal)


@given(seed=st.integers(0), size=st.sampled_from([2, 3, 6, 10]), length=st.integers(1, 4))
def test_short_pieces_take_every_form_before_one_comes_again(seed: int, size: int, length: int) -> None:
    forms = size ** min(length, 4)
    made = [tuple(unique(range(size), seed, index, length, random.Random(0))) for index in range(min(forms, 1500))]
    assert len(set(made)) == len(made)
    if forms <= 1500:
        assert tuple(unique(range(size), seed, forms, length, random.Random(0))) == made[0]


@given(seed=st.integers(0), step=st.sampled_from([1, 2, 3]))
def test_no_piece_is_the_beginning_of_another_within_a_thousand(seed: int, step: int) -> None:
    rng = random.Random(0)
    firsts = {unique(TOKEN_IDS, seed, index, 1, rng)[0] for index in range(0, 1000, step)}
    assert len(firsts) == len(range(0, 1000, step))


def test_a_shared_piece_depends_on_its_name_and_index_alone() -> None:
    pieces = [shared(TOKEN_IDS, 5, name, index, 50) for name in ("prefix", "block") for index in (0, 1)]
    assert pieces == [shared(TOKEN_IDS, 5, name, index, 50) for name in ("prefix", "block") for index in (0, 1)]
    assert len(set(map(tuple, pieces))) == 4
    assert shared(TOKEN_IDS, 6, "prefix", 0, 50) != pieces[0]
    assert shared(TOKEN_IDS, 5, "prefix", 0, 80)[:4] == pieces[0][:4]


def test_chat_prompts_have_exactly_the_tokens_asked_for_and_are_unique(folder: str) -> None:
    chats = draw(300, tokenizer=folder, input_mean=9, sigma=1, seed=3)
    ids = list(islice(WORKLOADS["lognormal"](Options(input_mean=9, sigma=1, seed=3)), 300))
    assert [tokens(folder, chat) for chat in chats] == [len(one.prompt) for one in ids]
    assert [chat.max_tokens for chat in chats[:1]] == [ids[0].max_tokens]
    assert len({chat.prompt for chat in chats}) == 300
    assert min(tokens(folder, chat) for chat in chats) == 1


def test_chat_prompts_keep_their_count_behind_a_shared_prefix(folder: str) -> None:
    chats = draw(6, tokenizer=folder, prefix_groups=2, prefix_tokens=30, sigma=0, input_mean=10)
    assert {tokens(folder, chat) for chat in chats} == {40}
    beginnings = [str(chat.prompt).split()[:30] for chat in chats]
    assert beginnings[0] == beginnings[2] != beginnings[1] == beginnings[3]


def test_a_chat_goes_on_with_the_questions_and_answers_before(folder: str) -> None:
    options = Options(endpoint="chat", tokenizer=folder, turns=3, sigma=0, input_mean=8)
    first = next(WORKLOADS["lognormal"](options))
    second = next_turn(options, first, "fine")
    assert second
    third = next_turn(options, second, "")
    assert third
    assert next_turn(options, third, "bye") is None
    assert [message["content"] for message in third.chat_body("m")["messages"]] == [
        first.prompt,
        "fine",
        second.prompt,
        "",
        third.prompt,
    ]
    assert [message["role"] for message in third.chat_body("m")["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert tokens(folder, third) == 8
    with pytest.raises(ValueError, match="expected the text of the chat's answer"):
        next_turn(options, first, [300])


def test_the_text_of_an_answer_becomes_ids_of_the_next_prompt(folder: str) -> None:
    options = Options(tokenizer=folder, turns=2)
    first = next(WORKLOADS["lognormal"](options))
    answer = " ".join(words(folder)[:7])
    second = next_turn(options, first, answer)
    assert second
    ids = load_tokenizer(folder).encode(answer)
    assert len(ids) == 7
    assert list(second.prompt[len(first.prompt) :][:7]) == ids


def test_text_that_merges_is_drawn_anew_until_its_count_is_exact(folder: str, tmp_path: Path) -> None:
    # A tokenizer to which one pair of words in some three hundred is a single token.
    merging, pool = models.tokenizer(2048), words(folder)
    rng = random.Random(1)
    merging.add_tokens([" ".join(rng.sample(pool, 2)) for _ in range(400)])
    merging.save_pretrained(tmp_path)
    name, tokenizer = str(tmp_path), load_tokenizer(str(tmp_path))
    redrawn = 0
    for index in range(40):
        # Marks are kept, so here are none that merge.
        mark = [pool[index]] * 4
        piece = mark + rng.choices(pool, k=60)
        text = exact_text(name, [piece], rng)
        redrawn += text != " ".join(piece)
        assert count(tokenizer, text) == 64
        assert text.split()[:4] == mark
    assert redrawn > 3


def test_text_that_cannot_be_exact_is_an_error(folder: str, tmp_path: Path) -> None:
    merging, pool = models.tokenizer(2048), words(folder)
    merging.add_tokens([f"{pool[0]} {pool[1]}"])
    merging.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no text of exactly 2 tokens was found"):
        exact_text(str(tmp_path), [[pool[0], pool[1]]], random.Random(0))


def test_words_are_one_token_wherever_they_stand(folder: str) -> None:
    tokenizer: Tokenizer = load_tokenizer(folder)
    pool = words(folder)
    assert len(set(pool)) == len(pool) > 300
    assert all(count(tokenizer, f"{one} {other} {one}") == 3 for one, other in pairwise(pool))


def test_a_tokenizer_says_what_that_of_transformers_says(tmp_path: Path) -> None:
    """Also where texts begin with a token of their own, and after a tokenizer was saved with a limit."""
    made = models.tokenizer(2048)
    end = made.eos_token_id
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{made.eos_token} $A", special_tokens=[(made.eos_token, end)]
    )
    made.backend_tokenizer.enable_truncation(4)
    made.save_pretrained(tmp_path)
    text = "Is it raining? " * 9 + str(made.eos_token)
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ids[0] == end != ours.encode(text, add_special_tokens=False)[0]
    assert ours.decode(ids) == theirs.decode(ids)
    assert len(ours) == len(theirs)


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    models.tokenizer(300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer: '.*': has \d+ words of one token; expected 100"):
        words(str(tmp_path))


def test_a_tokenizer_that_is_not_there_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer: '.*missing': expected a Hugging Face id or a folder"):
        load_tokenizer(str(tmp_path / "missing"))
