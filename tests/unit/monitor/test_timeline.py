"""The rings that keep samples."""

import math
import time
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor import timeline
from monitor.timeline import Clocks, Ring, Series, Timeline

RSS = Series("host_rss_bytes", server="hf")
USED = Series("gpu_memory_used_bytes", gpu="1")
values = st.floats(allow_nan=False, allow_infinity=False)


class Clock:
    """Stands still until told; wall time is ahead of monotonic time by 1,000,000 ns."""

    def __init__(self) -> None:
        self.time_ns = 0
        self.both = Clocks(lambda: self.time_ns, lambda: self.time_ns + 1_000_000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def server(name: str) -> Series:
    return Series("host_rss_bytes", name)


def filled(capacity: int, given: list[float]) -> Ring:
    clock = Clock()
    ring = Ring(capacity, 1, clock.both)
    for clock.time_ns, value in enumerate(given):
        ring.append({RSS: value})
    return ring


def contents(ring: Ring) -> list[float]:
    return [float(value) for value in ring.rows(*ring.bounds())[:, 2]]


@given(st.integers(1, 8), st.lists(values, max_size=30))
def test_a_ring_keeps_the_newest_rows_in_the_order_of_time(capacity: int, given: list[float]) -> None:
    assert contents(filled(capacity, given)) == given[-capacity:]


@given(st.integers(1, 8), st.lists(values, max_size=30), st.integers(0, 40))
def test_a_row_is_found_by_its_moment_however_often_the_ring_has_wrapped(
    capacity: int, given: list[float], time_ns: int
) -> None:
    ring = filled(capacity, given)
    first, end = ring.bounds()
    assert ring.find(time_ns, first, end) == min(max(time_ns, first), end)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 200), st.randoms(use_true_random=False))
def test_the_peak_is_the_largest_value_since_any_moment_whatever_blocks_the_rows_are_in(
    capacity: int, blocks: int, count: int, random: Random
) -> None:
    given = [random.choice((random.random(), math.nan)) for _ in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "BLOCKS", blocks)
        ring = filled(capacity, given)
    kept = list(enumerate(given))[-capacity:]
    for since_ns in range(count + 1):
        known = [value for time_ns, value in kept if time_ns >= since_ns and not math.isnan(value)]
        assert ring.peaks(since_ns) == ({RSS: max(known)} if known else {})


def test_to_find_the_peaks_of_two_minutes_at_1_khz_takes_well_under_a_millisecond(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tenth of the 30 minutes, with blocks as large as theirs.
    monkeypatch.setattr(timeline, "BLOCKS", timeline.BLOCKS // 10)
    ring = Ring(3 * 60 * 1000, 5, clock.both)
    for clock.time_ns in range(125_000):
        ring.put([clock.time_ns, 1.0, 2.0, 3.0, 4.0])
    took = []
    for _ in range(20):
        began = time.perf_counter()
        ring.peaks(5_000)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.0005


def test_a_peak_of_a_series_that_has_ended_is_still_told(clock: Clock) -> None:
    ring = Ring(100, 2, clock.both)
    ring.append({RSS: 9.0, USED: 1.0})
    ring.clear()
    assert ring.peaks(0) == {RSS: 9.0, USED: 1.0}


def test_a_row_carries_both_clocks(clock: Clock) -> None:
    ring = Ring(2, 1, clock.both)
    clock.time_ns = 5
    ring.append({RSS: 7.0})
    assert ring.rows(0, 1).view("int64")[0, :2].tolist() == [5, 1_000_005]


def test_rows_overwritten_while_they_were_read_are_missing_from_the_front() -> None:
    ring = filled(4, [0.0, 1.0, 2.0, 3.0])
    first, end = ring.bounds()
    for value in (4.0, 5.0):
        ring.append({RSS: value})
    assert [float(value) for value in ring.rows(first, end)[:, 2]] == [2.0, 3.0]


def test_the_newest_row_lacks_series_that_ended_and_is_empty_when_it_is_too_old(clock: Clock) -> None:
    ring = Ring(10, 2, clock.both)
    assert ring.latest() == {}
    ring.append({RSS: 1.0, USED: 2.0})
    clock.time_ns = 9
    ring.append({RSS: 3.0})
    assert ring.latest(since_ns=9) == {RSS: 3.0}
    assert ring.latest(since_ns=10) == {}


def test_nothing_is_known_of_a_ring_that_was_cleared() -> None:
    ring = filled(4, [1.0])
    ring.clear()
    assert ring.latest() == {}


def test_a_series_that_finds_no_column_is_left_out_and_said_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Timeline(clock.both)
    ring = recorded.ring("host", 4, 2)
    for clock.time_ns in (1, 2):
        ring.append(dict.fromkeys(map(server, "abc"), 1.0))
    assert ring.latest() == dict.fromkeys(map(server, "ab"), 1.0)
    assert ring.left_out == {server("c"): 2}
    assert (recorded.left_out(since_ns=2), recorded.left_out(since_ns=3)) == (1, 0)
    assert [record.message for record in caplog.records] == [
        f"{server('c')} is left out: all 2 columns of its kind are taken"
    ]


def test_of_series_that_are_left_out_only_so_many_are_said_and_remembered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timeline, "MAX_LEFT_OUT", 5)
    ring = Ring(10**6, 1)
    for number in range(30):
        ring.append({server("a"): 1.0, server(f"b{number}"): 1.0})
    assert list(ring.left_out) == [server(f"b{number}") for number in range(25, 30)]
    assert len(caplog.records) == timeline.MAX_LINES
    assert caplog.records[-1].message.endswith("no more is said of it")


@given(st.integers(1, 40), st.lists(st.integers(1, 3), max_size=6))
def test_servers_that_come_and_go_take_each_others_columns_and_no_value_changes_its_server(
    capacity: int, eras: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "BLOCKS", 4)
        ring = Ring(capacity, 3)
    for era, servers in enumerate(eras):
        readings = {server(f"{era}-{number}"): float(era) for number in range(servers)}
        # Until the era before is overwritten, and a column has been looked for after that.
        for _ in range(2 * capacity + 2 * ring.block):
            ring.append(readings)
        assert ring.latest() == ring.peaks(0) == readings
    assert len(ring.columns) <= 3


def test_a_column_is_not_given_again_while_the_ring_holds_a_value_of_it_or_before_it_can_have_one(clock: Clock) -> None:
    ring = Ring(4, 2, clock.both)
    ring.append({server("a"): 1.0})
    # Two new ones in one row: the column of the first has no value yet.
    ring.append({server("b"): 2.0, server("c"): 3.0})
    assert set(ring.left_out) == {server("c")}
    for _ in range(3):
        ring.append({server("b"): 2.0})
    # The row of `a` is overwritten only now.
    ring.append({server("b"): 2.0, server("c"): 3.0})
    assert ring.latest() == {server("b"): 2.0, server("c"): 3.0}
    assert not ring.left_out
    assert ring.peaks(0) == {server("b"): 2.0, server("c"): 3.0}


def test_a_column_that_is_kept_is_given_to_no_other(clock: Clock) -> None:
    ring = Ring(4, 1, clock.both)
    assert ring.keep(USED) == 0
    for _ in range(20):
        ring.append({RSS: 1.0})
    assert (ring.latest(), set(ring.left_out)) == ({}, {RSS})
    with pytest.raises(ValueError, match="all 1 columns are taken"):
        ring.keep(RSS)


def test_a_value_that_is_not_a_number_is_absent() -> None:
    assert filled(4, [math.nan]).latest() == {}


def test_the_memory_of_a_timeline_is_taken_at_once_and_told() -> None:
    recorded = Timeline()
    recorded.ring("host", capacity=1000, width=3)
    recorded.ring("gpu0", capacity=10, width=1)
    # Rows with two stamps, and a block of maxima for each row and one to spare.
    assert recorded.size_bytes == (1000 * 5 + 1001 * 3 + 10 * 3 + 11 * 1) * 8
    before = recorded.size_bytes
    recorded.rings["gpu0"].append({USED: 1.0})
    assert recorded.size_bytes == before
