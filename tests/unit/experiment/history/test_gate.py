"""The gate: what passes, what fails, and what cannot be judged."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from experiment.history import gate as command
from experiment.history.gate_report import as_junit
from experiment.history.judgement import Outcome, Ruling, judge, verdict
from experiment.history.two_runs import change, read
from experiment.plan.plan import Cell, Plan
from experiment.plan.rules import METRICS, Rules
from tests.unit.experiment.folders import SPEEDS, change_json, change_records, make_folder, make_plan

CELL = "01-hf-c2-r1"


def make(folder: Path, factor: float = 1.0, spread: float = 0.0, **options: Any) -> Path:
    """A run whose vLLM is `factor` times as fast as usual; `spread` is how much its repeats differ."""
    plan = make_plan(**({"repeats": 4} | options))

    def speed(cell: Cell) -> float:
        own = factor * (1 + spread * (-1) ** cell.repeat) if cell.target == "vllm" else 1
        return SPEEDS[cell.target] * own

    return make_folder(folder, plan, speed=speed)


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return make(tmp_path / "baseline")


def run_gate(baseline: Path, run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    code = command.gate(
        ["--baseline", str(baseline), "--run", str(run), *more],
        lambda _: pytest.fail("no plan is read"),
        Console(highlight=False, soft_wrap=True),
    )
    out = capsys.readouterr().out
    assert out == (run / "gate.md").read_text()
    return code, out


def regressions(baseline: Path, run: Path, **rules: Any) -> dict[str, Ruling]:
    found = judge(read(run), read(baseline), Rules(**rules))
    return {one.metric: one for one in found if one.limit.endswith("worse")}


@pytest.mark.parametrize(
    ("factor", "spread", "outcome", "found"),
    [
        (1.0, 0.0, "passed", "no detectable difference"),
        (1.2, 0.001, "passed", "better"),
        (0.98, 0.001, "passed", "worse, as allowed"),
        (0.90, 0.001, "failed", "worse than allowed"),
        (0.90, 0.5, "passed", "no detectable difference; 72 % worse is not excluded"),
        (0.94, 0.02, "passed", "worse, but not surely more than allowed; 9 % worse is not excluded"),
    ],
)
def test_a_regression_fails_when_its_interval_is_beyond_what_is_allowed(
    tmp_path: Path, baseline: Path, factor: float, spread: float, outcome: str, found: str
) -> None:
    ruling = regressions(baseline, make(tmp_path / "run", factor, spread))["output_throughput"]
    assert (ruling.outcome, ruling.found) == (outcome, found)
    assert ruling.wide == ("not excluded" in found)


def test_a_pass_says_how_many_intervals_prove_little(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run_gate(baseline, make(tmp_path / "run", 0.9, 0.5), capsys)
    assert code == 0
    assert "3 of 3 intervals are too wide to exclude more than the allowed" in out
    assert "too wide" not in run_gate(baseline, make(tmp_path / "same"), capsys)[1]


def test_a_run_that_lost_a_load_or_a_server_of_its_baseline_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = make(tmp_path / "baseline", levels=[2, 3])
    code, out = run_gate(baseline, make(tmp_path / "run", levels=[2]), capsys)
    assert code == 2
    assert "only the baseline has vllm at concurrency 3" in out


def test_a_server_that_is_no_longer_within_the_limits_at_all_fails(tmp_path: Path) -> None:
    baseline, run = (
        make(tmp_path / name, factor, limits={"ttft_seconds": 0.3}) for name, factor in (("one", 1), ("two", 0.1))
    )
    ruling = regressions(baseline, run, metrics=["goodput"])["goodput"]
    assert (ruling.outcome, ruling.found) == ("failed", "the run has none in any repeat")
    assert regressions(run, baseline, metrics=["goodput"])["goodput"].outcome == "passed"


def test_what_is_allowed_decides(tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run", 0.9, 0.001)
    code, out = run_gate(baseline, run, capsys)
    assert code == 1
    assert out.startswith("**headroom gate: FAILED**")
    assert "**failed**: worse than allowed" in out
    assert run_gate(baseline, run, capsys, "--allowed-regression", "0.2")[0] == 0


def test_the_first_target_is_not_judged_unless_it_is_named(tmp_path: Path, baseline: Path) -> None:
    run = make(tmp_path / "run")
    groups = {one.group for one in judge(read(run), read(baseline), Rules()) if one.metric}
    assert groups == {"vllm at concurrency 2"}
    groups = {one.group for one in judge(read(run), read(baseline), Rules(targets=["hf"])) if one.metric}
    assert groups == {"hf at concurrency 2"}


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"ttft_seconds.p99": 0.26}, 0),
        ({"ttft_seconds.p99": 0.24}, 1),
        ({"output_throughput": 7.0}, 0),
        ({"output_throughput": 9.0}, 1),
        ({"ttft_seconds.p99": 0.26, "e2e_seconds.mean": 0.5}, 1),
    ],
)
def test_a_limit_is_the_most_of_a_latency_and_the_least_of_a_throughput(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str], limits: dict[str, float], code: int
) -> None:
    run = make(tmp_path / "run")
    change_json(run / "plan.json", gate={"limits": limits})
    assert run_gate(baseline, run, capsys)[0] == code


def test_limits_of_each_request_are_judged_by_the_share_that_meets_them(tmp_path: Path, baseline: Path) -> None:
    run, other = (read(make(tmp_path / name)) for name in ("run", "other"))
    run.results.plan.update(limits={"ttft_seconds": 0.2, "tpot_seconds": None}, attainment=0.99)
    for attainment, outcome in ((0.995, "passed"), (0.5, "failed"), (None, "invalid")):
        run.summary["levels"][0]["targets"]["vllm"]["attainment"] = attainment
        (ruling,) = (one for one in judge(run, other, Rules()) if one.metric.startswith("share"))
        assert (ruling.outcome, ruling.limit) == (outcome, "at least 99 %")
        assert ruling.metric == "share of the requests within ttft_seconds 200.00 ms"


def harm_records(folder: Path) -> None:
    change_records(folder, CELL, lambda rows: [replace(rows[0], error="reset"), *rows[1:]])


def harm_model(folder: Path) -> None:
    change_json(folder / "plan.json", model="other")


def harm_hardware(folder: Path) -> None:
    change_json(folder / "environment.json", processor="other")


def harm_state(folder: Path) -> None:
    change_json(folder / "status.json", state="partial", reason="interrupted by the user")


def harm_work(folder: Path) -> None:
    for cell in (folder / "cells").iterdir():
        change_records(folder, cell.name, lambda rows: [replace(row, prompt_tokens=9) for row in rows])


HARMS = [harm_records, harm_model, harm_hardware, harm_state, harm_work]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("harmed", ["baseline", "run"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_without_the_evidence_there_is_no_verdict_whatever_the_numbers(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str], harm: Any, harmed: str, factor: float
) -> None:
    run = make(tmp_path / "run", factor)
    harm(tmp_path / harmed)
    code, out = run_gate(baseline, run, capsys)
    assert code == 2
    assert out.startswith("**headroom gate: INVALID")


def test_one_repeat_cannot_be_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make(tmp_path / "a", repeats=1), make(tmp_path / "b", repeats=1)
    code, out = run_gate(first, second, capsys)
    assert code == 2
    assert "no interval: both runs need two repeats" in out


def test_a_level_that_the_baseline_lacks_cannot_be_judged(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run_gate(baseline, make(tmp_path / "run", concurrency=[2, 3]), capsys)
    assert code == 2
    assert "vllm at concurrency 3: output_throughput: at most 5 % worse than the baseline: there is no such" in out


def test_junit_has_a_case_for_each_rule(tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run", 0.9, 0.001)
    change_json(run / "plan.json", gate={"limits": {"e2e_seconds.p99": 0.0001}})
    run_gate(baseline, run, capsys)
    root = ElementTree.fromstring((run / "gate.xml").read_text().partition("\n")[2])  # noqa: S314 - our own
    (suite,) = root
    cases = suite.findall("testcase")
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert len(cases) == int(suite.attrib["tests"]) == len(list(suite))
    assert len(suite.findall("testcase/failure")) == int(suite.attrib["failures"]) == 4
    # Whether the cells of either run drifted, which are too short to tell.
    assert len(suite.findall("testcase/skipped")) == int(suite.attrib["skipped"]) == 2
    assert (run / "gate.md").read_text().count("\n- not judged: ") == 2
    assert len(suite.findall("testcase/error")) == int(suite.attrib["errors"]) == 0
    assert len({(case.attrib["classname"], case.attrib["name"]) for case in cases}) == len(cases)
    limit = next(case for case in cases if "e2e_seconds.p99" in case.attrib["name"])
    failure = limit.find("failure")
    assert failure is not None
    assert failure.text == "not kept; limit: at most 0.10 ms; now: 1,112.22 ms"


@given(st.text())
def test_junit_can_be_read_whatever_a_rule_says(text: str) -> None:
    folder = Path("run")
    rulings = [Ruling(text, text, outcome, text, now=text) for outcome in get_args(Outcome)]
    root = ElementTree.fromstring(as_junit(folder, rulings).partition("\n")[2])  # noqa: S314 - our own
    assert len(root.findall("testsuite/testcase")) == 4
    assert len(root.findall("testsuite/testcase/skipped")) == int(root.attrib["skipped"]) == 1


def test_a_table_shows_each_figure(tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run_gate(baseline, make(tmp_path / "run"), capsys)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows if len(row) > 1}) == 1
    assert [row[1] for row in rows[2:]] == Rules().metrics


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["passed"], "passed"),
        ([], "passed"),
        (["passed", "failed"], "failed"),
        (["failed", "invalid", "passed"], "invalid"),
        (["passed", "not judged"], "passed"),
    ],
)
def test_what_cannot_be_judged_outweighs_what_failed(outcomes: list[Any], expected: str) -> None:
    assert verdict([Ruling("", "", outcome, "") for outcome in outcomes]) == expected


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"allowed_regression": 1}, "gate.allowed_regression: 1: "),
        (
            {"metrics": ["ttft"]},
            "gate.metrics.0: 'ttft': expected one of output_throughput, goodput, ",
        ),
        ({"limits": {"tpot_seconds.p95": 1}}, "gate.limits.tpot_seconds.p95.[key]: 'tpot_seconds.p95': "),
        ({"limits": {"tpot_seconds.p99": 0}}, "gate.limits.tpot_seconds.p99: 0: "),
        ({"limit": {}}, "gate.limit: {}: "),
        ({"targets": ["tgi"]}, "gate.targets: 'tgi': no target of the run; known: hf, vllm"),
    ],
)
def test_bad_rules_end_with_2_and_name_key_and_value(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str], rules: dict[str, Any], named: str
) -> None:
    run = make(tmp_path / "run", repeats=2)
    change_json(run / "plan.json", gate=rules)
    with pytest.raises(SystemExit) as ended:
        command.gate(["--baseline", str(baseline), "--run", str(run)], lambda _: make_plan(), Console())
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"headroom: gate: {named}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("value", ["1", "-0.1", "x", "nan"])
def test_a_bad_allowed_regression_is_said_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], value: str
) -> None:
    with pytest.raises(SystemExit):
        command.gate(["--baseline", "nowhere", f"--allowed-regression={value}"], lambda _: make_plan(), Console())
    assert capsys.readouterr().err.startswith(f"headroom: gate: --allowed-regression: '{value}': ")


def test_a_run_that_exists_comes_with_its_own_plan(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.gate(
            ["--baseline", str(baseline), "--run", str(baseline), "--model", "x"], lambda _: make_plan(), Console()
        )
    assert "--run: that run's own plan holds; '--model' cannot be given with it" in capsys.readouterr().err


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (1, 2), (130, 130)])
def test_a_plan_is_run_first_and_judged_from_what_it_left(
    tmp_path: Path, baseline: Path, monkeypatch: pytest.MonkeyPatch, ended: int, code: int
) -> None:
    plans: list[Plan] = []

    def leave(plan: Plan, _: Console, folder: Path) -> int:
        plans.append(plan)
        make(folder)
        if ended:
            change_json(folder / "status.json", state="partial", reason="a server ended")
        return ended

    monkeypatch.setattr(command, "compare", leave)
    plan = make_plan(out=str(tmp_path / "out"))
    got = command.gate(["--baseline", str(baseline), "--seed", "1"], lambda _: plan, Console())
    assert (got, plans) == (code, [plan])
    assert (len(list((tmp_path / "out").glob("*/gate.xml"))) == 1) == (code != 130)


def test_every_metric_can_be_a_rule(tmp_path: Path, baseline: Path) -> None:
    limits = {"ttft_seconds": 10}
    change_json(baseline / "plan.json", limits=limits)
    found = regressions(baseline, make(tmp_path / "run", limits=limits), metrics=list(METRICS))
    assert set(found) == set(METRICS)
    # A closed loop has no schedule to count from.
    told = {name: one.outcome for name, one in found.items()}
    assert {name for name, outcome in told.items() if outcome == "invalid"} == {
        name for name in METRICS if name.startswith("response_seconds")
    }
    assert set(told.values()) == {"passed", "invalid"}


def test_rules_of_a_plan_refuse_unknown_keys() -> None:
    with pytest.raises(ValidationError):
        Rules.model_validate({"allowed": 0.1})


@pytest.mark.parametrize(
    ("before", "now", "outcomes"),
    [
        ([], [1, 2, 3, 4], {"latency": "failed", "output_throughput": "passed"}),
        ([], [2], {"ttft_seconds.mean": "invalid", "output_throughput": "passed"}),
        ([1], [1, 2, 3, 4], {"ttft_seconds.mean": "invalid", "output_throughput": "passed"}),
        ([], [], {"ttft_seconds.mean": "passed", "output_throughput": "passed"}),
    ],
)
def test_a_latency_that_drifts_has_no_mean_to_judge(
    tmp_path: Path, baseline: Path, before: list[int], now: list[int], outcomes: dict[str, str]
) -> None:
    first, second = read(baseline), read(make(tmp_path / "run"))
    for run, repeats in ((first, before), (second, now)):
        run.summary["levels"][0]["targets"]["vllm"]["unstable"] = repeats
    rules = Rules(metrics=["output_throughput", "ttft_seconds.mean"])
    assert {one.metric: one.outcome for one in judge(second, first, rules) if one.metric} == outcomes


def test_a_latency_of_cells_that_were_too_short_for_it_fails_nothing(tmp_path: Path, baseline: Path) -> None:
    first, second = read(baseline), read(make(tmp_path / "run"))
    second.summary["levels"][0]["targets"]["vllm"]["short"] = [1, 2, 3, 4]
    rules = Rules(metrics=["output_throughput", "ttft_seconds.mean"])
    outcomes = {one.metric: one.outcome for one in judge(second, first, rules) if one.metric}
    assert outcomes == {"ttft_seconds.mean": "invalid", "output_throughput": "passed"}


def test_one_server_alone_can_be_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone: dict[str, Any] = {"targets": [{"name": "vllm", "kind": "vllm"}]}
    first, second = make(tmp_path / "a", **alone), make(tmp_path / "b", 0.8, 0.001, **alone)
    assert run_gate(first, first, capsys)[0] == 0
    assert run_gate(first, second, capsys)[0] == 1


def test_a_plan_names_targets_that_it_has() -> None:
    with pytest.raises(ValidationError, match=r"gate.targets: 'tgi': expected names of targets: hf, vllm"):
        make_plan(gate={"targets": ["tgi"]})


def test_a_run_is_not_resumed_in_a_gate(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.gate(["--baseline", str(baseline), "--resume=x"], lambda _: make_plan(), Console())
    assert "--resume=x: go on with headroom compare, then give the folder as --run" in capsys.readouterr().err


@pytest.mark.parametrize(("true", "least", "most"), [(1.0, 0.0, 0.02), (0.95, 0.01, 0.04), (0.8, 0.95, 1.0)])
def test_how_often_a_regression_of_known_size_fails(true: float, least: float, most: float) -> None:
    """At just what is allowed, an interval of 95 % is wholly beyond it in 2.5 of 100 runs."""
    draw = np.random.default_rng(11)
    failed = 0
    for _ in range(2000):
        before, now = np.exp(draw.normal(0, 0.03, (2, 4)))
        one = change((1, "vllm", "output_throughput"), before.tolist(), (now * true).tolist(), paired=True)
        assert one.high is not None
        failed += one.high < 0.95
    assert least <= failed / 2000 <= most
