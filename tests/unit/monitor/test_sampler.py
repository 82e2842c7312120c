"""The schedule of samples."""

import logging
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.sampler import CALM_REVIEWS, SECOND, STALE_NS, Governor, Sampler, Schedule, Source


class Machine:
    """A clock and a CPU that only ticks move: each takes `costs` (ns) in turn; sleeps end when they should."""

    def __init__(self, hz: int, cost_ns: Callable[[int], int], max_cpu: float | None = None) -> None:
        self.time_ns, self.cpu_ns = 10**12, 0
        self.began: list[int] = []
        self.lateness: list[float] = []
        self._cost_ns = cost_ns
        self.schedule = Schedule(hz, self._tick, max_cpu, lambda: self.time_ns, lambda: self.cpu_ns / SECOND)

    def _tick(self, lateness: float) -> bool:
        self.began.append(self.time_ns - 10**12)
        self.lateness.append(lateness)
        cost = self._cost_ns(len(self.began))
        self.time_ns += cost
        self.cpu_ns += cost
        return True

    def run(self, seconds: float) -> "Machine":
        for wait in self.schedule.steps():
            self.time_ns += round(wait * SECOND)
            if self.time_ns - 10**12 >= seconds * SECOND:
                return self
        raise AssertionError("a schedule has no end")


@given(st.integers(1, 1000), st.lists(st.integers(0, 30_000_000), min_size=1, max_size=20))
def test_every_tick_is_told_how_late_it_is_on_the_grid_of_the_first_and_none_is_made_up(
    hz: int, costs: list[int]
) -> None:
    machine = Machine(hz, lambda number: costs[number % len(costs)]).run(1)
    dues = [
        Fraction(began) - Fraction(round(late * SECOND))
        for began, late in zip(machine.began, machine.lateness, strict=True)
    ]
    numbers = [round(due * hz / SECOND) for due in dues]
    assert all(abs(due - Fraction(number * SECOND, hz)) <= 2 for due, number in zip(dues, numbers, strict=True))
    assert all(late >= 0 for late in machine.lateness)
    assert all(after > before for before, after in pairwise(numbers))


@pytest.mark.parametrize("hz", [1, 7, 30, 1000])
def test_the_grid_does_not_drift(hz: int) -> None:
    seconds = 3600 if hz < 100 else 60
    machine = Machine(hz, lambda _: 1000).run(seconds)
    assert len(machine.began) == hz * seconds
    assert max(machine.lateness) <= 2e-9
    assert machine.began[-1] == pytest.approx((hz * seconds - 1) * SECOND / hz, abs=2)


def test_a_reading_that_outlasts_the_period_makes_the_next_late_and_those_it_covered_are_skipped() -> None:
    machine = Machine(100, lambda number: 35_000_000 if number == 1 else 0).run(0.08)
    assert machine.began == [0, 35_000_000, 40_000_000, 50_000_000, 60_000_000, 70_000_000]
    assert machine.lateness == [0, 0.025, 0, 0, 0, 0]


def test_a_sleep_that_ends_early_takes_no_sample() -> None:
    machine = Machine(10, lambda _: 0)
    steps = machine.schedule.steps()
    assert next(steps) == 0.1
    machine.time_ns += 60_000_000
    assert next(steps) == 0.04
    assert len(machine.began) == 1


def test_a_source_that_needs_too_much_cpu_takes_fewer_samples_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = Machine(1000, lambda _: 100_000, max_cpu=0.02).run(20)
    assert machine.schedule.hz == 125
    assert len([began for began in machine.began if began >= 19 * SECOND]) == 125
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "--max-cpu" in caplog.text


def test_it_goes_faster_again_when_there_has_been_room_for_long() -> None:
    dear_until = 5
    machine: Machine
    machine = Machine(1000, lambda _: 50_000 if machine.time_ns < 10**12 + dear_until * SECOND else 1000, max_cpu=0.02)
    machine.run(5 + CALM_REVIEWS)
    assert machine.schedule.hz == 250
    machine.run(2 * CALM_REVIEWS + 10)
    assert machine.schedule.hz == 1000


def test_a_rate_without_a_budget_stays() -> None:
    assert Machine(1000, lambda _: 900_000).run(5).schedule.hz == 1000


@given(st.lists(st.floats(0, 1), max_size=200), st.integers(1, 1000))
def test_a_governor_never_stops_a_source_nor_exceeds_the_wanted_rate(shares: list[float], hz: int) -> None:
    governor = Governor(0.02, hz)
    for share in shares:
        governor.review(share)
        assert 1 <= governor.divider <= hz


def test_a_source_is_up_while_its_last_good_tick_is_recent() -> None:
    machine = Machine(1, lambda _: 0)
    source = Source("gpu0", machine.schedule)
    assert not source.up(machine.time_ns)
    machine.run(1)
    assert machine.schedule.success_ns is not None
    assert source.up(machine.schedule.success_ns + STALE_NS)
    assert not source.up(machine.schedule.success_ns + STALE_NS + 1)


def test_a_tick_that_fails_is_no_success() -> None:
    schedule = Schedule(10, lambda _: False, clock=lambda: 0)
    next(schedule.steps())
    assert schedule.success_ns is None


def test_the_cpu_of_a_source_is_that_of_all_its_schedules() -> None:
    machines = [Machine(10, lambda _: 1_000_000).run(3) for _ in range(2)]
    source = Source("gpu0", machines[0].schedule, (machines[1].schedule,))
    assert source.cpu_seconds == pytest.approx(2 * machines[0].schedule.cpu_seconds)
    assert source.cpu_seconds > 0


def test_a_wait_longer_than_the_system_can_count_ends_with_stop() -> None:
    sampler = Sampler("shared", iter([1e300]))
    sampler.start()
    time.sleep(0.01)
    assert sampler.alive()
    sampler.stop()
    assert not sampler.alive()


def test_ticks_come_in_a_thread_of_their_own_and_end_with_stop() -> None:
    ticks: list[float] = []

    def tick(lateness: float) -> bool:
        ticks.append(lateness)
        return True

    sampler = Sampler("host", Schedule(100, tick).steps())
    assert not sampler.alive()
    sampler.start()
    while len(ticks) < 5:
        assert sampler.alive()
        time.sleep(0.01)
    sampler.stop()
    assert not sampler.alive()
    seen = len(ticks)
    time.sleep(0.03)
    assert len(ticks) == seen


def test_a_source_that_is_known_to_be_lost_is_down_at_once() -> None:
    machine = Machine(1, lambda _: 0).run(1)
    source = Source("gpu0", machine.schedule, lost=True)
    assert machine.schedule.success_ns is not None
    assert not source.up(machine.schedule.success_ns)
