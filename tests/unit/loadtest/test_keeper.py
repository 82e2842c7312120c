"""What is kept of the load generator itself, and what it says against a run."""

import json
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from loadtest import __version__, keeper
from loadtest.keeper import UNFINISHED, Keeper, summarize
from loadtest.options import Options
from loadtest.records import Record, read, to_bytes
from loadtest.run import Part, Share


def process(**changes: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "worker": 0,
        "goes_first": True,
        "cpu_share": 0.1,
        "loop_lag_p99_seconds": 0.002,
        "send_lateness_p99_seconds": None,
        "chunks_per_second_max": 900,
        "shared_stamp_share": 0.0,
        "merged_chunk_share": 0.0,
        "requests_ended": {"hf": 2},
        "skipped_lines": {},
    }
    return figures | changes


def test_quiet_processes_say_nothing_against_a_run() -> None:
    found = summarize([process(), process(worker=1, requests_ended={"hf": 1, "vllm": 4})], [], 1000)
    assert (found["valid"], found["reasons"]) == (True, [])
    assert found["requests_ended"] == {"hf": 3, "vllm": 4}
    assert [one["worker"] for one in found["processes"]] == [0, 1]


@pytest.mark.parametrize(
    ("figure", "value", "reason"),
    [
        ("cpu_share", 0.81, "cpu_share: 0.81: at most 0.8"),
        ("loop_lag_p99_seconds", 0.0101, "loop_lag_p99_seconds: 0.0101: at most 0.01"),
        ("send_lateness_p99_seconds", 0.5, "send_lateness_p99_seconds: 0.5: at most 0.01"),
        ("merged_chunk_share", 0.02, "merged_chunk_share: 0.02: at most 0.01"),
        ("chunks_per_second_max", 1001, "chunks_per_second_max: 1001: at most 1000"),
    ],
)
def test_the_worst_process_counts_and_the_reason_names_figure_value_and_limit(
    figure: str, value: float, reason: str
) -> None:
    found = summarize([process(), process(**{figure: value}), process()], [], 1000)
    assert (found["valid"], found["reasons"], found[figure]) == (False, [reason], value)


def test_shared_stamps_which_may_be_the_servers_doing_are_told_and_not_judged() -> None:
    found = summarize([process(), process(shared_stamp_share=0.5)], [], None)
    assert (found["valid"], found["shared_stamp_share"]) == (True, 0.5)


def test_a_lost_worker_makes_a_run_invalid_also_when_none_is_left() -> None:
    assert summarize([process()], [1, 3], None)["reasons"][0].startswith("lost_workers: 1, 3:")
    assert summarize([], [0], None)["valid"] is False


def test_the_reason_of_a_lost_worker_says_how_many_requests_have_no_record_where_that_is_known() -> None:
    known = {"hf": (1000, 700), "vllm": (500, 360)}
    found = summarize([process()], [1], None, requests=known)
    assert found["reasons"] == ["lost_workers: 1: of 1500 requests 440 have no record"]
    assert (found["requests_asked"], found["requests_recorded"]) == (
        {"hf": 1000, "vllm": 500},
        {"hf": 700, "vllm": 360},
    )
    unknown = summarize([process()], [1], None, requests=known | {"vllm": (None, 360)})
    assert unknown["reasons"] == ["lost_workers: 1: what they had not ended has no record"]


def worker(uncertainty: float = 0.0, cut_off: float = 0.0, lost_records: int = 0) -> dict[str, Any]:
    cuts = [{"since_ns": 5, "seconds": cut_off}] if cut_off else []
    return {
        "worker": 1, "host": "h", "records": 9, "lost_records": lost_records,
        "clock": {"uncertainty_seconds": uncertainty}, "cut_off": cuts,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (worker(uncertainty=0.0101), "clock_uncertainty_seconds: 0.0101: at most 0.01: worker 1 on h"),
        (worker(cut_off=4.25), "cut_off_seconds: 4.2: worker 1 on h: its requests in that time may show the network"),
        (worker(lost_records=2), "lost_records: 2: worker 1 on h: they did not reach the master"),
    ],
)
def test_a_worker_whose_clock_or_connection_is_in_doubt_makes_a_run_invalid(found: dict[str, Any], reason: str) -> None:
    assert summarize([process()], [], None, [found])["reasons"] == [reason]
    assert summarize([process()], [], None, [worker(uncertainty=0.0099)])["valid"] is True


def test_without_a_calibration_no_rate_is_too_high() -> None:
    assert summarize([process(chunks_per_second_max=10**9)], [], None)["valid"] is True


def test_the_files_of_a_run_lie_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "known_limit", lambda: 500.0)
    kept = Keeper(Options(records=str(tmp_path / "run" / "records.arrow")))
    returned = kept.close([process()], [], True)
    assert list(read(tmp_path / "run" / "records.arrow")) == []
    assert json.loads((tmp_path / "run" / "client.json").read_text()) == returned
    assert returned["calibrated_chunks_per_second"] == 500.0
    assert returned["valid"] is False


def part(start_ns: int) -> Part:
    return Part(start_ns, "c0ffee00", {"hf": Share()}, models={"hf": "m"})


def test_until_its_end_a_run_is_not_whole_and_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_HF_API_KEY", "sesame")
    kept = Keeper(Options(records=str(tmp_path / "records.arrow"), requests=9, seed=4))
    kept.begin(part(5), users=2)
    begun = json.loads((tmp_path / "client.json").read_text())
    assert (begun["complete"], begun["valid"], begun["reasons"]) == (False, False, [UNFINISHED])
    assert {"run_id": "c0ffee00", "version": __version__, "start_ns": 5, "users": 2, "ended": None}.items() <= (
        begun["run"].items()
    )
    assert (begun["run"]["options"]["requests"], begun["run"]["options"]["seed"]) == (9, 4)
    ended = kept.close([process()], [], True)
    assert begun.keys() == ended.keys()
    assert ended["run"] | {"ended": None} == begun["run"]
    assert "sesame" not in (tmp_path / "client.json").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"records.arrow", "client.json"}


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"requests": 5, "warmup": 2, "drain": 1}, 8),
        ({}, None),
        ({"requests": 5, "min_seconds": 3}, None),
        ({"arrival": "constant", "rate": 10, "duration": 2}, 20),
        ({"arrival": "constant", "rate": 10, "requests": 7}, 7),
        ({"arrival": "constant", "rate": 2}, 201),
        ({"arrival": "constant", "rate": 10, "duration": 2, "workload": "synthetic", "turns": 3}, 60),
    ],
)
def test_how_many_requests_were_asked_for_is_told_of_a_run_that_came_to_its_end_or_lost_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], asked: int | None
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 100_000_000_005)
    for name, lost, complete, expected in (("a", [], True, asked), ("b", [0], False, asked), ("c", [], False, None)):
        kept = Keeper(Options(records=str(tmp_path / f"{name}.arrow"), **options))
        kept.begin(part(5), users=1)
        assert kept.close([process()], lost, complete)["requests_asked"] == {"hf": expected}


def test_the_version_is_that_of_the_package() -> None:
    package = Path(__file__).parents[3] / "pyproject.toml"
    assert tomllib.loads(package.read_text())["project"]["version"] == __version__


def test_runs_that_share_a_folder_leave_a_summary_each(tmp_path: Path) -> None:
    for name, complete in (("one", True), ("two", False)):
        Keeper(Options(records=str(tmp_path / f"{name}.arrow"))).close([process()], [], complete)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text())["complete"] for name in ("one", "two")}
    assert found == {"one": True, "two": False}


def test_a_run_without_a_name_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Keeper(Options()).path
    assert path.parent.parent.name == "results"
    assert path.name == "records.arrow"
    assert path.exists()


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {Keeper(Options()).path for _ in range(5)}
    assert len(paths) == 5
    assert all(path.parent.name.endswith("-locust") for path in paths)


def test_the_figures_of_each_target_are_kept_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Keeper(Options(records=str(tmp_path / "records.arrow")))
    record = Record(
        index=0, target="hf", phase="measured", max_tokens=2, sent_ns=0, end_ns=9, output_tokens=1, chunk_ns=[5_000_000]
    )
    kept.write(to_bytes([record]))
    assert kept.close([process()], [], True)["targets"]["hf"]["ttft_seconds"]["p50"] == 0.005
    assert json.loads((tmp_path / "client.json").read_text())["targets"]["hf"]["short_answers"] == 1
    assert "TTFT" in capsys.readouterr().out


def test_it_says_at_the_start_how_many_lines_of_a_trace_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:4{n},{size},4" for n, size in enumerate((9, 3000, 9))]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    Keeper(Options(arrival="trace", workload="trace", trace=str(trace), records=str(tmp_path / "records.arrow")))
    said = f"{trace}: 2 of 3 lines can be sent; 1 left out: more than max_context (2048 tokens)"
    assert f"loadtest: {said}\n" in capsys.readouterr().out
