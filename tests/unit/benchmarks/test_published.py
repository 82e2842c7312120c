"""The pages of the published results say what their data says."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.published import agreement, main, page, sampling

RESULTS = Path(__file__).parents[3] / "docs/results"


@pytest.mark.parametrize("folder", ["h200", "h200-earlier", "two-h200"])
def test_the_tables_of_the_page_are_those_that_the_data_gives(folder: str) -> None:
    assert page(RESULTS / folder) in (RESULTS / folder / "README.md").read_text()


def test_the_page_of_the_earlier_run_has_the_verdicts_of_both() -> None:
    rows = "\n".join(agreement(RESULTS / "h200", RESULTS / "h200-earlier"))
    assert f"{rows}\n" in (RESULTS / "h200-earlier/README.md").read_text()


def test_a_run_agrees_with_itself() -> None:
    rows = list(agreement(RESULTS / "h200", RESULTS / "h200"))[3:]
    assert len(rows) >= 18
    assert all(line.endswith("| yes |") for line in rows)


def test_runs_that_one_folder_lacks_are_passed_over() -> None:
    rows = list(agreement(RESULTS / "h200", RESULTS / "h200-earlier"))[3:]
    assert (RESULTS / "h200/paper-vllm").is_dir()
    assert {line.split(" | ")[0] for line in rows} == {"| ladder", "| quick", "| same-memory"}


def test_the_shares_of_the_monitor_and_of_what_is_beside_it_are_all_of_a_core() -> None:
    rate: dict[str, Any] = {"hz": 100, "samples_per_second": 99.6}
    late, scrape = ({"p50": 1e-4, "p99": seconds, "max": 1e-2} for seconds in (2e-4, 4.5e-3))
    monitor = rate | {"cpu_share": 0.024, "gpu_sampling_cpu_share": 0.02, "gpu_memory_cpu_share": 0.012}
    monitor |= {"lateness_seconds": late, "scrape_seconds": scrape}
    monitor |= {"thread_cpu_shares": {"governor": 0.001, "gpu0-fast": 0.012}}
    monitor |= {"memory": {"0": {"used": 2e9, "parts": {"vllm": 1.5e9, "unattributed": 5e8}}}}
    beside = rate | {"cpu_share": 0.01}
    measured: dict[str, Any] = {"monitor": [monitor], "bare_loop": [beside], "nvidia_smi": []}
    measured |= {"exporter": {"exporter": "another", "cpu_share": 0.008, "scrape_seconds": scrape}}
    lines = list(sampling(measured | {"c_loop": [beside | {"waking_cpu_share": 0.004}]}))
    assert lines[3:] == [
        "| monitor | 100 Hz | 100 | 2.40% | 2.00% | 1.20% | 0.20 ms | 4.50 ms |",
        "| a loop that reads the memory alone | 100 Hz | 100 | 1.00% |  |  |  |  |",
        "| the same in C | 100 Hz | 100 | 1.00% (waking up alone: 0.40%) |  |  |  |  |",
        "| another |  |  | 0.80% |  |  |  | 4.50 ms |",
        "",
        "| thread of the monitor | of a core at 100 Hz |",
        "| --- | --- |",
        "| `gpu0-fast` | 1.20% |",
        "| `governor` | 0.10% |",
        "",
        "Of the 2.00 GB in use on GPU 0 (by its count), 25.00% are of no server.",
    ]


@pytest.mark.parametrize(
    ("made", "said"),
    [(None, "none: expected a folder with results"), ("other", "expected a run of the same name in both")],
)
def test_a_folder_that_has_no_such_run_is_refused(
    made: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    against = tmp_path / "none"
    if made:
        (against / made).mkdir(parents=True)
        (against / made / "summary.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["published", str(RESULTS / "h200"), "--against", str(against)])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert said in capsys.readouterr().err
