"""The schedule of samples."""

import threading
import time

import pytest

from monitor.sampler import Sampler, Task, next_due, samples
from monitor.timeline import Instant, Readings, Series, Timeline

VALUE = Series("host_rss_bytes", server="hf")
LATENESS = Series("monitor_sample_lateness_seconds")
CPU = Series("monitor_cpu_seconds_total")


def read_value() -> Readings:
    return {VALUE: 1.0}


@pytest.mark.parametrize(("time_ns", "expected"), [(100, 110), (103, 110), (109, 110), (110, 120), (135, 140)])
def test_the_next_sample_is_on_the_grid_of_the_first(time_ns: int, expected: int) -> None:
    assert next_due(100, 10, time_ns) == expected


def test_a_sample_holds_its_lateness_and_the_cpu_so_far() -> None:
    timeline, moments = Timeline(10), iter([0, 3_000_000, 4_000_000])
    task = Task("host", read_value, LATENESS, CPU, cpu_clock=lambda: 2.5)
    wait = next(samples(task, timeline, hz=10, clock=lambda: Instant(next(moments), 0)))
    assert timeline.latest()["host"][1] == {VALUE: 1.0, LATENESS: 0.003, CPU: 2.5}
    assert wait == 0.096


def test_a_wait_longer_than_the_system_can_count_ends_with_stop() -> None:
    sampler = Sampler("shared", iter([1e300]))
    sampler.start()
    time.sleep(0.01)
    assert sampler.alive()
    sampler.stop()
    assert not sampler.alive()


def test_samples_come_at_the_rate_and_end_with_stop() -> None:
    timeline = Timeline(1000)
    sampler = Sampler("host", samples(Task("host", read_value, LATENESS, CPU), timeline, hz=100))
    assert not sampler.alive()
    sampler.start()
    time.sleep(0.3)
    assert sampler.alive()
    sampler.stop()
    assert not sampler.alive()
    rows = timeline.window(0, 2**63 - 1).num_rows
    assert 15 * 3 <= rows <= 32 * 3


def test_a_reading_that_outlasts_the_period_shows_as_lateness() -> None:
    timeline, done = Timeline(10), threading.Event()

    def read_slowly() -> Readings:
        if len(timeline.latest()) and timeline.latest()["host"][1][LATENESS] > 0.01:
            done.set()
        time.sleep(0.035)
        return {}

    sampler = Sampler("host", samples(Task("host", read_slowly, LATENESS, CPU), timeline, hz=100))
    sampler.start()
    assert done.wait(2)
    sampler.stop()
