"""Exact figures of each target, from a file of records."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiment.analysis import requests, stats
from loadtest.figures import LATENCIES, lines, measure
from loadtest.records import Record, RecordFile, to_bytes

SECOND = 10**9


def request(index: int, **changes: Any) -> Record:
    """One is sent each second and takes two: 4 tokens, the first after half a second."""
    sent = index * SECOND
    fields: dict[str, Any] = {
        "index": index, "target": "hf", "phase": "measured", "max_tokens": 4, "status": 200, "sent_ns": sent,
        "end_ns": sent + 2 * SECOND + 5, "output_tokens": 4, "chunk_tokens": [1, 1, 1, 1],
        "chunk_ns": [sent + part * SECOND // 2 for part in (1, 2, 3, 4)],
    }  # fmt: skip
    return Record(**fields | changes)


def write(path: Path, records: list[Record], rows: int = 3) -> Path:
    file = RecordFile(path)
    for begin in range(0, len(records), rows):
        file.write(to_bytes(records[begin : begin + rows]))
    file.close()
    return path


def test_latencies_are_those_of_the_measured_that_did_not_fail(tmp_path: Path) -> None:
    records = [
        request(0, phase="warmup"),
        request(1, scheduled_ns=SECOND),
        request(2, scheduled_ns=SECOND),
        request(3, error="timeout", output_tokens=None),
    ]
    hf = measure(write(tmp_path / "r", records))["hf"]
    assert (hf["requests"], hf["failed"], hf["short_answers"]) == (3, {"timeout": 1}, 0)
    assert hf["ttft_seconds"] == {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5}
    assert hf["tpot_seconds"]["mean"] == 0.5
    assert hf["e2e_seconds"]["p99"] == 2.0
    assert (hf["response_seconds"]["mean"], hf["response_seconds"]["p50"]) == (2.5, 2.5)


def test_figures_are_those_of_the_report_of_a_comparison(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = []
    for index in range(40):
        took = np.sort(rng.integers(1, 5 * SECOND, 4)) + index * SECOND
        changes: dict[str, Any] = {"chunk_ns": took.tolist(), "end_ns": int(took[-1]) + 9}
        changes |= {"phase": "warmup" if index < 4 else "measured" if index < 36 else "drain"}
        changes |= {"chunk_tokens": []} if index % 3 else {}
        changes |= {"error": "reset"} if index % 7 == 0 else {}
        records.append(request(index, scheduled_ns=index * SECOND - 5, **changes))
    sides = {"hf": records, "vllm": [replace(one, target="vllm", phase="measured") for one in records]}
    found = measure(write(tmp_path / "r", [one for pair in zip(*sides.values(), strict=True) for one in pair]))
    for target, side in sides.items():
        theirs = requests.of(side)
        assert found[target]["output_throughput"] == pytest.approx(stats.output_throughput(theirs))
        window = stats.steady_window(theirs)
        assert window is not None
        ended = theirs.answered & (theirs.last_ns > window[0]) & (theirs.last_ns <= window[1])
        assert found[target]["request_throughput"] == pytest.approx(ended.sum() / ((window[1] - window[0]) / 1e9))
        for metric in LATENCIES:
            summary = stats.summarize(stats.LATENCIES[metric](theirs)[theirs.measured])
            assert summary is not None
            expected = [summary.mean, summary.p50, summary.p90, summary.p99]
            assert list(found[target][metric].values()) == pytest.approx(expected)


def test_an_answer_that_is_not_as_long_as_asked_for_counts_as_good_and_is_named(tmp_path: Path) -> None:
    short: dict[str, Any] = {"output_tokens": 3, "chunk_tokens": []}
    unmeasured = request(0, phase="warmup", **short)
    found = measure(write(tmp_path / "r", [unmeasured, request(1), request(2, **short), request(3, **short)]))
    assert found["hf"]["short_answers"] == 2
    assert list(lines(found))[-1].startswith("  2 answers were not as long as asked for")


def test_tokens_of_requests_that_the_end_of_the_run_cut_off_are_in_the_throughput_and_are_no_failures(
    tmp_path: Path,
) -> None:
    cut: dict[str, Any] = {"error": "cancelled", "output_tokens": None}
    stamps = [part * SECOND // 2 for part in (1, 2, 3, 5)]
    records = [
        request(0, end_ns=2 * SECOND, **cut, chunk_ns=stamps, chunk_tokens=[1, 2, 3, 4]),
        # How many tokens these held is not known.
        request(0, end_ns=2 * SECOND, **cut | {"chunk_tokens": []}),
        request(0, end_ns=2 * SECOND, error="timeout", output_tokens=None),
        request(0, end_ns=2 * SECOND, **cut, chunk_ns=[], chunk_tokens=[]),
    ]
    hf = measure(write(tmp_path / "r", records))["hf"]
    assert (hf["requests"], hf["failed"], hf["cut_off"]) == (4, {"timeout": 1}, 3)
    assert hf["output_throughput"] == (1 + 2 + 3) / 2
    assert hf["ttft_seconds"] is None
    text = list(lines({"hf": hf}))
    assert text[0] == "hf: 4 measured requests, 1 failed (timeout 1), 3 cut off by the end of the run"
    assert text[1].startswith("  3.0 output tokens/s, 0.00 requests/s")


def test_nothing_measured_has_no_figures(tmp_path: Path) -> None:
    assert measure(write(tmp_path / "none", [])) == {}
    failed = request(0, error="connect", output_tokens=None, chunk_ns=[], chunk_tokens=[])
    found = measure(write(tmp_path / "failed", [failed]))["hf"]
    assert (found["requests"], found["failed"], found["ttft_seconds"]) == (1, {"connect": 1}, None)
    assert next(lines({"hf": found})) == "hf: 1 measured requests, 1 failed (connect 1)"
    assert measure(write(tmp_path / "warmup", [request(0, phase="warmup")]))["hf"]["output_throughput"] is None


def test_the_table_has_a_row_for_each_latency_that_there_is(tmp_path: Path) -> None:
    text = list(lines(measure(write(tmp_path / "r", [request(index) for index in range(5)]))))
    assert text[0] == "hf: 5 measured requests, 0 failed"
    assert [line.split()[0] for line in text[2:]] == ["ms", "TTFT", "TPOT", "E2E"]
    assert text[3].split() == ["TTFT", *["500.00"] * 4]


def test_many_records_take_little_time(tmp_path: Path) -> None:
    batch = to_bytes(request(index) for index in range(64))
    file = RecordFile(tmp_path / "r")
    for _ in range(1500):
        file.write(batch)
    file.close()
    began = time.process_time()
    assert measure(tmp_path / "r")["hf"]["requests"] == 64 * 1500
    assert time.process_time() - began < 5
