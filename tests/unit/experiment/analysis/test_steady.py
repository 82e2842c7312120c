"""Whether a cell was steady, on played servers: closed loops, queues that are stable and queues that grow."""

import heapq
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import linregress

from experiment.analysis import steady
from experiment.analysis.requests import UNKNOWN, Floats, Longs, Requests
from experiment.analysis.steady import Steady, Trend
from experiment.plan.settings import read_plan
from tests.unit.experiment.folders import SECOND

CHUNKS = 10


def columns(sent: Floats, first: Floats, last: Floats, warmup: int) -> Requests:
    """Requests by their times in seconds, with tokens at equal distances; the first and the last are not measured."""
    stamps = np.linspace(first, last, CHUNKS, axis=1)

    def ns(seconds: Floats) -> Longs:
        return np.asarray(np.round(seconds * SECOND), dtype=np.int64)

    lists = pa.ListArray.from_arrays(np.arange(0, len(sent) * CHUNKS + 1, CHUNKS, dtype=np.int32), ns(stamps).ravel())
    none = pa.array([[]] * len(sent), pa.list_(pa.int64()))
    batch = pa.record_batch([lists, none], ["chunk_ns", "chunk_tokens"])
    index = np.arange(len(sent))
    unknown = np.full(len(sent), UNKNOWN)
    return Requests(
        sent_ns=ns(sent),
        end_ns=ns(last),
        first_ns=ns(first),
        last_ns=ns(last),
        index=index,
        scheduled_ns=unknown,
        prompt_tokens=np.full(len(sent), 9),
        output_tokens=np.full(len(sent), CHUNKS),
        measured=(index >= warmup) & (index < len(sent) - warmup),
        error=unknown,
        token_source=np.zeros(len(sent), dtype=np.int64),
        read=lambda: [batch],
    )


def queue(draw: np.random.Generator, sent: Floats | None, seats: int, count: int, slower: float = 1.0) -> Requests:
    """Requests that wait for one of some seats; without times of sending each is sent when one before it has ended.

    From the first to the last a server becomes `slower` by this factor.
    """
    took = draw.lognormal(-0.18, 0.6, count) * np.linspace(1, slower, count)
    free = [float(at) for at in draw.uniform(0, 1, seats)]
    heapq.heapify(free)
    times = np.empty((count, 3))
    for number in range(count):
        at = heapq.heappop(free)
        begun = at if sent is None else max(at, float(sent[number]))
        due = at if sent is None else float(sent[number])
        last = begun + took[number]
        times[number] = due, begun + 0.1 * took[number], last
        heapq.heappush(free, last)
    sent_at, first, last_at = times.T
    played = columns(sent_at, first, last_at, warmup=max(2, seats))
    return played if sent is None else replace(played, scheduled_ns=played.sent_ns)


def poisson(draw: np.random.Generator, rate: float, count: int) -> Floats:
    return np.cumsum(draw.exponential(1 / rate, count))


def drifts(requests: Requests) -> dict[str, float]:
    return steady.drifts({1: steady.measure(requests)}).get(1, {})


@pytest.mark.parametrize(("seats", "count"), [(1, 60), (4, 60), (4, 400), (16, 200), (16, 800)])
def test_a_steady_closed_loop_is_seldom_said_to_drift(seats: int, count: int) -> None:
    draw = np.random.default_rng(5)
    found = [drifts(queue(draw, None, seats, count)) for _ in range(200)]
    assert sum(map(bool, found)) <= 0.05 * 200, found


@pytest.mark.parametrize(("load", "count"), [(0.3, 400), (0.7, 400), (0.7, 2000), (0.9, 2000)])
def test_a_stable_queue_in_an_open_loop_is_seldom_said_to_drift(load: float, count: int) -> None:
    draw = np.random.default_rng(6)
    found = [drifts(queue(draw, poisson(draw, 8 * load, count), 8, count)) for _ in range(200)]
    assert sum(map(bool, found)) <= 0.05 * 200, found


@pytest.mark.parametrize("load", [1.2, 2.0])
def test_a_queue_that_grows_is_found(load: float) -> None:
    draw = np.random.default_rng(7)
    found = [drifts(queue(draw, poisson(draw, 8 * load, 400), 8, 400)) for _ in range(100)]
    assert sum(one.get("ttft_seconds", 0) > 0 for one in found) >= 95, found


def test_a_closed_loop_whose_server_becomes_slower_is_found() -> None:
    draw = np.random.default_rng(8)
    found = [drifts(queue(draw, None, 4, 400, slower=3.0)) for _ in range(100)]
    assert sum(one.get("output_throughput", 0) < 0 for one in found) >= 95, found


def arrivals(draw: np.random.Generator, load: float, count: int) -> Requests:
    """Requests that come at random to a server with one seat."""
    return queue(draw, poisson(draw, load, count), 1, count)


def too_short(requests: Requests) -> bool:
    return bool(steady.short({1: steady.measure(requests)}))


def test_a_cell_far_beyond_what_the_server_can_do_is_too_short_for_its_latencies() -> None:
    draw = np.random.default_rng(11)
    found = {load: [arrivals(draw, load, 20) for _ in range(200)] for load in (1.5, 3.0)}
    assert np.mean([*map(too_short, found[1.5])]) > 0.5
    assert np.mean([*map(too_short, found[3.0])]) > 0.95
    closed = [replace(requests, scheduled_ns=np.full(20, UNKNOWN)) for requests in found[3.0]]
    assert not any(map(too_short, closed))


@pytest.mark.parametrize(("load", "count", "share"), [(0.5, 100, 0.01), (0.9, 20, 0.2), (0.9, 400, 0.05)])
def test_a_queue_that_comes_and_goes_seldom_makes_a_cell_too_short(load: float, count: int, share: float) -> None:
    draw = np.random.default_rng(12)
    assert np.mean([too_short(arrivals(draw, load, count)) for _ in range(200)]) <= share


def test_the_parts_of_an_open_loop_end_with_the_last_request_that_was_sent() -> None:
    sent = np.linspace(0, 20, 401)
    took = np.where(np.arange(401) == 340, 4.0, 0.3)
    closed = columns(sent, sent + 0.05, sent + took, 60)
    assert steady.measure(closed).trends == {}
    judged = steady.measure(replace(closed, scheduled_ns=closed.sent_ns)).trends
    assert judged.keys() == {"output_throughput", "ttft_seconds"}


def test_an_open_loop_whose_requests_all_failed_has_waited_for_nothing() -> None:
    failed = arrivals(np.random.default_rng(13), 3.0, 20)
    failed = replace(failed, error=np.zeros(20, dtype=np.int64))
    assert steady.measure(failed).waited == 0


def test_a_cell_that_is_too_short_is_not_judged() -> None:
    assert steady.measure(queue(np.random.default_rng(9), None, 4, 20)).trends == {}
    assert steady.measure(columns(np.array([0.0]), np.array([1.0]), np.array([1.0]), 0)).trends == {}


def test_the_trend_of_a_line_is_its_change_over_the_window() -> None:
    # 1.05, 1.15, ... 1.95: from 1 to 2 over the window, whose mean is 1.5.
    found = steady.trend(np.linspace(1.05, 1.95, 10))
    assert found.change == pytest.approx(1 / 1.5)
    assert found.chance < 1e-9
    assert steady.trend(np.full(10, 3.0)) == steady.trend(np.zeros(10)) == Trend(0.0, 1.0)


def test_the_chance_of_a_trend_is_that_of_the_t_test_of_its_slope() -> None:
    values = np.random.default_rng(10).normal(5, 1, 10)
    assert steady.trend(values).chance == pytest.approx(linregress(np.arange(10), values).pvalue)


def test_a_small_trend_is_no_drift_however_sure_it_is_and_the_tests_share_the_chance() -> None:
    def cells(many: int, **trends: Trend) -> dict[int, Steady]:
        return {index: Steady((0, 1), 1.0, trends) for index in range(many)}

    assert steady.drifts(cells(1, ttft_seconds=Trend(0.29, 1e-9))) == {}
    assert steady.drifts(cells(1, ttft_seconds=Trend(-0.5, 0.009))) == {0: {"ttft_seconds": -0.5}}
    assert steady.drifts(cells(2, ttft_seconds=Trend(-0.5, 0.009))) == {}


@pytest.mark.parametrize(
    ("arguments", "least", "most"),
    [
        *((["--preset", name], 0, 0.05) for name in ("quick", "ladder", "same-memory")),
        *((["--preset", name, "--requests-per-user=16"], 0.95, 1) for name in ("quick", "ladder", "same-memory")),
        (["--preset", "gate"], 0.95, 1),
    ],
)
def test_presets_are_long_enough_to_tell_a_drift_at_their_highest_level_where_the_docs_say_so(
    arguments: list[str], least: float, most: float
) -> None:
    plan = read_plan(arguments)
    level, draw, told = max(plan.levels), np.random.default_rng(1), []
    for _ in range(40):
        played = queue(draw, None, int(level), plan.total(level))
        first = plan.warmup(level)
        within = (played.index >= first) & (played.index < first + plan.measured(level))
        told.append(bool(steady.measure(replace(played, measured=within)).trends))
    assert least <= np.mean(told) <= most
