"""The run that the benchmark of the analysis makes up, and what it measures of a report."""

from pathlib import Path

import pytest

from benchmarks import analysis
from experiment.analysis.analyse import analyse
from experiment.analysis.results import load
from loadtest.records import count


def test_a_run_that_is_made_up_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        assert analysis.make(folder, requests=800, chunks=5, levels=[2, 4], repeats=2) == 8
        found.append(analyse(load(folder)))
    assert found[0] == found[1]
    assert found[0]["valid"] is True
    assert sum(cell["requests"] for cell in found[0]["cells"]) == 800
    assert [level["ratios"]["vllm"]["ttft_seconds"]["verdict"] for level in found[0]["levels"]] == ["faster"] * 2
    figures = found[0]["levels"][0]["targets"]["vllm"]
    assert figures["memory"]["kv"]["running"]["mean"] == 2
    assert figures["memory"]["process"]
    assert sum(count(path) for path in (tmp_path / "one").glob("cells/*/records.arrow")) == 800


def test_the_time_and_the_memory_of_a_report_are_those_of_its_own_process(tmp_path: Path) -> None:
    analysis.make(tmp_path, requests=80, chunks=5, levels=[2], repeats=2)
    found = analysis.measure(tmp_path, 80, 5, 4)
    assert found.cpu_seconds > 0.1
    assert 50 * 2**20 < found.peak_bytes < 2**30
    assert found.records_bytes > 80 * 5 * 16
    assert found.page_bytes > 10_000
    assert "80" in analysis.line(found)


def test_a_report_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"headroom report .*: exit code 2"):
        analysis.measure(tmp_path, 1, 1, 1)


@pytest.mark.parametrize(("limit", "told"), [("--max-seconds=0.01", "at most 0.01"), ("--max-gb=0.01", "at most 0.01")])
def test_a_report_that_takes_more_than_it_may_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: str, told: str
) -> None:
    small = ["--requests=80", "--chunks=5", "--levels=2", "--repeats=2"]
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["benchmarks.analysis", *small, limit])
    assert analysis.main() == 1
    assert f"{told} ({limit.partition('=')[0]})" in capsys.readouterr().err
