"""From records to figures, against figures worked out by hand and against known truths."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest

from experiment.analysis import requests, stats
from experiment.analysis.requests import Floats
from loadtest.records import Record
from tests.unit.experiment.folders import SECOND, make_record

MILLI = SECOND // 1000


def steady_window(records: Sequence[Record]) -> tuple[int, int] | None:
    return stats.steady_window(requests.of(records))


def output_throughput(records: Sequence[Record]) -> float | None:
    return stats.output_throughput(requests.of(records))


def paired(first: Sequence[Record], second: Sequence[Record], metric: str) -> Floats:
    return stats.paired(requests.of(first), requests.of(second), metric)


def different_work(first: Sequence[Record], second: Sequence[Record]) -> list[int]:
    return stats.different_work(requests.of(first), requests.of(second))


def pairs(*rows: tuple[float, float]) -> Floats:
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def simulate(rng: np.random.Generator, truth: float, repeats: int) -> list[float]:
    """Ratios of the repeats of an experiment whose first server takes `truth` times as long as the second.

    Requests differ by a factor that both servers see, each answer by its own, and each run by the machine's mood.
    """
    found = []
    for _ in range(repeats):
        request = rng.normal(0, 0.5, (40, 1)) + rng.normal(0, 0.3, (40, 2)) + rng.normal(0, 0.03, (1, 2))
        found.append(stats.ratio_of_means(np.exp(request) * [truth, 1.0]) or 0.0)
    return found


@pytest.mark.parametrize("repeats", [2, 4])
@pytest.mark.parametrize("truth", [1.0, 1.05, 1.5, 10.0])
def test_the_interval_holds_the_true_ratio_in_95_of_100_experiments(truth: float, repeats: int) -> None:
    rng = np.random.default_rng(3)
    found = [stats.ratio_of_pairs(simulate(rng, truth, repeats)) for _ in range(1000)]
    inside = [ratio for ratio in found if (ratio.low or 0) <= truth <= (ratio.high or 0)]
    assert 930 <= len(inside) <= 970


def test_equal_servers_seldom_get_a_verdict() -> None:
    rng = np.random.default_rng(7)
    verdicts = Counter(stats.ratio_of_pairs(simulate(rng, 1.0, 4)).verdict for _ in range(1000))
    assert verdicts["no detectable difference"] >= 930, verdicts


@pytest.mark.parametrize(("truth", "verdict"), [(2.0, "faster"), (0.5, "slower")])
def test_a_true_difference_of_two_is_found_in_four_repeats(truth: float, verdict: str) -> None:
    rng = np.random.default_rng(8)
    assert {stats.ratio_of_pairs(simulate(rng, truth, 4)).verdict for _ in range(100)} == {verdict}


def test_the_ratio_of_a_repeat_is_of_the_means_over_its_pairs() -> None:
    assert stats.ratio_of_means(pairs((2, 1), (4, 2), (6, 6))) == pytest.approx(12 / 9)


@pytest.mark.parametrize("found", [pairs(), pairs((2, 0), (3, 0)), pairs((0, 2), (0, 3))])
def test_no_pairs_or_a_server_that_took_no_time_has_no_ratio(found: Floats) -> None:
    assert stats.ratio_of_means(found) is None


def test_one_repeat_has_a_ratio_without_an_interval_or_a_verdict() -> None:
    found = stats.ratio_of_pairs([3.0])
    assert found.value == pytest.approx(3.0)
    assert (found.low, found.high) == (None, None)
    assert found.verdict == "no detectable difference"


def test_percentiles_are_exact() -> None:
    summary = stats.summarize(np.arange(101, dtype=np.float64))
    assert summary == stats.Summary(count=101, mean=50.0, p50=50.0, p90=90.0, p99=99.0)


def test_the_order_of_values_does_not_matter() -> None:
    assert stats.summarize(np.array([3.0, 1.0, 2.0])) == stats.summarize(np.array([1.0, np.nan, 2.0, 3.0]))


def test_no_values_have_no_distribution() -> None:
    assert stats.summarize(np.array([np.nan])) is None


def one(index: int, phase: str, sent: float, end: float, *chunks: float, **changes: object) -> Record:
    """A record by its times in seconds, one token a chunk."""
    stamps = [round(chunk * SECOND) for chunk in chunks]
    return make_record(
        **(
            {
                "index": index,
                "phase": phase,
                "sent_ns": round(sent * SECOND),
                "end_ns": round(end * SECOND),
                "chunk_ns": stamps,
                "chunk_tokens": [1] * len(stamps),
                "output_tokens": len(stamps),
            }
            | changes
        )
    )


# Two in flight: the window is from 1 s (the first measured is sent) to 4 s (the last measured ends).
LOAD = [
    one(0, "warmup", 0.0, 2.0, 0.5, 1.0, 1.5, 2.0),
    one(1, "measured", 1.0, 3.0, 1.5, 2.0, 2.5, 3.0),
    one(2, "measured", 2.0, 4.0, 2.5, 3.0, 3.5, 4.0),
    one(3, "drain", 3.0, 5.0, 3.5, 4.0, 4.5, 5.0),
]


def test_the_window_is_from_the_first_measured_request_to_where_the_load_falls() -> None:
    assert steady_window(LOAD) == (1 * SECOND, 4 * SECOND)


def test_the_window_ends_with_the_measured_requests_while_others_keep_the_load_up() -> None:
    assert steady_window([*LOAD[:3], one(3, "drain", 3.0, 9.0), one(4, "drain", 4.5, 9.5)]) == (
        1 * SECOND,
        4 * SECOND,
    )


def test_the_window_ends_when_the_load_falls_before_the_last_measured_request_ends() -> None:
    long = one(2, "measured", 2.0, 8.0, 8.0)
    assert steady_window([LOAD[0], LOAD[1], long, LOAD[3]]) == (1 * SECOND, 5 * SECOND)


def test_there_is_no_window_without_measured_requests() -> None:
    assert steady_window([]) is None
    assert steady_window([LOAD[0], LOAD[3]]) is None
    assert output_throughput([LOAD[0], LOAD[3]]) is None


def test_a_window_without_length_has_no_throughput() -> None:
    assert output_throughput([one(0, "measured", 1.0, 1.0, 1.0)]) is None


def test_requests_of_every_phase_count_where_they_overlap_the_window() -> None:
    # Warm-up at 1.5 and 2.0 (the token at 1.0 came as the window opened), 4 + 4 measured, drain at 3.5 and 4.0.
    assert output_throughput(LOAD) == 12 / 3


def test_a_failed_request_counts_no_tokens() -> None:
    failed = one(1, "measured", 1.0, 3.0, 1.5, 2.0, error="truncated")
    assert output_throughput([LOAD[0], failed, *LOAD[2:]]) == 8 / 3


def test_chunks_count_by_their_tokens() -> None:
    uneven = one(1, "measured", 1.0, 3.0, 1.5, 3.0, chunk_tokens=[5, 2], output_tokens=7)
    assert output_throughput([LOAD[0], uneven, *LOAD[2:]]) == (12 - 4 + 7) / 3


def test_tokens_are_spread_over_chunks_that_do_not_say_theirs() -> None:
    # Ten tokens over four chunks, of which those at 3.5 and 4.0 are inside the window.
    silent = one(3, "drain", 3.0, 5.0, 3.5, 4.0, 4.5, 5.0, chunk_tokens=[], output_tokens=10)
    assert output_throughput([*LOAD[:3], silent]) == (12 - 2 + 5) / 3


def test_a_request_of_an_unknown_number_of_tokens_counts_none() -> None:
    unknown = one(3, "drain", 3.0, 5.0, 3.5, 4.0, chunk_tokens=[], output_tokens=None)
    assert output_throughput([*LOAD[:3], unknown]) == (12 - 2) / 3


def test_errors_are_counted_by_kind() -> None:
    records = [make_record(error=kind) for kind in ("timeout", "reset", None, "timeout")]
    assert stats.errors_by_kind(requests.of(records).error) == {"timeout": 2, "reset": 1}
    assert stats.errors_by_kind(requests.of([make_record()]).error) == {}


def test_the_same_work_in_another_order_is_no_difference() -> None:
    records = [make_record(index=index, output_tokens=index + 1) for index in range(3)]
    assert different_work(records, records[::-1]) == []


@pytest.mark.parametrize("change", [{"prompt_tokens": 8}, {"output_tokens": 5}, {"prompt_tokens": None}])
def test_other_counts_are_different_work(change: dict[str, int | None]) -> None:
    first = [make_record(index=index) for index in range(3)]
    second = [first[0], make_record(index=1, **change), first[2]]
    assert different_work(first, second) == [1]
    assert different_work(second, first) == [1]


@pytest.mark.parametrize("name", ["prompt_tokens", "output_tokens"])
def test_counts_that_nobody_knows_are_not_proof_of_equal_work(name: str) -> None:
    unknown = [make_record(index=4, **{name: None})]
    assert different_work(unknown, unknown) == [4]


def test_a_request_that_one_side_lacks_is_different_work() -> None:
    records = [make_record(index=index) for index in range(3)]
    assert different_work(records, records[:2]) == [2]
    assert different_work(records[1:], records) == [0]


def test_requests_pair_by_their_index() -> None:
    first = [one(0, "measured", 0.0, 2.0, 1.0, 2.0), one(1, "measured", 0.0, 4.0, 3.0, 4.0)]
    second = [one(1, "measured", 0.0, 1.0, 0.5, 1.0), one(0, "measured", 0.0, 0.5, 0.25, 0.5)]
    assert paired(first, second, "e2e_seconds").tolist() == [[2.0, 0.5], [4.0, 1.0]]
    assert paired(first, second, "ttft_seconds").tolist() == [[1.0, 0.25], [3.0, 0.5]]


def test_a_request_that_failed_on_either_side_has_no_pair() -> None:
    good = [one(index, "measured", 0.0, 1.0, 0.5, 1.0) for index in range(3)]
    failed = [good[0], one(1, "measured", 0.0, 1.0, 0.5, error="reset"), good[2]]
    assert len(paired(good, failed, "ttft_seconds")) == len(paired(failed, good, "ttft_seconds")) == 2
    assert paired(good, [], "ttft_seconds").shape == (0, 2)


def test_only_measured_requests_are_paired() -> None:
    assert paired(LOAD, LOAD, "e2e_seconds").tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_the_interval_of_a_ratio_of_pairs_is_that_of_students_t() -> None:
    # Logarithms 0, 0.1, 0.2, 0.3: mean 0.15, standard error 0.0645497, t of 3 degrees of freedom 3.18245.
    found = stats.ratio_of_pairs([1.0, np.exp(0.1), np.exp(0.2), np.exp(0.3)])
    assert found.value == pytest.approx(np.exp(0.15))
    assert (found.low, found.high) == pytest.approx((np.exp(0.15 - 0.205426), np.exp(0.15 + 0.205426)), rel=1e-5)
    assert found.verdict == "no detectable difference"


@pytest.mark.parametrize(
    ("ratios", "verdict"), [([1.1, 1.11, 1.12], "faster"), ([0.9, 0.91, 0.92], "slower"), ([0.9, 1.1], "no detectable")]
)
def test_pairs_that_agree_have_a_verdict(ratios: list[float], verdict: str) -> None:
    assert stats.ratio_of_pairs(ratios).verdict.startswith(verdict)


@pytest.mark.parametrize("pairs", [2, 4, 8])
def test_the_interval_of_few_pairs_holds_the_truth_in_95_of_100_experiments(pairs: int) -> None:
    rng = np.random.default_rng(3)
    found = [stats.ratio_of_pairs(list(0.97 * np.exp(rng.normal(0, 0.05, pairs)))) for _ in range(2000)]
    assert 0.935 < np.mean([one.low <= 0.97 <= one.high for one in found if one.low and one.high]) < 0.965


@pytest.mark.parametrize(("share", "count"), [(0.99, 1000), (1.0, 20), (0.0, 5), (0.5, 10)])
def test_the_interval_of_a_share_is_that_of_wilson(share: float, count: int) -> None:
    known = binomtest(round(share * count), count).proportion_ci(method="wilson")
    assert stats.wilson(share, count) == pytest.approx((known.low, known.high))
