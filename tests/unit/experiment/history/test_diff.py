"""Two runs held against each other: ratios, intervals, and what makes runs incomparable."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiment.analysis.results import ResultError
from experiment.analysis.stats import ratio_of_pairs
from experiment.history.diff import SHOWN, diff
from experiment.history.two_runs import change, changes, differences, flat, read
from experiment.plan.plan import Cell
from tests.unit.experiment.folders import PART, SPEEDS, change_json, change_records, make_folder, make_plan

KEY = (4.0, "vllm", "output_throughput")
values = st.lists(st.floats(0.1, 10), min_size=2, max_size=6)


def make(folder: Path, factor: float = 1.0, **options: Any) -> Path:
    """A run whose vLLM is `factor` times as fast as usual, and whose repeats differ by some percent."""
    plan = make_plan(**({"repeats": 4} | options))

    def speed(cell: Cell) -> float:
        jitter = 1 + 0.01 * (cell.repeat % 2) * (1 if factor == 1 else -1)
        return SPEEDS[cell.target] * jitter * (factor if cell.target == "vllm" else 1)

    return make_folder(folder, plan, speed=speed)


def show(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert diff([str(one) for one in arguments], Console(highlight=False, soft_wrap=True, width=200)) == 0
    return capsys.readouterr().out


@given(values, values)
def test_an_unpaired_interval_is_that_of_welch(first: list[float], second: list[float]) -> None:
    from scipy.stats import ttest_ind

    one = change(KEY, first, second, paired=False)
    assert one.low is not None
    assert one.high is not None
    if np.ptp(first) + np.ptp(second) < 1e-6:
        return
    expected = ttest_ind(np.log(second), np.log(first), equal_var=False).confidence_interval(0.95)
    assert math.log(one.low) == pytest.approx(expected.low, abs=1e-9)
    assert math.log(one.high) == pytest.approx(expected.high, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=6))
def test_a_paired_interval_is_that_of_a_comparison(pairs: list[tuple[float, float]]) -> None:
    one = change(KEY, [a for a, _ in pairs], [b for _, b in pairs], paired=True)
    expected = ratio_of_pairs([b / a for a, b in pairs])
    assert (one.value, one.low, one.high) == pytest.approx((expected.value, expected.low, expected.high))


@given(values, values, st.booleans())
def test_swapped_runs_swap_the_verdict(first: list[float], second: list[float], paired: bool) -> None:
    size = min(len(first), len(second))
    one, other = (change(KEY, a[:size], b[:size], paired=paired) for a, b in ((first, second), (second, first)))
    swapped = {"better": "worse", "worse": "better"}
    assert other.verdict == swapped.get(one.verdict, one.verdict)
    assert one.value * other.value == pytest.approx(1)


def test_the_interval_of_equal_runs_leaves_out_1_in_about_5_of_100() -> None:
    draw = np.random.default_rng(7)
    found = [
        change(KEY, *np.exp(draw.normal(0, 0.1, (2, 4))).tolist(), paired=paired).verdict
        for paired in (True, False)
        for _ in range(1000)
    ]
    assert 0.93 < found.count("no detectable difference") / len(found) < 0.98


@pytest.mark.parametrize("metric", ["output_throughput", "ttft_seconds.mean"])
def test_above_1_is_better_whatever_the_metric(metric: str) -> None:
    faster = [2.0, 2.0] if metric == "output_throughput" else [0.5, 0.5]
    one = change((1, "hf", metric), [1.0, 1.0], faster, paired=True)
    assert one.value == pytest.approx(2)
    assert one.verdict == "better"


def test_one_repeat_has_a_ratio_and_no_verdict() -> None:
    one = change(KEY, [1.0], [3.0], paired=False)
    assert one.value == pytest.approx(3)
    assert (one.low, one.verdict) == (None, "no detectable difference")


def test_only_the_changed_target_changes(tmp_path: Path) -> None:
    first, second = read(make(tmp_path / "a")), read(make(tmp_path / "b", 1.5))
    found = list(changes(first, second, ["output_throughput", "e2e_seconds.mean"]))
    assert [(one.target, one.metric, one.verdict) for one in found if one.target == "vllm"] == [
        ("vllm", "output_throughput", "better"),
        ("vllm", "e2e_seconds.mean", "better"),
    ]
    assert all(one.value == pytest.approx(1.5, rel=0.03) for one in found if one.target == "vllm")
    assert {one.verdict for one in found if one.target == "hf"} == {"no detectable difference"}
    assert {one.method for one in found} == {"paired"}
    assert differences(first, second) == []


def test_nothing_is_paired_when_the_requests_differ(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    for cell in (second / "cells").iterdir():
        change_records(second, cell.name, lambda rows: [replace(row, prompt_tokens=9) for row in rows])
    one, other = read(first), read(second)
    assert {one.method for one in changes(one, other, ["output_throughput"])} == {"unpaired"}
    (found,) = differences(one, other)
    assert (found.what, found.matters) == ("requests", True)


def test_a_run_that_is_not_valid_gets_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    change_records(second, "01-hf-c2-r1", lambda rows: [replace(rows[0], error="reset"), *rows[1:]])
    assert {one.verdict for one in changes(read(first), read(second), ["output_throughput"])} == {"invalid"}
    assert "NOT VALID" in show(first, second, capsys=capsys)


@pytest.mark.parametrize(
    ("file", "change_", "what", "matters"),
    [
        ("plan", {"model": "other"}, "plan: model", True),
        ("plan", {"workload": "classic"}, "plan: workload", True),
        ("plan", {"vllm_args": "--x"}, "plan: vllm_args", False),
        ("environment", {"processor": "another"}, "hardware: processor", True),
        ("environment", {"gpus": [{"name": "A", "memory_bytes": 2**34, "driver": "1"}]}, "hardware: GPUs", True),
        ("environment", {"packages": {"torch": "2.1"}}, "version: torch", False),
        ("environment", {"python": "3.12.0"}, "version: python", False),
    ],
)
def test_differences_are_named_and_those_that_matter_are_loud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, change_: dict[str, Any], what: str, matters: bool
) -> None:
    first, second = make(tmp_path / "a", repeats=2), make(tmp_path / "b", repeats=2)
    change_json(second / f"{file}.json", **change_)
    found = {one.what: one for one in differences(read(first), read(second))}
    assert found[what].matters == matters
    out = show(first, second, capsys=capsys)
    assert ("NOT COMPARABLE" in out) == matters
    assert f"{what}: {found[what].first} -> {found[what].second}" in out
    assert out.index(what) < out.index("output_throughput")
    assert ("verdict" in out) == ("95 % intervals" in out) == (not matters)
    told = json.loads(show(first, second, "--json", capsys=capsys))
    assert told["changes"]
    assert all(one["verdict"] == "invalid" for one in told["changes"]) == matters


def test_what_changed_while_a_run_was_stopped_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make(tmp_path / "a", repeats=2), make(tmp_path / "b", repeats=2)
    change_json(second / "environment.json", parts=[PART, PART | {"changed": {"cores": 4, "python": "3.12.0"}}])
    found = {one.what: one.matters for one in differences(read(first), read(second))}
    assert found == {
        "within the second run, in part 2: hardware: cores": True,
        "within the second run, in part 2: version: python": False,
    }
    assert "within the second run, in part 2: hardware: cores: 2 -> 4" in show(first, second, capsys=capsys)


def test_a_figure_is_that_of_the_report(tmp_path: Path) -> None:
    plan, factors = make_plan(repeats=3), {1: 1.0, 2: 1.5, 3: 3.0}
    folder = make_folder(tmp_path, plan, speed=lambda cell: SPEEDS[cell.target] * factors[cell.repeat])
    run = read(folder)
    kept = run.summary["levels"][0]["targets"]["vllm"]
    found = {one.metric: one.first for one in changes(run, run, SHOWN) if one.target == "vllm"}
    assert found["output_throughput"] == kept["output_throughput_mean"] == pytest.approx(4 * 2 * 5.5 / 3, rel=0.2)
    assert found["ttft_seconds.mean"] == kept["ttft_seconds"]["mean"]
    assert found["e2e_seconds.p99"] == kept["e2e_seconds"]["p99"]


def test_a_few_bytes_more_memory_are_no_difference(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", repeats=2), make(tmp_path / "b", repeats=2)
    change_json(second / "environment.json", memory_bytes=2**33 - 4096)
    assert differences(read(first), read(second)) == []


def test_json_has_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b", 1.5)
    found = json.loads(show(first, second, "--json", capsys=capsys))
    assert found["comparable"]
    assert found["valid"] == {"first": True, "second": True}
    assert list(found["methods"]) == ["paired"]
    assert {one["verdict"] for one in found["changes"] if one["target"] == "vllm"} == {"better"}


def test_levels_that_only_one_run_has_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make(tmp_path / "a", concurrency=[1, 2]), make(tmp_path / "b", concurrency=[2, 3])
    assert {one.level for one in changes(read(first), read(second), ["output_throughput"])} == {2}
    third = make(tmp_path / "c", concurrency=[4])
    out = show(first, third, capsys=capsys)
    assert "No level of a target has figures in both runs." in out
    assert "no cell is in both runs" in out


def test_a_list_of_named_things_goes_by_their_names() -> None:
    plan = {
        "targets": [{"name": "hf", "args": ""}, {"name": "vllm", "args": "x"}],
        "levels": [1, 2],
        "limits": {"a": 1},
    }
    assert dict(flat(plan)) == {
        "targets.hf.name": "hf",
        "targets.hf.args": "",
        "targets.vllm.name": "vllm",
        "targets.vllm.args": "x",
        "levels": [1, 2],
        "limits.a": 1,
    }


def spoil(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize("harm", [spoil("plan.json"), spoil("environment.json"), spoil("status.json")])
def test_a_damaged_folder_is_named(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    first, second = make(tmp_path / "a", repeats=2), make(tmp_path / "b", repeats=2)
    harm(second)
    with pytest.raises(ResultError, match=str(second)):
        diff([str(first), str(second)], Console())


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"], ["a", "b", "--jsn"]])
def test_other_arguments_end_with_2_and_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        diff(arguments, Console())
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("headroom: diff: ")
    assert err.count("\n") == 1
