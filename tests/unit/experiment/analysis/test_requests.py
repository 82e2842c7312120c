"""Requests as columns, held against the plain computation record by record."""

import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiment.analysis import live, requests, stats
from experiment.analysis.requests import Requests
from loadtest.records import Record, RecordFile, to_bytes
from tests.unit.experiment.folders import make_record

TIME = 1000


def one(draw: random.Random, index: int) -> Record:
    sent = draw.randint(0, TIME)
    chunks = sorted(draw.randint(sent, sent + TIME) for _ in range(draw.randint(0, 6)))
    told = draw.random() < 0.5
    tokens = [draw.randint(1, 5) for _ in chunks] if told else []
    return make_record(
        index=index,
        phase=draw.choice(["warmup", "measured", "measured", "drain"]),
        scheduled_ns=draw.choice([None, draw.randint(0, sent)]),
        sent_ns=sent,
        chunk_ns=chunks,
        chunk_tokens=tokens,
        output_tokens=sum(tokens) if told else draw.choice([None, 0, 1, 7, 20]),
        prompt_tokens=draw.choice([None, 1, 9, 50]),
        end_ns=draw.randint(chunks[-1] if chunks else sent, sent + 2 * TIME),
        error=draw.choice([None, None, None, "timeout", "reset"]),
    )


def make_some(seed: int) -> list[Record]:
    draw = random.Random(seed)
    indices = list(range(draw.randint(0, 12)))
    draw.shuffle(indices)
    return [one(draw, index) for index in indices]


def some() -> st.SearchStrategy[list[Record]]:
    return st.integers(0, 10**9).map(make_some)


def same(found: float | None, expected: float | None) -> bool:
    return found == pytest.approx(expected) if expected is not None else found is None or bool(np.isnan(found))


def plain_window(rows: Sequence[Record]) -> tuple[int, int] | None:
    chosen = [row for row in rows if row.phase == "measured"]
    if not chosen:
        return None
    last_sent = max(row.sent_ns for row in rows)
    falls = min((row.end_ns for row in rows if row.end_ns > last_sent), default=last_sent)
    return min(row.sent_ns for row in chosen), min(falls, max(row.end_ns for row in chosen))


def plain_tokens(rows: Sequence[Record], start: int, end: int) -> float:
    total = 0.0
    for row in rows:
        each = (row.output_tokens or 0) / max(1, len(row.chunk_ns))
        counts: Sequence[float] = row.chunk_tokens or [each] * len(row.chunk_ns)
        stamps = zip(row.chunk_ns, counts, strict=True)
        total += 0 if row.error else sum(count for stamp, count in stamps if start < stamp <= end)
    return total


def plain_bounds(row: Record, asked: int, answered: int) -> tuple[float, float]:
    """Least and most tokens that a request had in the cache at a sample."""
    if not (row.sent_ns <= answered and asked <= row.end_ns):
        return 0, 0
    prompt = float("inf") if row.prompt_tokens is None else row.prompt_tokens
    last = len(row.chunk_ns)
    each = (row.output_tokens or 0) / max(1, last)
    counts: Sequence[float] = row.chunk_tokens or [each] * last
    before = sum(stamp <= asked for stamp in row.chunk_ns)
    after = min(sum(stamp <= answered for stamp in row.chunk_ns) + 1, last)
    most = prompt + sum(counts[:after])
    if row.error:
        return 0, most
    return (prompt + sum(counts[:before]) - 1 if before and after < last else 0), (most if before < last else 0)


@given(some())
def test_latencies_are_those_of_each_record(rows: list[Record]) -> None:
    columns = requests.of(rows)
    for metric in ("ttft_seconds", "tpot_seconds", "e2e_seconds"):
        found = stats.LATENCIES[metric](columns)
        assert all(same(value, getattr(row, metric)) for value, row in zip(found, rows, strict=True))
    for row, response, normalized in zip(rows, stats.response(columns), stats.normalized(columns), strict=True):
        due = row.sent_ns if row.scheduled_ns is None else row.scheduled_ns
        took = None if row.error or not row.chunk_ns else (row.chunk_ns[-1] - due) / 1e9
        assert same(response, took if row.scheduled_ns is not None else None)
        assert same(normalized, took / row.output_tokens if took is not None and row.output_tokens else None)


@given(some(), st.integers(1, 5))
def test_tokens_of_a_window_and_of_its_parts_are_those_of_each_chunk(rows: list[Record], parts: int) -> None:
    columns = requests.of(rows)
    window = stats.steady_window(columns)
    assert window == plain_window(rows)
    if window and window[1] > window[0]:
        found = stats.tokens_over_time(columns, window, parts)
        assert found.sum() == pytest.approx(plain_tokens(rows, *window))
        edge = window[0] - (window[0] - window[1]) // parts
        assert found[0] == pytest.approx(plain_tokens(rows, window[0], edge))
        assert stats.output_throughput(columns) == pytest.approx(found.sum() / (window[1] - window[0]) * 1e9)


@given(some(), some())
def test_pairs_and_different_work_are_those_of_dictionaries(first: list[Record], second: list[Record]) -> None:
    a, b = requests.of(first), requests.of(second)
    others = {row.index: row for row in second if row.phase == "measured"}
    for metric in ("ttft_seconds", "tpot_seconds", "e2e_seconds"):
        expected = [
            (getattr(row, metric), getattr(others[row.index], metric))
            for row in sorted(first, key=lambda row: row.index)
            if row.phase == "measured" and row.index in others
        ]
        expected = [pair for pair in expected if None not in pair]
        assert stats.paired(a, b, metric) == pytest.approx(np.array(expected).reshape(-1, 2))
    work = [{row.index: (row.prompt_tokens, row.output_tokens) for row in rows} for rows in (first, second)]
    indices = work[0].keys() | work[1].keys()
    different = [i for i in indices if work[0].get(i) != work[1].get(i) or None in work[0].get(i, ())]
    assert stats.different_work(a, b) == sorted(different)
    end = min(max(one, default=-1) for one in work)
    assert stats.different_work(a, b, one_goes_on=True) == sorted(index for index in different if index <= end)


@given(some(), st.lists(st.tuples(st.integers(0, 2 * TIME), st.integers(0, 50)), max_size=20), st.integers(1, 8))
def test_what_a_client_saw_at_samples_is_that_of_each_record(
    rows: list[Record], samples: list[tuple[int, int]], most: int
) -> None:
    asked = np.array(sorted(at for at, _ in samples), dtype=np.int64)
    answered = np.maximum.accumulate(asked + np.array([more for _, more in samples], dtype=np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "MOST", most)
        seen = live.seen_by_client(asked, answered, [requests.of(rows[:5]), requests.of(rows[5:])])
    for number, (begin, end) in enumerate(zip(asked.tolist(), answered.tolist(), strict=True)):
        bounds = [plain_bounds(row, begin, end) for row in rows]
        assert seen.low[number] == pytest.approx(sum(low for low, _ in bounds))
        assert seen.high[number] == pytest.approx(sum(high for _, high in bounds))
        flying = [row for row in rows if row.sent_ns <= end and begin <= row.end_ns]
        unseen = [row for row in flying if not any(stamp <= begin for stamp in row.chunk_ns)]
        prompts = [float("inf") if row.prompt_tokens is None else row.prompt_tokens for row in unseen]
        assert seen.unseen[number] == len(unseen)
        assert seen.longest[number] == max(prompts, default=0)
        assert seen.oldest_ns[number] == min((row.sent_ns for row in flying), default=end)


@settings(max_examples=30)
@given(some(), st.integers(1, 5))
def test_a_file_in_many_batches_reads_as_one(rows: list[Record], size: int) -> None:
    def read(path: Path) -> Requests:
        file = RecordFile(path)
        for start in range(0, len(rows), size):
            file.write(to_bytes(rows[start : start + size]))
        file.close()
        return requests.load(path)

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(requests, "BLOCK_ROWS", 3)
        found = read(Path(folder) / "records.arrow")
        whole = requests.of(rows)
        for name in ("index", "scheduled_ns", "output_tokens", "first_ns", "last_ns", "measured", "error"):
            assert getattr(found, name).tolist() == getattr(whole, name).tolist()
        stamps = [int(ns) for chunks in found.chunks() for ns in chunks.ns]
    assert stamps == [ns for row in rows for ns in row.chunk_ns]


def test_chunks_that_do_not_all_say_their_tokens_are_refused() -> None:
    columns = requests.of([make_record(chunk_ns=[1, 2], chunk_tokens=[4])])
    with pytest.raises(ValueError, match="chunk_tokens: expected as many"):
        list(columns.chunks())


def test_an_error_of_an_unheard_kind_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match="error: 'boredom': expected one of connect, "):
        requests.of([make_record(error="boredom")])


LIMITS = {"ttft_seconds": 0.5, "tpot_seconds": 0.25}
SECOND = 10**9


def answer(index: int, ttft: float, tpot: float, **changes: object) -> Record:
    """A request sent each second whose four tokens come at these times."""
    sent = index * SECOND
    stamps = [sent + round((ttft + tpot * token) * SECOND) for token in range(4)]
    fields = {"index": index, "sent_ns": sent, "chunk_ns": stamps, "chunk_tokens": [1] * 4, "end_ns": stamps[-1]}
    return make_record(**fields | changes)


ROWS = [
    answer(0, 0.1, 0.1),
    answer(1, 0.6, 0.1),
    answer(2, 0.1, 0.3),
    answer(3, 0.5, 0.25),
    answer(4, 0.1, 0.1, error="timeout"),
    answer(5, 0.1, 0.0, chunk_ns=[5 * SECOND + 1], chunk_tokens=[1], output_tokens=1, end_ns=5 * SECOND + 1),
    answer(6, 0.1, 0.1, phase="drain"),
]


def test_a_request_meets_its_limits_when_it_meets_every_one_and_did_not_fail() -> None:
    found = stats.meets(requests.of(ROWS), LIMITS)
    assert found.tolist() == [True, False, False, True, False, True, True]
    assert stats.meets(requests.of(ROWS), {}).tolist() == [row.error is None for row in ROWS]


def test_attainment_is_of_the_requests_offered_and_those_that_failed_are_among_them() -> None:
    assert stats.attainment(requests.of(ROWS), LIMITS) == 3 / 6
    assert stats.attainment(requests.of(ROWS[-1:]), LIMITS) is None


def test_goodput_counts_the_good_requests_that_ended_in_the_steady_window() -> None:
    # The window: from 0 until the load falls, which is when the last one sent ends: after the last measured one.
    columns = requests.of(ROWS)
    start, end = stats.steady_window(columns) or (0, 0)
    assert (start, end) == (0, 5 * SECOND + 1)
    assert stats.goodput(columns, LIMITS) == pytest.approx(3 / 5)


def test_normalized_latency_counts_from_when_a_request_was_due() -> None:
    columns = requests.of([answer(2, 0.1, 0.1, scheduled_ns=SECOND)])
    assert stats.response(columns).tolist() == [pytest.approx(1.4)]
    assert stats.normalized(columns).tolist() == [pytest.approx(0.35)]
