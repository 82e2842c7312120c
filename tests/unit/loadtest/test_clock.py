"""Clocks of two hosts: what an exchange of messages can and cannot know."""

import subprocess
import sys
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from loadtest.clock import RECENT, Agreement, Comparison, Exchange, clock_name

ROOT = Path(__file__).parents[3]
SECOND = 1_000_000_000
DELAYS = st.integers(0, 5 * SECOND)


def exchange(ahead_ns: int, there_ns: int, back_ns: int, held_ns: int = 0, sent_ns: int = 0) -> Exchange:
    """A question to a host whose clock is `ahead_ns` ahead."""
    received_ns = sent_ns + there_ns + ahead_ns
    return Exchange(sent_ns, received_ns, received_ns + held_ns, sent_ns + there_ns + held_ns + back_ns)


@given(st.integers(-(10**18), 10**18), DELAYS, DELAYS, DELAYS)
@example(-1000 * SECOND, 0, 5 * SECOND, 0)
def test_the_true_offset_is_within_the_uncertainty_whatever_the_way_takes(
    ahead_ns: int, there_ns: int, back_ns: int, held_ns: int
) -> None:
    found = exchange(ahead_ns, there_ns, back_ns, held_ns)
    assert abs(found.offset_ns - ahead_ns) <= found.uncertainty_ns
    assert found.uncertainty_ns - (there_ns + back_ns) / 2 in (0, 0.5)


def test_the_recent_exchange_with_the_smallest_round_trip_counts() -> None:
    comparison = Comparison()
    assert comparison.best is None
    for there_ns in (5, 40, 2, 90):
        comparison.add(exchange(100, there_ns, there_ns))
    assert comparison.best == exchange(100, 2, 2)
    for _ in range(RECENT):
        comparison.add(exchange(100, 7, 7))
    assert comparison.best == exchange(100, 7, 7)
    assert comparison.exchanges == 4 + RECENT


def test_a_clock_that_drifts_away_makes_the_stamps_less_certain() -> None:
    agreed = Agreement.of(500, 20, same_name=False)
    agreed.see(505, 10)
    assert (agreed.uncertainty_ns, agreed.drift_ns) == (20, 5)
    agreed.see(450, 15)
    agreed.see(490, 15)
    assert (agreed.offset_ns, agreed.uncertainty_ns, agreed.drift_ns, agreed.exchanges) == (500, 65, -10, 3)


def test_processes_of_one_host_have_one_clock_whatever_is_measured() -> None:
    agreed = Agreement.of(-300, 400, same_name=True)
    agreed.see(900, 1000)
    assert (agreed.offset_ns, agreed.uncertainty_ns, agreed.same_clock) == (0, 0, True)


def test_a_copy_of_a_machine_that_has_its_name_but_not_its_clock_is_another_clock() -> None:
    agreed = Agreement.of(-500, 400, same_name=True)
    assert (agreed.offset_ns, agreed.uncertainty_ns, agreed.same_clock) == (-500, 400, False)


def test_processes_of_one_host_name_one_clock() -> None:
    code = "from loadtest.clock import clock_name; print(clock_name())"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == clock_name()
