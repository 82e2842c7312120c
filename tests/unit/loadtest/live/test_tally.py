"""Distributions and tallies: right to 1 %, and the same whether values came in one place or in many."""

from collections.abc import Sequence
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.live.tally import GAMMA, METRICS, RELATIVE_ERROR, Distribution, Tally, times_of
from loadtest.records import Record

SHARES = (0.0, 0.5, 0.95, 0.99, 1.0)
seconds = st.floats(1e-6, 1e4) | st.just(0.0)
several = st.lists(seconds, min_size=1, max_size=200)


def distribution(values: Sequence[float]) -> Distribution:
    made = Distribution()
    for value in values:
        made.add(value)
    return made


def sent_over_the_wire(dumped: Any) -> Any:
    return msgpack.loads(msgpack.dumps(dumped))


@given(several)
def test_percentiles_are_right_to_one_percent(values: list[float]) -> None:
    found = distribution(values).percentiles(*SHARES)
    right = np.quantile(values, SHARES, method="lower")
    assert found == pytest.approx(right, rel=RELATIVE_ERROR * (1 + 1e-9), abs=1e-12)


@given(st.lists(several, min_size=1, max_size=5))
def test_a_merged_distribution_equals_one_that_was_given_all_values(parts: list[list[float]]) -> None:
    merged = Distribution()
    for part in parts:
        merged.merge(Distribution.load(sent_over_the_wire(distribution(part).dump())))
    whole = distribution([value for part in parts for value in part])
    assert merged.percentiles(*SHARES) == pytest.approx(whole.percentiles(*SHARES), rel=1e-12)
    assert merged.count == whole.count
    assert merged.sum == pytest.approx(whole.sum)


@given(several, st.lists(st.integers(-900, 500), min_size=1, max_size=20, unique=True))
def test_counts_up_to_the_edges_of_bins_are_exact(values: list[float], bins: list[int]) -> None:
    bins.sort()
    # A value on an edge, to the last bit, may fall on either side of it.
    values = [value for value in values if all(abs(value - GAMMA**k) > 1e-9 * value for k in bins)] or [0.0]
    assert distribution(values).counts_up_to(bins) == [sum(value <= GAMMA**k for value in values) for k in bins]


def test_an_empty_distribution_has_no_percentiles_and_counts_nothing() -> None:
    assert Distribution().percentiles(0.5) is None
    assert Distribution().counts_up_to([-10, 0, 10]) == [0, 0, 0]


def record(**given: Any) -> Record:
    usual: dict[str, Any] = {
        "index": 0,
        "target": "hf",
        "phase": "measured",
        "max_tokens": 5,
        "sent_ns": 2_000_000_000,
        "end_ns": 9_000_000_000,
        "prompt_tokens": 7,
        "output_tokens": 5,
        "chunk_ns": [2_500_000_000, 6_500_000_000],
    }
    return Record(**(usual | given))


def test_a_closed_loop_has_no_times_from_the_schedule() -> None:
    assert times_of(record()) == pytest.approx({"ttft": 0.5, "e2e": 4.5, "tpot": 1.0})


def test_an_open_loop_has_times_from_the_schedule_too() -> None:
    times = times_of(record(scheduled_ns=1_750_000_000))
    assert times == pytest.approx(
        {"ttft": 0.5, "e2e": 4.5, "tpot": 1.0, "send_lateness": 0.25, "response_time": 4.75},
    )


def test_a_failed_request_was_sent_late_but_has_no_latency() -> None:
    assert times_of(record(error="reset", scheduled_ns=1_000_000_000)) == {"send_lateness": 1.0}


def test_a_request_sent_before_its_time_is_not_late() -> None:
    assert times_of(record(error="reset", scheduled_ns=3_000_000_000)) == {"send_lateness": 0.0}


def test_a_tally_counts_failures_by_kind_and_all_tokens() -> None:
    tally = Tally()
    for error in (None, None, "reset", "timeout", "reset"):
        tally.end(record(error=error))
    assert tally.outcomes == {"ok": 2, "reset": 2, "timeout": 1}
    assert (tally.prompt_tokens, tally.output_tokens, tally.in_flight) == (35, 25, -5)


def test_a_tally_arrives_as_it_was_sent_and_adds_up() -> None:
    tally = Tally()
    tally.end(record(error="http_4xx", output_tokens=None))
    tally.end(record(scheduled_ns=0))
    tally.observe(times_of(record(scheduled_ns=0)))
    twice = Tally.load(sent_over_the_wire(tally.dump()))
    twice.merge(Tally.load(sent_over_the_wire(tally.dump())))
    assert twice.outcomes == {"ok": 2, "http_4xx": 2}
    assert (twice.prompt_tokens, twice.output_tokens, twice.in_flight) == (28, 10, -4)
    assert {metric: twice.times[metric].count for metric in METRICS} == dict.fromkeys(METRICS, 2)
    assert twice.percentiles("ttft", 0.5) == pytest.approx([0.5], rel=RELATIVE_ERROR)
