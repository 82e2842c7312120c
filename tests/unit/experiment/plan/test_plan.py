"""What a comparison runs: the order of its cells, their seeds, and options that are refused."""

import json
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from experiment.plan.plan import Cell, Plan

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
    seeds: dict[tuple[float, int], list[int]] = defaultdict(list)
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


def targets(*names: str) -> list[Any]:
    return [{"name": name, "kind": "hf"} for name in names]


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def test_any_number_of_targets_runs_forth_and_back() -> None:
    plan = Plan(targets=targets("a", "b", "c"), levels=[1], repeats=2)
    assert [cell.target for cell in plan.cells()] == ["a", "b", "c", "c", "b", "a"]


def test_together_the_cells_of_all_targets_are_one_group_and_else_each_is_one() -> None:
    together = Plan(targets=targets("a", "b", "c"), levels=[1, 2], repeats=2, together=True)
    assert [[cell.target for cell in group] for group in together.groups()] == [list("abc"), list("cba")] * 2
    assert all(len({(c.level, c.repeat, c.seed) for c in group}) == 1 for group in together.groups())
    apart = together.model_copy(update={"together": False})
    assert [[cell] for cell in apart.cells()] == apart.groups()


def test_order_abab_is_the_same_each_time() -> None:
    assert [cell.target for cell in Plan(levels=[1], repeats=2, order="ABAB").cells()] == ["hf", "vllm"] * 2


def test_where_one_server_is_up_it_runs_all_levels_before_the_next() -> None:
    plan = Plan(levels=[1, 2], repeats=2, resident="one", max_model_len=64)
    assert names(list(plan.cells())) == [
        *("01-hf-c1-r1", "02-hf-c2-r1", "03-vllm-c1-r1", "04-vllm-c2-r1"),
        *("05-vllm-c1-r2", "06-vllm-c2-r2", "07-hf-c1-r2", "08-hf-c2-r2"),
    ]


@given(LEVELS, st.integers(1, 4), st.sampled_from(["ABBA", "ABAB"]))
def test_the_same_cells_run_however_many_servers_are_up(levels: list[int], repeats: int, order: Any) -> None:
    options: dict[str, Any] = {"levels": levels, "repeats": repeats, "order": order, "max_model_len": 64}
    kinds = [
        {(cell.target, cell.level, cell.repeat, cell.seed) for cell in Plan(resident=resident, **options).cells()}
        for resident in ("all", "one")
    ]
    assert kinds[0] == kinds[1]
    assert len(kinds[0]) == 2 * len(levels) * repeats


def test_a_rate_is_a_level_of_an_open_loop() -> None:
    plan = Plan(arrival="poisson", levels=[0.5, 10], repeats=1, duration_seconds=30, ramp_seconds=4)
    assert names(list(plan.cells()))[:3] == ["01-hf-q0.5-r1", "02-vllm-q0.5-r1", "03-hf-q10-r1"]
    assert (plan.warmup(10), plan.measured(10), plan.drain(10)) == (40, 300, 40)
    assert plan.measured(0.5) == plan.min_requests


@pytest.mark.parametrize(("concurrency", "warmup", "drain"), [(1, 2, 0), (2, 2, 1), (16, 16, 15)])
def test_in_a_closed_loop_one_warms_up_for_each_in_flight_and_one_less_keeps_the_load_up(
    concurrency: int, warmup: int, drain: int
) -> None:
    assert (Plan().warmup(concurrency), Plan().drain(concurrency)) == (warmup, drain)


@given(st.integers(1, 200), st.integers(1, 9), st.integers(2, 50))
def test_a_cell_has_all_that_are_measured_and_those_around_them(level: int, per_user: int, least: int) -> None:
    total = Plan(requests_per_user=per_user, min_requests=least).total(level)
    assert total == max(2, level) + max(least, per_user * level) + level - 1


def test_a_number_of_requests_goes_before_all_that_would_make_one() -> None:
    assert Plan(requests=7).measured(64) == 7


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"levels": [1.5]}, "levels: 1.5: expected whole numbers from 1 to 4096"),
        ({"levels": [5000]}, "levels: 5000"),
        ({"saturation": True}, "saturation: true: needs arrival"),
        ({"saturation": True, "arrival": "poisson"}, "saturation: true: needs arrival"),
        ({"resident": "one"}, "max_model_len: None: resident one needs it"),
        ({"together": True, "resident": "one", "max_model_len": 64}, "together: True: needs two targets or more"),
        ({"together": True, "targets": targets("a")}, "together: True: needs two targets or more"),
        ({"targets": targets("a", "a")}, "each name may be given once, got a, a"),
        ({"targets": targets("monitor")}, "expected another name than monitor"),
        ({"targets": targets("A b")}, "pattern"),
        ({"targets": []}, "at least 1 item"),
        ({"targets": [{"name": "a", "kind": "url"}]}, "kind url needs a url"),
        ({"targets": [{"name": "a", "kind": "hf", "url": "http://b", "args": "-x"}]}, "args are for a server"),
        ({"targets": [{"name": "a", "kind": "hf", "url": "http://b", "gpus": "0"}]}, "gpus are for a server"),
        ({"targets": [{"name": "a", "kind": "hf", "gpus": "0;1"}]}, "numbers with commas between them"),
        ({"targets": [{"name": "a", "kind": "hf", "model": "b"}]}, "model is for a server at a url"),
        ({"targets": [{"name": "a", "kind": "hf", "server": "b"}]}, "server is for a server at a url"),
        (
            {"targets": [{"name": n, "kind": "url", "url": "http://b", "server": "s"} for n in ("a", "b")]},
            "each server may be given once, got s, s",
        ),
        ({"limits": {"ttft": 1}}, "ttft_seconds"),
        ({"limits": {"ttft_seconds": 0}}, "greater than 0"),
        ({"gate": {"metrics": ["speed"]}}, "output_throughput"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_says_what_would(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Plan(**options)
    assert named in str(refused.value)


def test_levels_of_a_closed_loop_are_whole_numbers_in_what_a_run_keeps() -> None:
    assert json.dumps(Plan(levels=[4.0]).model_dump()["levels"]) == "[4]"


def test_a_plan_comes_back_from_what_a_run_keeps() -> None:
    plan = Plan(arrival="poisson", levels=[0.5], limits={"ttft_seconds": 1}, targets=targets("a"))
    assert Plan.model_validate_json(json.dumps(plan.model_dump())) == plan


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("repeats", True), ("requests", False), ("levels", [True, 4]), ("limits", {"ttft_seconds": True})),
        *(("gate", {"allowed_regression": False}), ("gate", {"limits": {"output_throughput": True}})),
    ],
)
def test_a_boolean_is_no_number(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=r"expected no boolean, got (true|false); in YAML yes, no"):
        Plan.model_validate({key: value})
    assert Plan.model_validate({"together": True}).together
