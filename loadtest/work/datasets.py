"""Real prompts from files: ShareGPT JSON, JSONL, Parquet, or the folder of a Hugging Face data set.

A row is a ShareGPT conversation (`conversations`, or `messages` with roles), of which the first question and answer
count; an Alpaca instruction (`instruction`, `input`, `output`); or a `prompt`, text or token ids, with an optional
`max_tokens` or `output_tokens`, or an answer in `completion`, `response` or `output`.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from loadtest.options import Options
from loadtest.work.lines import (
    FieldError,
    LeaveOutError,
    Row,
    check_enough,
    entries,
    json_lines,
    json_row,
    open_stamp,
    whole,
)
from loadtest.work.prompts import Tokenizer, count, load_tokenizer

LENGTH_FIELDS = ("max_tokens", "output_tokens")
ANSWER_FIELDS = ("completion", "response", "output")
ASKS, ANSWERS = {"human", "user"}, {"gpt", "assistant", "chatgpt", "bing", "bard"}
ROWS_AT_ONCE = 1000


class Example(NamedTuple):
    """A prompt as it is sent, token ids packed, and how many tokens are asked for."""

    prompt: "str | array[int]"
    max_tokens: int


@dataclass
class Dataset:
    """Prompts in the order of the file, and what was left out and why."""

    examples: list[Example] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def read(options: Options) -> Dataset:
    """Read the file or folder that `options.dataset` names: as many rows as the run sends, all if it has no end.

    With a tokenizer, answers give the output lengths and prompts for /v1/completions are sent as token ids; without
    one, text is sent as it is and its length is not checked. Left out and counted are rows that do not fit into
    `max_context`, prompts that came before, and conversations that do not begin with a question and its answer.
    Raises ValueError with file, row and field for a bad row, and when there are too few rows.
    """
    return _read(options, open_stamp("dataset", options.dataset))


@lru_cache(maxsize=1)
def _read(options: Options, _stamp: tuple[int, int]) -> Dataset:
    path, dataset = Path(options.dataset), Dataset()
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    seen: set[str | bytes] = set()

    def parse(raw: object) -> Example:
        row = json_row(raw) if isinstance(raw, bytes) else raw
        if not isinstance(row, dict):
            raise FieldError("entry", row, "a JSON object")
        example = _example(row, options, tokenizer)
        key = example.prompt if isinstance(example.prompt, str) else example.prompt.tobytes()
        if key in seen:
            raise LeaveOutError("prompt came before")
        seen.add(key)
        return example

    examples = entries(path, _rows(path), parse, options.skip_bad_lines, dataset.skipped)
    dataset.examples.extend(islice(examples, options.total))
    check_enough(path, len(dataset.examples), options.total, dataset.skipped)
    return dataset


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    if path.is_dir() or path.suffix in (".parquet", ".arrow"):
        return _arrow_rows(path)
    if path.suffix == ".json":
        return _json_entries(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return json_lines(path)
    raise ValueError(f"dataset: {str(path)!r}: expected .json, .jsonl, .parquet, .arrow or a folder of the last two")


def _json_entries(path: Path) -> Iterator[tuple[str, object]]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a JSON array of objects")
    return ((f"entry {number}", entry) for number, entry in enumerate(found, 1))


def _arrow_rows(path: Path) -> Iterator[tuple[str, object]]:
    files = [path] if path.is_file() else sorted([*path.rglob("*.parquet"), *path.rglob("*.arrow")])
    if not files:
        raise ValueError(f"dataset: {str(path)!r}: no .parquet or .arrow file in the folder")
    for file in files:
        number = 0
        for batch in _batches(file):
            for row in batch:
                number += 1
                yield f"{file.name} row {number}", row


def _batches(file: Path) -> Iterator[list[object]]:
    # Here, because most runs read no such file.
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if file.suffix == ".parquet":
            batches = parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE)
        else:
            batches = ipc.open_stream(pyarrow.memory_map(str(file)))
        for batch in batches:
            yield batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: {error}; expected a file written by the datasets library") from None


def _example(row: Row, options: Options, tokenizer: Tokenizer | None) -> Example:
    prompt, answer = _question(row)
    length = _output_tokens(row, answer, options, tokenizer)
    if isinstance(prompt, list) and options.endpoint == "chat":
        raise FieldError("prompt", prompt, "text, for chats")
    if not prompt or not length:
        raise LeaveOutError("empty prompt or answer")
    if isinstance(prompt, list):
        ids = array("I", prompt)
    elif tokenizer and options.endpoint == "completions":
        # As the server would read the text, with the token that begins it, if any.
        ids = array("I", tokenizer.encode(prompt))
    else:
        tokens = count(tokenizer, prompt) if tokenizer else 1
        return _fitting(Example(prompt, length), tokens, options)
    return _fitting(Example(ids, length), len(ids), options)


def _fitting(example: Example, tokens: int, options: Options) -> Example:
    if tokens + example.max_tokens > options.max_context:
        raise LeaveOutError(f"more than max_context ({options.max_context} tokens)")
    return example


def _question(row: Row) -> tuple[str | list[int], str | None]:
    """Return prompt and answer, None where the row has no answer."""
    for turns, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        if turns in row:
            return _first_turns(row, turns, role, text)
    if "instruction" in row:
        instruction, more = _text(row, "instruction"), _text(row, "input", "")
        return f"{instruction}\n{more}" if more else instruction, _text(row, "output")
    prompt = row.get("prompt")
    if isinstance(prompt, list) and all(type(token) is int and 0 <= token < 2**32 for token in prompt):
        return prompt, None
    answers = (_text(row, name) for name in ANSWER_FIELDS if name in row)
    return _text(row, "prompt"), next(answers, None)


def _first_turns(row: Row, field_name: str, role: str, text: str) -> tuple[str, str]:
    turns = row[field_name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise FieldError(field_name, turns, f"a list of objects with {role} and {text}")
    # A system message is no question.
    turns = [turn for turn in turns if turn.get(role) != "system"]
    if len(turns) < 2 or turns[0].get(role) not in ASKS or turns[1].get(role) not in ANSWERS:
        raise LeaveOutError("begins with no question and answer")
    return _text(turns[0], text), _text(turns[1], text)


def _text(row: Row, name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if not isinstance(value, str):
        raise FieldError(name, value, "text")
    return value


def _output_tokens(row: Row, answer: str | None, options: Options, tokenizer: Tokenizer | None) -> int:
    for name in LENGTH_FIELDS:
        if row.get(name) is not None:
            return whole(row, name, least=1)
    if answer is None:
        return round(options.output_mean)
    if tokenizer is None:
        raise ValueError("tokenizer: '': needed to count the tokens of the data set's answers")
    return count(tokenizer, answer)
