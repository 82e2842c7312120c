"""The bounded memory of samples."""

import pyarrow as pa
import pytest

from monitor.timeline import SCHEMA, Instant, Series, Timeline

RSS = Series("host_rss_bytes", server="hf")
USED = Series("gpu_memory_used_bytes", gpu=1)


class Clock:
    """Stands still until told; wall time is ahead of monotonic time by 1,000,000 ns."""

    def __init__(self) -> None:
        self.time_ns = 0

    def __call__(self) -> Instant:
        return Instant(self.time_ns, self.time_ns + 1_000_000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def times(table: pa.Table) -> list[int]:
    return [int(time_ns) for time_ns in table["time_ns"].to_pylist()]


def test_a_window_holds_its_start_and_not_its_end(clock: Clock) -> None:
    timeline = Timeline(100, clock)
    for clock.time_ns in (10, 20, 30, 40):
        timeline.append("host", {RSS: clock.time_ns})
    assert times(timeline.window(20, 40)) == [20, 30]


def test_rows_carry_both_clocks_and_null_for_what_does_not_apply(clock: Clock) -> None:
    timeline = Timeline(100, clock)
    clock.time_ns = 5
    timeline.append("host", {RSS: 7.0})
    timeline.append("gpu1", {USED: 8.5})
    common = {"time_ns": 5, "wall_ns": 1_000_005}
    assert timeline.window(0, 10).to_pylist() == [
        common | {"metric": "host_rss_bytes", "server": "hf", "gpu": None, "value": 7.0},
        common | {"metric": "gpu_memory_used_bytes", "server": None, "gpu": 1, "value": 8.5},
    ]


@pytest.mark.parametrize("until_ns", [0, 100])
def test_the_columns_are_the_same_with_and_without_rows(clock: Clock, until_ns: int) -> None:
    timeline = Timeline(100, clock)
    timeline.append("host", {RSS: 7.0})
    assert timeline.window(0, until_ns).schema == SCHEMA
    assert timeline.window(0, until_ns).num_rows == min(until_ns, 1)


def test_the_oldest_tick_of_a_full_ring_makes_room(clock: Clock) -> None:
    timeline = Timeline(3, clock)
    for clock.time_ns in range(10):
        timeline.append("host", {RSS: 1.0})
    assert times(timeline.window(0, 100)) == [7, 8, 9]


def test_a_fast_sampler_does_not_push_out_a_slow_one(clock: Clock) -> None:
    timeline = Timeline(3, clock)
    timeline.append("gpu1", {USED: 1.0})
    for clock.time_ns in range(1, 10):
        timeline.append("host", {RSS: 1.0})
    assert times(timeline.window(0, 100)) == [0, 7, 8, 9]


def test_rows_of_all_samplers_are_in_the_order_of_time(clock: Clock) -> None:
    timeline = Timeline(100, clock)
    for clock.time_ns, sampler in enumerate(["host", "gpu1", "host", "gpu1"]):
        timeline.append(sampler, {RSS: 1.0})
    assert times(timeline.window(0, 100)) == [0, 1, 2, 3]


def test_the_latest_tick_lacks_series_that_ended(clock: Clock) -> None:
    timeline = Timeline(100, clock)
    timeline.append("host", {RSS: 1.0, Series("host_rss_bytes", "vllm"): 2.0})
    clock.time_ns = 9
    timeline.append("host", {RSS: 3.0})
    assert timeline.latest() == {"host": (clock(), {RSS: 3.0})}
