"""Prompts of an exact number of tokens, unique unless sharing is asked: as token ids, or as text for chats.

A piece of a prompt is a list of units from a pool. The units are token ids, or words that are one token each wherever
they stand, so that pieces keep their token counts when they are put together.
"""

import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import tokenizers

# Ids that are in every usual vocabulary, above the special and the single-byte tokens.
TOKEN_IDS = tuple(range(300, 1300))

# So many first units tell one prompt from the others; a fifth would be needed after pool size**4 prompts.
MARK = 4

MOST_WORDS, FEWEST_WORDS = 1000, 100
TRIES = 8

Unit = TypeVar("Unit", int, str)


class Tokenizer:
    """The tokenizer of a model, by its tokenizer.json alone: what a load test needs of one is not in Transformers."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer"):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


def unique(pool: Sequence[Unit], seed: int, index: int, length: int, rng: random.Random) -> list[Unit]:
    """Make a piece of `length` units that differs from that of every other index within its first four units.

    Two pieces of length L are the same only if their indexes are a multiple of len(pool)**L apart: with the thousand
    token ids, one-token prompts come again after 1,000 requests and two-token prompts after a million.
    """
    mark = min(length, MARK)
    start, step = _order(len(pool), seed)
    place = start + index * step
    units = [pool[place // len(pool) ** digit % len(pool)] for digit in range(mark)]
    return units + rng.choices(pool, k=length - mark)


def shared(pool: Sequence[Unit], seed: int, name: str, index: int, length: int) -> list[Unit]:
    """Make a piece that depends on the seed, a name and an index alone: a prefix, or a block of a trace."""
    rng = random.Random(f"{seed}:{name}:{index}")  # noqa: S311 - load, not secrets
    return unique(pool, seed, index, length, rng)


@lru_cache(maxsize=8)
def _order(size: int, seed: int) -> tuple[int, int]:
    """Where the marks start and by how much they go on, in a number of base `size` whose lowest digit is the first.

    The step has no divisor in common with `size`, so that the first L digits take all values before any comes again.
    """
    rng = random.Random(f"{seed}:order")  # noqa: S311 - load, not secrets
    whole = size**MARK
    start = rng.randrange(whole)
    step = rng.randrange(whole)
    while math.gcd(step, size) != 1:
        step += 1
    return start, step


@lru_cache(maxsize=2)
def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer of a Hugging Face id or folder; raises ValueError that names the option."""
    # Here, because most runs send token ids.
    import tokenizers

    folder = Path(name)
    try:
        if folder.is_dir():
            return Tokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
        return Tokenizer(tokenizers.Tokenizer.from_pretrained(name))
    except Exception as error:  # noqa: BLE001 - it raises nothing narrower
        reason = str(error).partition("\n")[0]
        expected = "expected a Hugging Face id or a folder, with a tokenizer.json"
        raise ValueError(f"tokenizer: {name!r}: {expected}: {reason}") from None


@lru_cache(maxsize=2)
def words(name: str) -> tuple[str, ...]:
    """Up to 1,000 words that the tokenizer takes for one token each, at the start of a text and after a blank.

    Raises ValueError for a tokenizer with fewer than 100 of them.
    """
    tokenizer = load_tokenizer(name)
    found: dict[str, None] = {}
    for word in _candidates(tokenizer):
        if word not in found and count(tokenizer, f"{word} {word}") == 2:
            found[word] = None
        if len(found) == MOST_WORDS:
            break
    if len(found) < FEWEST_WORDS:
        raise ValueError(
            f"tokenizer: {name!r}: has {len(found)} words of one token; expected {FEWEST_WORDS}, to make text of them"
        )
    return tuple(found)


def _candidates(tokenizer: Tokenizer) -> Iterator[str]:
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).strip()
        if len(word) > 1 and word.isascii() and word.isalpha():
            yield word


def count(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a text, without those that a template or the server adds."""
    return len(tokenizer.encode(text, add_special_tokens=False))


def exact_text(name: str, pieces: list[list[str]], rng: random.Random) -> str:
    """Join pieces of words; where the tokenizer merges some, what follows their marks in the last piece is drawn anew.

    Raises ValueError when that does not help.
    """
    tokenizer, pool = load_tokenizer(name), words(name)
    *before, last = pieces
    for _ in range(TRIES):
        units = [unit for piece in (*before, last) for unit in piece]
        text = " ".join(units)
        if count(tokenizer, text) == len(units):
            return text
        last = last[:MARK] + rng.choices(pool, k=max(0, len(last) - MARK))
    raise ValueError(f"tokenizer: {name!r}: no text of exactly {len(units)} tokens was found")
