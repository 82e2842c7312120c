"""What a comparison runs: the order of its cells, their seeds, and options that are refused."""

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from experiment.plan import Plan

LEVELS = st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True)


def test_each_level_runs_a_b_b_a() -> None:
    cells = list(Plan(levels=[1, 4], repeats=3).cells())
    order = ["hf", "vllm", "vllm", "hf", "hf", "vllm"]
    assert [cell.target for cell in cells] == order * 2
    assert [cell.level for cell in cells] == [1] * 6 + [4] * 6
    assert [cell.repeat for cell in cells] == [1, 1, 2, 2, 3, 3] * 2
    assert [cell.index for cell in cells] == list(range(1, 13))


@given(LEVELS, st.integers(1, 5), st.integers(0, 1000))
def test_both_servers_of_a_pair_get_the_same_seed_and_no_other_pair_does(
    levels: list[int], repeats: int, seed: int
) -> None:
    seeds: dict[tuple[int, int], list[int]] = defaultdict(list)
    for cell in Plan(levels=levels, repeats=repeats, seed=seed).cells():
        seeds[cell.level, cell.repeat].append(cell.seed)
    assert all(len(pair) == 2 and pair[0] == pair[1] for pair in seeds.values())
    assert len({pair[0] for pair in seeds.values()}) == len(seeds) == len(levels) * repeats


def test_another_seed_gives_other_requests() -> None:
    one, two = ({cell.seed for cell in Plan(seed=seed).cells()} for seed in (1, 2))
    assert not one & two


def test_folders_of_cells_sort_in_the_order_in_which_they_run() -> None:
    names = [cell.name for cell in Plan(levels=[16, 1], repeats=2).cells()]
    assert names == sorted(names)
    assert names[0] == "01-hf-c16-r1"


@pytest.mark.parametrize(("level", "requests"), [(1, 40), (6, 40), (10, 60)])
def test_a_cell_has_its_least_number_of_requests_and_more_where_more_are_in_flight(level: int, requests: int) -> None:
    assert Plan(requests_per_user=6, min_requests=40).measured(level) == requests


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("levels", [0]),
        ("levels", [-1]),
        ("levels", []),
        ("levels", [1, 4, 1]),
        ("repeats", 0),
        ("workload", "other"),
        ("hf_port", 0),
        ("gpu_memory_utilization", 1.5),
        ("start_seconds", 0),
        ("hf_args", 'one "two'),
        ("vllm_args", "it's"),
    ],
)
def test_a_bad_value_is_refused_and_its_option_named(option: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        Plan(**{option: value})
    (problem,) = refused.value.errors()
    assert problem["loc"][0] == option


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="nonsense"):
        Plan(nonsense=1)  # type: ignore[call-arg]


def test_well_formed_arguments_of_the_servers_are_kept_as_given() -> None:
    assert Plan(vllm_args="-- --enforce-eager 'a b'").vllm_args == "-- --enforce-eager 'a b'"
