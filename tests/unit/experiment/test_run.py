"""How long the rest of a run takes, what is run again, and the search for the highest rate."""

from experiment import run
from experiment.plan import Cell

Took = dict[tuple[str, float], list[float]]


def cell(target: str = "hf", level: float = 4) -> Cell:
    return Cell(index=1, target=target, level=level, repeat=1, seed=1)


def test_the_time_left_is_not_known_before_a_cell_has_run() -> None:
    assert run.time_left([cell()], {}) == "time left: not known yet"


def test_the_time_left_is_that_of_cells_of_the_same_kind() -> None:
    took: Took = {("hf", 4): [60.0, 80.0], ("vllm", 4): [5.0]}
    assert run.time_left([cell("hf"), cell("vllm")], took) == "about 1:15 left"


def test_the_time_of_a_kind_that_never_ran_is_that_of_all_others() -> None:
    took: Took = {("hf", 4): [10.0], ("vllm", 4): [20.0]}
    assert run.time_left([cell("hf", 8), cell("hf", 4)], took) == "about 0:25 left"


def test_no_cells_take_no_time() -> None:
    assert run.time_left([], {("hf", 4): [10.0]}) == "about 0:00 left"
