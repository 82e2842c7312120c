"""The list of runs: every folder is said, whatever state it is in."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from experiment import report
from experiment.analysis.results import ResultError
from experiment.history.listing import Entry, describe, entries, list_runs
from tests.unit.experiment.folders import change_json, make_folder, make_plan

NAME = "20260102T030405Z"


@pytest.fixture
def results(tmp_path: Path, no_charts: None) -> Path:
    """A folder with a run that has a report, one without, and what is no run."""
    report.write(make_folder(tmp_path / NAME, make_plan(concurrency=[1, 2])))
    make_folder(tmp_path / "unreported", make_plan(concurrency=[2]), state="partial")
    (tmp_path / f"{NAME}-up").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a file").touch()
    return tmp_path


def show(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert list_runs([str(folder), *more], Console(highlight=False, soft_wrap=True)) == 0
    return capsys.readouterr().out


def test_a_run_says_when_what_and_how_it_ended(results: Path) -> None:
    found = {one.folder: one for one in entries(results)}
    assert list(found) == [NAME, f"{NAME}-up", "unreported"]
    assert found[NAME] == Entry(
        folder=NAME,
        kind="comparison",
        told=json.loads((results / NAME / "summary.json").read_text())["headline"],
        when="2026-01-02 03:04:05",
        state="complete",
        valid=True,
        model="random:tiny",
        targets=["hf", "vllm"],
        arrival="closed",
        levels=[1, 2],
        together=False,
    )
    assert (found["unreported"].state, found["unreported"].valid) == ("partial", None)
    assert found["unreported"].told == f"to write its report: headroom report {results / 'unreported'}"
    assert found[f"{NAME}-up"].kind == "not a run"


def test_each_folder_is_one_line(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(results, capsys).splitlines()
    assert [line.split()[0] for line in lines] == [NAME, f"{NAME}-up", "unreported"]
    assert "complete, valid  random:tiny  hf, vllm  concurrency 1, 2  At concurrency 2 vLLM made" in lines[0]
    assert "not a run: plan.json is missing" in lines[1]


def test_json_has_every_folder(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(show(results, capsys, "--json"))
    assert [(one["folder"], one["kind"], one["valid"]) for one in found] == [
        (NAME, "comparison", True),
        (f"{NAME}-up", "not a run", None),
        ("unreported", "comparison", None),
    ]


@pytest.mark.parametrize("name", ["plan", "status", "summary"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", "\xff"])
def test_a_damaged_folder_is_said(results: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (results / NAME / f"{name}.json").write_text(content, encoding="latin-1")
    line, *others = show(results, capsys).splitlines()
    assert f"{NAME}  2026-01-02 03:04:05  damaged: " in line
    assert len(others) == 2


def test_a_missing_status_is_damage(results: Path) -> None:
    (results / NAME / "status.json").unlink()
    assert describe(results / NAME).kind == "damaged"


def test_what_says_that_it_runs_may_have_been_killed(results: Path) -> None:
    change_json(results / NAME / "status.json", state="running")
    assert describe(results / NAME).state == "running or killed"


def test_a_run_that_is_not_valid_says_so(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_json(results / NAME / "summary.json", valid=False)
    assert "complete, NOT VALID" in show(results, capsys)


def test_an_open_loop_with_named_targets(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [{"name": "hf-static"}, {"name": "vllm"}]
    change_json(results / NAME / "plan.json", targets=named, arrival="poisson", levels=[0.5, 2])
    assert "  hf-static, vllm  requests/s 0.5, 2  " in show(results, capsys)


@pytest.mark.parametrize("name", ["run", "99999999T999999Z"])
def test_a_name_without_a_time_gives_none(results: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (results / NAME).rename(results / name)
    assert describe(results / name).when is None
    assert f"{name}  no time  complete" in show(results, capsys)


def test_an_empty_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(tmp_path, capsys) == f"No runs in {tmp_path}\n"


def test_a_run_itself_is_no_folder_of_runs(results: Path) -> None:
    with pytest.raises(ResultError, match="give the one that it is in"):
        entries(results / NAME)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list_runs([str(tmp_path / "nowhere")], Console())
