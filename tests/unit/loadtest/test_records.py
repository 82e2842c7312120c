"""Records: what is kept of a request, and the figures that are derived from it."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.records import ErrorKind, Record, RecordWriter, TokenSource, read

SECOND = 10**9
COUNTS = st.none() | st.integers(0, 10**6)


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "index": 3,
        "target": "hf",
        "phase": "measured",
        "max_tokens": 5,
        "sent_ns": 1 * SECOND,
        "end_ns": 4 * SECOND,
        "status": 200,
        "prompt_tokens": 7,
        "output_tokens": 5,
        "token_source": "usage",
        "finish_reason": "length",
        "chunk_ns": [1_250_000_000, 1_500_000_000, 3_250_000_000],
        "chunk_tokens": [1, 3, 1],
    }
    return Record(**fields | changes)


RECORDS = st.builds(
    Record,
    index=st.integers(0),
    target=st.text(max_size=8),
    phase=st.sampled_from(["warmup", "measured", "drain"]),
    max_tokens=st.integers(1),
    sent_ns=st.integers(0),
    end_ns=st.integers(0),
    scheduled_ns=COUNTS,
    status=COUNTS,
    prompt_tokens=COUNTS,
    output_tokens=COUNTS,
    token_source=st.sampled_from(get_args(TokenSource)),
    finish_reason=st.none() | st.text(max_size=8),
    chunk_ns=st.lists(st.integers(0), max_size=4),
    chunk_tokens=st.lists(st.integers(0), max_size=4),
    error=st.none() | st.sampled_from(get_args(ErrorKind)),
    error_detail=st.none() | st.text(),
)


def write(path: Path, *records: Record) -> Path:
    writer = RecordWriter(path)
    for one in records:
        writer.append(one)
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@settings(max_examples=50, deadline=None)
@given(st.lists(RECORDS, max_size=2))
def test_what_was_written_is_read_back(folder: Path, records: list[Record]) -> None:
    path = write(folder / "records.jsonl", *records)
    assert list(read(path)) == records
    path.unlink()


def test_a_record_is_on_disk_before_the_next_one_is_written(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "deep" / "er" / "records.jsonl")
    for index in range(3):
        writer.append(record(index=index))
        assert [one.index for one in read(tmp_path / "deep" / "er" / "records.jsonl")] == list(range(index + 1))
    writer.close()


def test_a_file_that_a_kill_cut_anywhere_reads_back_without_the_last(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", record(index=0), record(index=1, error_detail="é\n😀"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole), 3):
        path.write_bytes(whole[:length])
        assert [one.index for one in read(path)] == [0]


def test_a_file_of_another_run_is_never_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", record())
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        RecordWriter(path)
    assert path.read_bytes() == before


def test_a_line_names_its_fields(tmp_path: Path) -> None:
    line = json.loads(write(tmp_path / "records.jsonl", record()).read_text())
    assert (line["index"], line["phase"], line["chunk_tokens"]) == (3, "measured", [1, 3, 1])


def test_latencies_as_worked_out_by_hand() -> None:
    one = record()
    assert one.ttft_seconds == 0.25  # 1.25 - 1
    assert one.e2e_seconds == 2.25  # 3.25 - 1, not the end of the answer at 4
    assert one.tpot_seconds == 0.5  # (2.25 - 0.25) / (5 - 1): tokens, not chunks


def test_one_token_has_no_time_per_output_token() -> None:
    one = record(output_tokens=1, chunk_ns=[1_250_000_000], chunk_tokens=[1])
    assert (one.ttft_seconds, one.e2e_seconds, one.tpot_seconds) == (0.25, 0.25, None)


def test_an_unknown_number_of_tokens_leaves_only_the_time_per_output_token_unknown() -> None:
    one = record(output_tokens=None, token_source="unknown", chunk_tokens=[])  # noqa: S106 - no password
    assert (one.ttft_seconds, one.e2e_seconds, one.tpot_seconds) == (0.25, 2.25, None)


@pytest.mark.parametrize(
    "one", [*(record(error=kind) for kind in get_args(ErrorKind)), record(chunk_ns=[], chunk_tokens=[])]
)
def test_an_error_and_an_empty_output_have_no_latencies(one: Record) -> None:
    assert (one.ttft_seconds, one.e2e_seconds, one.tpot_seconds) == (None, None, None)
