"""The rings that keep samples."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.timeline import Instant, Ring, Series, Timeline

RSS = Series("host_rss_bytes", server="hf")
USED = Series("gpu_memory_used_bytes", gpu="1")
values = st.floats(allow_nan=False, allow_infinity=False)


class Clock:
    """Stands still until told; wall time is ahead of monotonic time by 1,000,000 ns."""

    def __init__(self) -> None:
        self.time_ns = 0

    def __call__(self) -> Instant:
        return Instant(self.time_ns, self.time_ns + 1_000_000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def filled(capacity: int, given: list[float]) -> Ring:
    clock = Clock()
    ring = Ring(capacity, 1, clock)
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


@given(st.integers(1, 8), st.lists(values, max_size=30), st.integers(0, 40))
def test_the_peak_is_the_largest_value_since_a_moment(capacity: int, given: list[float], since_ns: int) -> None:
    kept = [value for time_ns, value in list(enumerate(given))[-capacity:] if time_ns >= since_ns]
    assert filled(capacity, given).peaks(since_ns) == ({RSS: max(kept)} if kept else {})


def test_a_row_carries_both_clocks(clock: Clock) -> None:
    ring = Ring(2, 1, clock)
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
    ring = Ring(10, 2, clock)
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


def test_a_series_that_finds_no_column_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ring = Ring(4, 2)
    servers = [Series("host_rss_bytes", server) for server in ("a", "b", "c")]
    for _ in range(2):
        ring.append(dict.fromkeys(servers, 1.0))
    assert ring.latest() == dict.fromkeys(servers[:2], 1.0)
    assert ring.left_out == {servers[2]}
    assert [record.message for record in caplog.records] == [
        f"{servers[2]} is left out: all 2 columns of its kind are taken"
    ]


def test_a_value_that_is_not_a_number_is_absent() -> None:
    assert filled(4, [math.nan]).latest() == {}


def test_the_memory_of_a_timeline_is_taken_at_once_and_told() -> None:
    timeline = Timeline()
    timeline.ring("host", capacity=1000, width=3)
    timeline.ring("gpu0", capacity=10, width=1)
    assert timeline.size_bytes == 1000 * 5 * 8 + 10 * 3 * 8
    before = timeline.size_bytes
    timeline.rings["gpu0"].append({USED: 1.0})
    assert timeline.size_bytes == before
