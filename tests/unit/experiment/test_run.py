"""How many requests a cell has, how long the rest takes, and files that are whole or not there."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment import run
from experiment.plan import Cell
from tests.unit.experiment.folders import make_plan


def cell(target: str = "hf", concurrency: int = 4) -> Cell:
    return Cell(index=1, target=target, level=concurrency, repeat=1, seed=1)


@pytest.mark.parametrize(("concurrency", "warmup", "drain"), [(1, 2, 0), (2, 2, 1), (16, 16, 15)])
def test_one_warms_up_for_each_in_flight_and_one_less_keeps_the_load_up(
    concurrency: int, warmup: int, drain: int
) -> None:
    assert run.warmup(cell(level=concurrency)) == warmup
    assert run.drain(cell(level=concurrency)) == drain


@given(st.integers(1, 200), st.integers(1, 9), st.integers(2, 50))
def test_a_cell_has_all_that_are_measured_and_those_around_them(level: int, per_user: int, least: int) -> None:
    plan = make_plan(requests_per_user=per_user, min_requests=least)
    total = run.cell_requests(plan, cell(concurrency=level))
    assert total == max(2, level) + max(least, per_user * level) + level - 1


def test_the_time_left_is_not_known_before_a_cell_has_run() -> None:
    assert run.time_left([cell()], {}) == "time left: not known yet"


def test_the_time_left_is_that_of_cells_of_the_same_kind() -> None:
    took = {("hf", 4): [60.0, 80.0], ("vllm", 4): [5.0]}
    assert run.time_left([cell("hf"), cell("vllm")], took) == "about 1:15 left"


def test_the_time_of_a_kind_that_never_ran_is_that_of_all_others() -> None:
    took = {("hf", 4): [10.0], ("vllm", 4): [20.0]}
    assert run.time_left([cell("hf", 8), cell("hf", 4)], took) == "about 0:25 left"


def test_no_cells_take_no_time() -> None:
    assert run.time_left([], {("hf", 4): [10.0]}) == "about 0:00 left"


def test_options_become_flags_that_values_cannot_break_out_of() -> None:
    assert run.flags({"model": "--help", "users": 3}) == ["--model=--help", "--users=3"]


def test_json_is_written_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run.write_json(path, {"a": 1})
    run.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_target_that_cannot_be_replaced_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "a.json" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.json"):
        run.write_json(tmp_path / "a.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
