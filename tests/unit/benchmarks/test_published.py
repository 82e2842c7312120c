"""The pages of the published results say what their data says."""

from pathlib import Path

import pytest

from benchmarks.published import agreement, page

RESULTS = Path(__file__).parents[3] / "docs/results"


@pytest.mark.parametrize("folder", ["h200", "two-h200"])
def test_the_tables_of_the_page_are_those_that_the_data_gives(folder: str) -> None:
    assert page(RESULTS / folder) in (RESULTS / folder / "README.md").read_text()


def test_a_run_agrees_with_itself_and_runs_that_one_folder_lacks_are_passed_over() -> None:
    head = list(agreement(RESULTS / "h200", RESULTS / "two-h200"))
    rows = list(agreement(RESULTS / "h200", RESULTS / "h200"))
    assert len(head) == 3
    assert len(rows) > 20
    assert all(line.endswith("| yes |") for line in rows[3:])
