"""How long the rest of a run takes, what is run again, and the search for the highest rate."""

from pathlib import Path

import pytest

from experiment.plan.plan import Cell
from experiment.run import cells as run
from tests.unit.experiment.folders import SECOND, make_plan, make_record, write_records

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


class Server:
    """Runs cells of a server that meets the limits up to a capacity; what it ran is kept as a run keeps it."""

    def __init__(self, folder: Path, capacity: float):
        self.folder, self.capacity = folder, capacity
        self.ran: list[Cell] = []

    def run(self, cells: list[Cell], planned: list[Cell]) -> None:
        assert planned == []
        (cell,) = cells
        self.ran.append(cell)
        sent_ns = 0 if cell.level <= self.capacity else -10 * SECOND
        record = make_record(sent_ns=sent_ns, chunk_ns=[SECOND // 10, SECOND], chunk_tokens=[1, 3])
        path = self.folder / "cells" / cell.name / "records.arrow"
        write_records(path, [record] * OPEN.measured(cell.level))


OPEN = make_plan(arrival="poisson", levels=[1, 2], limits={"ttft_seconds": 1}, requests=4, saturation=True)


@pytest.mark.parametrize("capacity", [0.11, 2.0, 7.3, 150.0])
def test_the_search_of_each_target_ends_at_its_capacity(tmp_path: Path, capacity: float) -> None:
    server = Server(tmp_path / "a", capacity)
    run._search(OPEN, server, server.folder, 8)  # type: ignore[arg-type]
    assert [cell.index for cell in server.ran] == list(range(9, 9 + len(server.ran)))
    for name in ("hf", "vllm"):
        rates = [cell.level for cell in server.ran if cell.target == name]
        assert rates[0] == 2
        assert len(rates) <= run.SEARCH_CELLS
        assert max(rate for rate in rates if rate <= capacity) == pytest.approx(capacity, rel=0.06)
    assert all(cell.search for cell in server.ran)
    again = Server(tmp_path / "b", capacity)
    run._search(OPEN, again, again.folder, 8)  # type: ignore[arg-type]
    assert again.ran == server.ran


def test_requests_that_were_never_sent_did_not_meet_the_limits(tmp_path: Path) -> None:
    cell = OPEN.cell(1, "hf", 2, 1, search=True)
    record = make_record(chunk_ns=[SECOND // 10, SECOND], chunk_tokens=[1, 3])
    write_records(tmp_path / "records.arrow", [record] * 3 + [make_record(phase="drain")] * 5)
    assert run.attained(OPEN, cell, tmp_path) == 0.75


@pytest.mark.parametrize(("content", "complete"), [(None, False), ("true", True), ("false", False)])
def test_only_a_cell_that_says_so_is_complete(tmp_path: Path, content: str | None, complete: bool) -> None:
    if content:
        (tmp_path / "cell.json").write_text(f'{{"complete": {content}}}')
    assert run.is_complete(tmp_path) == complete
