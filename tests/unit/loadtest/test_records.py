"""Records: what is kept of a request, and the figures that are derived from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.records import (
    SCHEMA,
    ErrorKind,
    Record,
    RecordFile,
    StampSource,
    TokenSource,
    count,
    number_in,
    read,
    to_bytes,
)

SECOND = 10**9
NUMBERS = st.integers(0, 2**63 - 1)
COUNTS = st.none() | NUMBERS


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
    index=NUMBERS,
    target=st.text(max_size=8),
    phase=st.sampled_from(["warmup", "measured", "drain"]),
    max_tokens=NUMBERS,
    worker=NUMBERS,
    retries=NUMBERS,
    sent_ns=NUMBERS,
    end_ns=NUMBERS,
    scheduled_ns=COUNTS,
    status=COUNTS,
    prompt_tokens=COUNTS,
    output_tokens=COUNTS,
    token_source=st.sampled_from(get_args(TokenSource)),
    stamp_source=st.sampled_from(get_args(StampSource)),
    finish_reason=st.none() | st.text(max_size=8),
    chunk_ns=st.lists(NUMBERS, max_size=4),
    chunk_tokens=st.lists(NUMBERS, max_size=4),
    error=st.none() | st.sampled_from(get_args(ErrorKind)),
    error_detail=st.none() | st.text(),
)


def write(path: Path, *batches: Sequence[Record]) -> Path:
    file = RecordFile(path)
    for batch in batches:
        file.write(to_bytes(batch))
    file.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@settings(max_examples=50)
@given(st.lists(st.lists(RECORDS, max_size=2), max_size=3))
def test_what_was_written_is_read_back(folder: Path, batches: list[list[Record]]) -> None:
    path = write(folder / "records.arrow", *batches)
    assert list(read(path)) == [one for batch in batches for one in batch]
    assert count(path) == sum(map(len, batches))
    path.unlink()


def test_another_clock_moves_all_times_of_a_record_and_nothing_else(tmp_path: Path) -> None:
    closed, open_loop = record(), record(scheduled_ns=SECOND)
    file = RecordFile(tmp_path / "records.arrow")
    file.write(batch := to_bytes([closed, open_loop], -SECOND))
    file.close()
    times = {"sent_ns": 0, "end_ns": 3 * SECOND, "chunk_ns": [250_000_000, 500_000_000, 2_250_000_000]}
    assert list(read(tmp_path / "records.arrow")) == [record(**times), record(**times, scheduled_ns=0)]
    assert number_in(batch) == 2


def test_a_batch_is_on_disk_before_the_next_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "records.arrow"
    file = RecordFile(path)
    assert (list(read(path)), count(path)) == ([], 0)
    for index in range(3):
        file.write(to_bytes([record(index=index)]))
        assert [one.index for one in read(path)] == list(range(index + 1))
    file.close()


def test_a_file_that_a_kill_cut_anywhere_reads_back_without_the_last_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "records.arrow", [record(index=0)], [record(index=1), record(index=2)])
    whole = path.read_bytes()
    first = len(whole) - len(to_bytes([record(index=1), record(index=2)]))
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        expected = [] if length < first else [0] if length < len(whole) else [0, 1, 2]
        assert [one.index for one in read(path)] == expected, length
        assert count(path) == len(expected)


@pytest.mark.parametrize("content", [b"{}\n", b"PAR1" + bytes(100), b"\x00"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "records.arrow"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a file of records"):
        list(read(path))


def test_a_table_of_other_columns_is_refused_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "records.arrow"
    table = pa.table({"index": [1], "color": ["red"]})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="index, color"):
        list(read(path))


def test_a_file_of_another_run_is_never_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "records.arrow", [record()])
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        RecordFile(path)
    assert path.read_bytes() == before


def test_any_reader_of_arrow_reads_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "records.arrow", [record()], [record(index=4, chunk_ns=[], chunk_tokens=[])])
    with pa.ipc.open_stream(path) as reader:
        table = reader.read_all()
    assert table.schema == SCHEMA
    assert table.column("chunk_tokens").to_pylist() == [[1, 3, 1], []]


def test_send_lateness_is_sent_minus_scheduled_and_is_unknown_in_a_closed_loop() -> None:
    assert record(scheduled_ns=750_000_000).late_seconds == 0.25
    assert record().late_seconds is None


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
