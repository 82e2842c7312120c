"""The page of the published results says what its data says."""

from pathlib import Path

from benchmarks.published import page

FOLDER = Path(__file__).parents[3] / "docs/results/h200"


def test_the_tables_of_the_page_are_those_that_the_data_gives() -> None:
    assert page(FOLDER) in (FOLDER / "README.md").read_text()
