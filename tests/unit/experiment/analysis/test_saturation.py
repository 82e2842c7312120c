"""The search for the highest rate that meets the limits, against servers whose capacity is known."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.analysis.saturation import Search


def run(search: Search, answer: Callable[[float], bool]) -> list[float]:
    """Ask for rates until there is none; more than 100 would be a search without an end."""
    rates: list[float] = []
    while (rate := search.next_rate()) is not None:
        rates.append(rate)
        assert len(rates) <= 100
        search.tell(rate, answer(rate))
    return rates


@given(st.floats(0.01, 1000), st.floats(-6.9, 6.9))
def test_any_capacity_within_128_times_of_the_start_is_found_within_5_percent_in_12_cells(
    start: float, distance: float
) -> None:
    capacity = start * 2**distance
    search = Search(start)
    rates = run(search, lambda rate: rate <= capacity)
    found = search.result.rate
    assert len(rates) <= 12
    assert found is not None
    assert found <= capacity <= found * 1.05


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.floats(0, 0.5), st.integers(0, 10**6))
def test_answers_that_are_noisy_near_the_boundary_end_the_search_near_it(
    start: float, capacity: float, noise: float, seed: int
) -> None:
    draw = random.Random(seed)
    search = Search(start)
    rates = run(search, lambda rate: rate <= capacity * (1 + noise * draw.uniform(-1, 1)))
    found = search.result.rate
    assert len(rates) <= 12
    if found is not None:
        assert capacity * (1 - noise) / 2 <= found <= capacity * (1 + noise)


@given(st.lists(st.booleans(), min_size=20, max_size=20), st.integers(1, 20))
def test_whatever_the_answers_the_search_ends_and_a_rate_that_counts_was_met_and_none_below_it_missed(
    answers: list[bool], cells: int
) -> None:
    search = Search(4.0, cells)
    told: list[tuple[float, bool]] = []
    while (rate := search.next_rate()) is not None:
        told.append((rate, answers[len(told)]))
        search.tell(*told[-1])
    found = search.result.rate
    assert len(told) <= cells
    assert found is None or ((found, True) in told and not any(rate <= found for rate, met in told if not met))
    assert found is not None or not any(met for _, met in told)


def test_a_rate_that_was_met_above_one_that_was_not_does_not_count() -> None:
    search = Search(8.0)
    for rate, met in ((8, True), (4, False), (2, True)):
        search.tell(rate, met)
    assert (search.result.rate, search.result.missed, search.result.above) == (2, 4, 8)
    assert search.next_rate() == pytest.approx(8**0.5)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ([], (None, None, False)),
        ([(4, False), (2, False)], (None, 2, False)),
        ([(4, True), (8, True)], (8, None, False)),
        ([(4, True), (8, False)], (4, 8, False)),
        ([(4, True), (4.1, False)], (4, 4.1, True)),
    ],
)
def test_the_result_says_how_sure_it_is(
    told: list[tuple[float, bool]], found: tuple[float | None, float | None, bool]
) -> None:
    search = Search(4.0)
    for rate, met in told:
        search.tell(rate, met)
    assert (search.result.rate, search.result.missed, search.result.exact) == found


@pytest.mark.parametrize("arguments", [(0,), (-1,), (float("inf"),), (float("nan"),), (1, 0), (1, 12, 0)])
def test_a_search_that_cannot_be_made_is_refused_with_the_name_of_what_is_wrong(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"(start|max_cells|precision): .*: expected a number above 0"):
        Search(*arguments)  # type: ignore[arg-type]
