"""The schedule of samples."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.sampler import (
    BURST_SECONDS,
    CALM_REVIEWS,
    REVIEW_NS,
    SECOND,
    Allowance,
    Governor,
    Sampler,
    Schedule,
    Source,
    within,
)
from monitor.timeline import STALE_NS, Clocks

WALL_NS = 10**18


class Machine:
    """A clock and a CPU that only ticks move: each takes `costs` (ns) in turn; sleeps end when they should."""

    def __init__(self, hz: int, cost_ns: Callable[[int], int], max_cpu: float | None = None) -> None:
        self.time_ns, self.cpu_ns = 10**12, 0
        self.began: list[int] = []
        self.lateness: list[float] = []
        self.behind: list[int] = []
        self._cost_ns = cost_ns
        self.governor = Governor(max_cpu, hz) if max_cpu else None
        clocks = Clocks(lambda: self.time_ns, lambda: self.time_ns + WALL_NS)
        self.schedule = Schedule(hz, self._tick, self.governor, clocks)

    def _tick(self, lateness: float) -> bool:
        self.began.append(self.time_ns - 10**12)
        self.lateness.append(lateness)
        self.behind.append(self.schedule.behind)
        cost = self._cost_ns(len(self.began))
        self.time_ns += cost
        self.cpu_ns += cost
        return True

    def run(self, seconds: float) -> "Machine":
        reviewed = 0
        for wait in self.schedule.steps():
            self.time_ns += round(wait * SECOND)
            if self.time_ns - 10**12 >= seconds * SECOND:
                return self
            if self.governor and self.time_ns - reviewed >= SECOND:
                reviewed = self.time_ns
                self.governor.review(self.time_ns, self.cpu_ns / SECOND)
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


def test_the_missed_ticks_are_counted_and_their_lateness_can_be_told_from_that_of_the_next() -> None:
    machine = Machine(100, lambda number: 35_000_000 if number % 10 == 1 else 0).run(1)
    assert machine.schedule.samples == len(machine.began)
    assert machine.schedule.missed == sum(machine.behind)
    # Each moment of the grid has a tick that was taken at it or after it.
    every = sorted(
        (began - round((late - 0.01 * number) * SECOND), round((late - 0.01 * number) * SECOND))
        for began, late, behind in zip(machine.began, machine.lateness, machine.behind, strict=True)
        for number in range(behind + 1)
    )
    assert [due for due, _ in every] == list(range(0, SECOND, SECOND // 100))
    assert all(0 <= late <= 25_000_000 for _, late in every)
    assert sum(late > 0 for _, late in every) / len(every) > sum(late > 0 for late in machine.lateness) / len(every)


@pytest.mark.parametrize("hz", [1, 10, 100, 1000])
def test_the_rate_is_that_of_the_ticks_that_were_taken(hz: int) -> None:
    assert Machine(hz, lambda _: 0).run(10).schedule.hz == pytest.approx(hz)
    slow = Machine(hz, lambda _: 3 * SECOND // hz).run(10)
    assert slow.schedule.wanted_hz == hz
    assert slow.schedule.hz == pytest.approx(hz / 3, rel=0.5 if hz < 10 else 0.02)


def test_the_rate_falls_at_once_while_a_tick_hangs() -> None:
    machine = Machine(100, lambda _: 0).run(5)
    machine.time_ns += SECOND
    assert machine.schedule.hz == pytest.approx(100)
    machine.time_ns += 9 * SECOND
    assert machine.schedule.hz == pytest.approx(0.1, rel=0.01)


def test_ticks_that_find_nothing_to_read_are_missed_and_lower_the_rate() -> None:
    machine = Machine(100, lambda _: 0).run(5)
    taken = machine.schedule.samples
    machine.schedule.tick = lambda _: None
    machine.run(10)
    schedule = machine.schedule
    assert (schedule.samples, schedule.hz) == (taken, 0)
    assert schedule.missed == pytest.approx(500, abs=2)
    assert schedule.success_ns is not None
    assert machine.time_ns - schedule.success_ns > 4 * SECOND


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
    assert machine.schedule.hz == pytest.approx(125)
    assert machine.schedule.missed == 0
    assert len([began for began in machine.began if began >= 19 * SECOND]) == 125
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "--max-cpu" in caplog.text


def test_it_goes_faster_again_when_there_has_been_room_for_long() -> None:
    dear_until, calm = 12, CALM_REVIEWS * REVIEW_NS // SECOND
    machine: Machine
    machine = Machine(1000, lambda _: 50_000 if machine.time_ns < 10**12 + dear_until * SECOND else 1000, max_cpu=0.02)
    machine.run(10 + calm)
    assert machine.schedule.hz == pytest.approx(250, rel=0.01)
    machine.run(2 * calm + 20)
    assert machine.schedule.hz == pytest.approx(1000, rel=0.01)


def test_a_rate_without_a_budget_stays() -> None:
    assert Machine(1000, lambda _: 900_000).run(5).schedule.hz == pytest.approx(1000)


@given(st.lists(st.floats(0, 1), max_size=200), st.integers(1, 1000))
def test_a_governor_never_stops_a_source_nor_exceeds_the_wanted_rate(shares: list[float], hz: int) -> None:
    governor = Governor(0.02, hz)
    for share in shares:
        governor.decide(share)
        assert 1 <= governor.divider <= hz


def test_work_goes_on_at_its_share_of_a_core_after_what_was_saved_up_is_used() -> None:
    time_ns, cpu, done = 10**12, 0.0, list[float]()
    allowance = Allowance(0.01, lambda: cpu)
    for _ in range(3000):
        if allowance.left(time_ns):
            done.append((time_ns - 10**12) / SECOND)
            with allowance.spend():
                cpu += 0.001
        time_ns += SECOND // 100
    assert done[:50] == [pytest.approx(number / 100) for number in range(50)]
    assert len([at for at in done if at >= 10]) == pytest.approx(20 * 10, abs=2)
    assert allowance.used == pytest.approx(cpu)


def test_what_is_saved_up_has_an_end() -> None:
    cpu = 0.0
    allowance = Allowance(0.01, lambda: cpu)
    assert allowance.left(10**12)
    assert allowance.left(10**12 + 3600 * SECOND)
    with allowance.spend():
        cpu += 0.01 * BURST_SECONDS + 0.001
    assert not allowance.left(10**12 + 3600 * SECOND)
    assert allowance.left(10**12 + 3600 * SECOND + SECOND // 5)


def test_a_source_is_up_while_its_last_good_tick_is_recent() -> None:
    machine = Machine(1, lambda _: 0)
    source = Source("gpu0", machine.schedule)
    assert not source.up(machine.time_ns)
    machine.run(1)
    assert machine.schedule.success_ns is not None
    assert source.success_wall_ns == machine.schedule.success_ns + WALL_NS
    assert source.up(machine.schedule.success_ns + STALE_NS)
    assert not source.up(machine.schedule.success_ns + STALE_NS + 1)


def test_a_tick_that_fails_is_no_success() -> None:
    schedule = Schedule(10, lambda _: False, clocks=Clocks(lambda: 0))
    next(schedule.steps())
    assert schedule.success_ns is schedule.success_wall_ns is None


def test_a_tick_that_raises_is_no_success_is_logged_once_and_does_not_end_the_schedule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    time_ns = 10**12
    broken = True

    def tick(_: float) -> bool:
        if broken:
            raise KeyError("a bug")
        return True

    schedule = Schedule(10, tick, clocks=Clocks(lambda: time_ns))
    steps = schedule.steps()
    for _ in range(5):
        time_ns += round(next(steps) * SECOND)
    assert schedule.samples == 5
    assert schedule.success_ns is None
    assert len(caplog.records) == 1
    broken = False
    next(steps)
    assert schedule.success_ns == time_ns


def test_a_dear_step_is_waited_for_by_its_share_of_a_core_and_no_longer_than_it_may_be() -> None:
    used = iter([0.0, 0.0, 0.01, 0.06, 0.0601])
    waits = within(0.01, 4.0, iter([1.0] * 4), lambda: next(used))
    assert list(waits) == pytest.approx([1, 1, 4, 1])


def busy(seconds: float) -> Iterator[float]:
    """Use so much CPU, then do nothing."""
    yield 0
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    while True:
        yield 0.01


def test_the_cpu_of_a_sampler_is_that_of_its_thread_and_of_no_other() -> None:
    samplers = [Sampler(f"sampler-{number}", busy(0.05)) for number in range(2)]
    all_before = time.process_time()
    for sampler in samplers:
        sampler.start()
    deadline, end = time.monotonic() + 30, time.thread_time() + 0.05
    # The CPU of this loop is the test's.
    while any(sampler.cpu_seconds < 0.05 for sampler in samplers) or time.thread_time() < end:
        assert time.monotonic() < deadline
    assert sum(sampler.cpu_seconds for sampler in samplers) < time.process_time() - all_before - 0.02
    for sampler in samplers:
        sampler.stop()
        assert sampler.cpu_seconds >= 0.05


def test_only_samplers_go_before_other_processes() -> None:
    asked: list[int] = []
    before = os.sched_getscheduler(0)

    def step() -> Iterator[float]:
        asked.append(os.sched_getscheduler(0))
        yield 0

    sampler = Sampler("fast", step())
    sampler.start()
    sampler.join()
    allowed = os.geteuid() == 0
    assert asked == [os.SCHED_RR if allowed else before]
    assert os.sched_getscheduler(0) == before


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
