"""The sketch that shows what paging is: the same requests in one piece of memory each, and in blocks."""

from experiment.analysis.results import JSON

# Tokens of each request so far, and what each may grow to.
TOKENS, MOST, BLOCK = {"A": 5, "B": 9, "C": 3}, 12, 4


def sketch() -> list[tuple[str, list[JSON], bool]]:
    """The key of a title, the rows of cells below it, and whether these are in blocks."""
    return [("paging.one_piece", _contiguous(), False), ("paging.blocks", _paged(), True)]


def _contiguous() -> list[JSON]:
    """A row for each request, with room for all that may come."""
    return [
        {"letter": letter, "cells": _cells(letter, live, "live") + _cells("", MOST - live, "reserved")}
        for letter, live in TOKENS.items()
    ]


def _paged() -> list[JSON]:
    """As many cells, given out in blocks in the order in which the requests fill them."""
    needs = {letter: -(-live // BLOCK) for letter, live in TOKENS.items()}
    blocks = []
    for turn in range(max(needs.values())):
        for letter, live in TOKENS.items():
            if turn < needs[letter]:
                held = min(BLOCK, live - turn * BLOCK)
                blocks.append(_cells(letter, held, "live") + _cells("", BLOCK - held, "fragmentation"))
    cells = [cell for block in blocks for cell in block]
    cells += _cells("", MOST * len(TOKENS) - len(cells), "free")
    return [{"letter": "", "cells": cells[start : start + MOST]} for start in range(0, len(cells), MOST)]


def _cells(text: str, count: int, kind: str) -> list[JSON]:
    return [{"kind": kind, "text": text}] * count
