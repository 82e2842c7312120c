"""Real prompts from files of each kind."""

import json
from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from loadtest.options import Options
from loadtest.work.datasets import Example, read
from loadtest.work.prompts import load_tokenizer
from loadtest.work.workloads import WORKLOADS, skipped
from servers import models

SHAREGPT: list[dict[str, Any]] = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "Is it raining?"},
            {"from": "gpt", "value": "No, it is not raining at all."},
            {"from": "human", "value": "Thanks"},
        ],
    },
    {"id": "b", "conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Hello"}]},
    {"id": "c", "conversations": [{"from": "human", "value": "Only a question"}]},
    {"id": "d", "conversations": []},
    {
        "id": "e",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "user", "value": "And tomorrow?"},
            {"from": "chatgpt", "value": "Sun."},
        ],
    },
]
NO_PAIR = "begins with no question and answer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a byte-level BPE tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    models.tokenizer(512).save_pretrained(path)
    return str(path)


def options(path: Path, **given: Any) -> Options:
    return Options(**{"workload": "dataset", "dataset": str(path)} | given)


def jsonl(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_sharegpt_gives_the_first_question_and_the_length_of_its_answer(tmp_path: Path, folder: str) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT))
    chosen = options(path, workload="sharegpt", tokenizer=folder)
    tokenizer = load_tokenizer(folder)
    requests = list(WORKLOADS["sharegpt"](chosen))
    assert [tokenizer.decode(list(map(int, one.prompt))) for one in requests] == ["Is it raining?", "And tomorrow?"]
    answers = ["No, it is not raining at all.", "Sun."]
    assert [one.max_tokens for one in requests] == [len(tokenizer.encode(answer)) for answer in answers]
    assert skipped(chosen) == {NO_PAIR: 3}
    chat = list(WORKLOADS["sharegpt"](Options(**(dict(chosen) | {"endpoint": "chat"}))))
    assert [one.prompt for one in chat] == ["Is it raining?", "And tomorrow?"]


def test_answers_cannot_be_counted_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer: '': needed to count"):
        read(options(jsonl(tmp_path, *SHAREGPT)))


def test_jsonl_gives_prompts_as_text_or_ids_with_their_lengths(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"prompt": "one", "max_tokens": 7},
        {"prompt": [5, 6, 70_000], "output_tokens": 8},
        "",
        {"prompt": "three", "extra": 1},
    )
    assert read(options(path, output_mean=20.4)).examples == [
        Example("one", 7),
        Example(array("I", [5, 6, 70_000]), 8),
        Example("three", 20),
    ]
    requests = list(WORKLOADS["dataset"](options(path, seed=9)))
    assert [one.prompt for one in requests] == ["one", (5, 6, 70_000), "three"]
    assert [(one.index, one.seed) for one in requests] == [(0, 9), (1, 10), (2, 11)]
    first, second = (list(WORKLOADS["dataset"](options(path, seed=9), rank, 2)) for rank in (0, 1))
    assert [*first[:1], *second, *first[1:]] == requests
    assert read(options(path)) is read(options(path))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Say hi", "input": "", "output": "hi"}, "Say hi"),
        ({"instruction": "Sum", "input": "1 2", "output": "hi"}, "Sum\n1 2"),
        ({"prompt": "Say hi", "completion": "hi"}, "Say hi"),
        ({"prompt": "Say hi", "response": "hi"}, "Say hi"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "hi"}]}, "Q"),
    ],
)
def test_each_form_of_a_row_gives_its_prompt_and_the_length_of_its_answer(
    tmp_path: Path, folder: str, row: dict[str, Any], prompt: str
) -> None:
    tokenizer = load_tokenizer(folder)
    (example,) = read(options(jsonl(tmp_path, row), tokenizer=folder)).examples
    assert tokenizer.decode(list(map(int, example.prompt))) == prompt
    assert example.max_tokens == len(tokenizer.encode("hi"))


def test_rows_that_cannot_be_sent_are_left_out_and_counted(tmp_path: Path, folder: str) -> None:
    path = jsonl(
        tmp_path,
        {"prompt": [1] * 30, "max_tokens": 70},
        {"prompt": [1] * 31, "max_tokens": 70},
        {"prompt": [1] * 30, "max_tokens": 5},
        {"prompt": "Is it raining?", "max_tokens": 90},
        {"prompt": "Is it raining?", "max_tokens": 99},
        {"prompt": "Is it raining?", "max_tokens": 2},
        {"prompt": "", "max_tokens": 2},
    )
    chosen = options(path, max_context=100, tokenizer=folder)
    assert [example.max_tokens for example in read(chosen).examples] == [70, 90]
    assert skipped(chosen) == {
        "more than max_context (100 tokens)": 2,
        "prompt came before": 2,
        "empty prompt or answer": 1,
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: line: '{': expected a JSON object: column 2: Expecting property name enclosed in double quotes"),
        ('"x"', "line 2: line: '\"x\"': expected a JSON object"),
        ({"text": "x"}, "line 2: prompt: None: expected text"),
        ({"prompt": 5}, "line 2: prompt: 5: expected text"),
        ({"prompt": [1, -1]}, "line 2: prompt: [1, -1]: expected text"),
        ({"prompt": [1, True]}, "line 2: prompt: [1, True]: expected text"),
        ({"prompt": "x", "max_tokens": 0}, "line 2: max_tokens: 0: expected a whole number of 1 or more"),
        ({"prompt": "x", "output_tokens": "many"}, "line 2: output_tokens: 'many': expected a whole number"),
        ({"conversations": "x"}, "line 2: conversations: 'x': expected a list of objects with from and value"),
        ({"conversations": [1]}, "line 2: conversations: [1]: expected a list of objects"),
        ({"conversations": [{"from": "human"}, {"from": "gpt"}]}, "line 2: value: None: expected text"),
        ({"instruction": "x", "output": None}, "line 2: output: None: expected text"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_field_or_counted(tmp_path: Path, row: object, message: str) -> None:
    path = jsonl(tmp_path, {"prompt": "a"}, row, {"prompt": "b"})
    with pytest.raises(ValueError, match="expected") as refused:
        read(options(path))
    assert str(refused.value).startswith(f"{path}: {message}")
    chosen = options(path, skip_bad_lines=True)
    assert [example.prompt for example in read(chosen).examples] == ["a", "b"]
    assert skipped(chosen) == {"bad line": 1}


def test_a_bad_entry_of_an_array_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "entries.json"
    path.write_text(json.dumps([{"prompt": "a"}, 7]))
    with pytest.raises(ValueError, match=r"entries\.json: entry 2: entry: 7: expected a JSON object"):
        read(options(path))


@pytest.mark.parametrize(("text", "message"), [("{", "expected JSON: "), ("{}", "expected a JSON array of objects")])
def test_a_file_that_is_no_json_array_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "entries.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(options(path))


def test_ids_are_no_chat(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: prompt: \[5\]: expected text, for chats"):
        read(options(jsonl(tmp_path, {"prompt": [5]}), endpoint="chat"))


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_hugging_face_data_set_on_disk_is_read(tmp_path: Path, whole_folder: bool) -> None:
    first, second = (pa.table({"prompt": [f"{name}{i}" for i in range(3)]}) for name in "ab")
    parquet.write_table(first, tmp_path / "train-00000-of-00002.parquet")
    (tmp_path / "data").mkdir()
    parquet.write_table(second, tmp_path / "data" / "train-00001-of-00002.parquet")
    path = tmp_path if whole_folder else tmp_path / "train-00000-of-00002.parquet"
    prompts = {example.prompt for example in read(options(path)).examples}
    assert prompts == {"a0", "a1", "a2"} | ({"b0", "b1", "b2"} if whole_folder else set())


def test_what_the_datasets_library_saves_is_read(tmp_path: Path) -> None:
    table = pa.table({"conversations": [SHAREGPT[0]["conversations"]], "max_tokens": [3]})
    with ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as file:
        file.write_table(table)
    assert read(options(tmp_path)).examples == [Example("Is it raining?", 3)]


def test_a_bad_row_of_a_table_is_named_by_its_number(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet row 2: prompt: None: expected text"):
        read(options(tmp_path))


def test_a_broken_table_is_an_error_with_its_name(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes(b"not a table")
        with pytest.raises(ValueError, match=name):
            read(options(tmp_path / name))


def test_what_is_no_data_set_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    for path, message in (
        (tmp_path / "none.json", "^dataset: '.*none.json': No such file"),
        (tmp_path / "x.txt", r"^dataset: '.*x\.txt': expected \.json, \.jsonl, \.parquet"),
        (tmp_path, r"no \.parquet or \.arrow file in the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read(options(path))


def test_only_as_many_rows_are_read_as_are_sent(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "bad")
    assert len(read(options(path, requests=1, drain=1)).examples) == 2
    path = jsonl(tmp_path, {"prompt": "a"}, {"prompt": "a"})
    with pytest.raises(ValueError, match=r"requests: 2 with warmup and drain, but .* holds 1, 1 left out: prompt came"):
        read(options(path, requests=2))
