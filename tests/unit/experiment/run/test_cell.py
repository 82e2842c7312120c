"""What the load generator is told, when a cell is lost, and files that are whole or not there."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.analysis import requests
from experiment.plan.plan import Target
from experiment.run import cell as run
from experiment.run import stack
from loadtest.options import check
from tests.unit.experiment.folders import SECOND, make_plan, make_record

OPEN = make_plan(levels=[2], arrival="poisson", requests=100, limits={"ttft_seconds": 1}, attainment=0.9)


@pytest.mark.parametrize(("kind", "user"), [("hf", "hf"), ("vllm", "vllm"), ("url", "vllm")])
def test_a_target_is_sent_to_as_one_of_the_two_servers_that_the_load_test_knows(kind: str, user: str) -> None:
    url = "http://there" if kind == "url" else ""
    assert run.user_of(Target.model_validate({"name": "a", "kind": kind, "url": url})) == user


@given(st.integers(0, 100), st.integers(0, 100))
def test_a_cell_is_lost_once_the_rest_cannot_make_up_for_what_missed(missed: int, met: int) -> None:
    cell = OPEN.cell(1, "hf", 2, 1, search=True)
    stamps = {"chunk_ns": [SECOND // 10, SECOND], "chunk_tokens": [2, 2]}
    good, bad = make_record(**stamps), make_record(sent_ns=-SECOND, **stamps)
    warmup = [make_record(sent_ns=-SECOND, phase="warmup", **stamps)] * 50
    assert run.is_lost(OPEN, cell, requests.of([*warmup, *[bad] * missed, *[good] * met])) == (missed > 10)


class Context:
    """All that the options ask of the servers."""

    def max_model_len(self) -> int:
        return 2048


@pytest.mark.parametrize("workload", ["lognormal", "classic", "sharegpt", "alpaca"])
def test_a_cell_passes_only_the_lengths_that_its_workload_reads(workload: str) -> None:
    plan = make_plan(workload=workload, input_mean=9.5, output_mean=12, sigma=0.1, cell_seconds=3600)
    options = run.workload_options(plan, cast(Any, Context()))
    taken = check({name.replace("-", "_"): value for name, value in options.items()})
    assert (taken.workload, taken.max_context, taken.timeout) == (workload, 2048, 3600)
    expected = (9.5, 12, 0.1) if workload == "lognormal" else (64, 48, 0.6)
    assert (taken.input_mean, taken.output_mean, taken.sigma) == expected


def test_options_become_flags_that_values_cannot_break_out_of() -> None:
    assert run.flags({"model": "--help", "users": 3}) == ["--model=--help", "--users=3"]


def test_the_load_generator_of_a_cell_takes_no_settings_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HEADROOM_LOADTEST_ENDPOINT", "LOCUST_RUN_TIME", "HEADROOM_HF_API_KEY"):
        monkeypatch.setenv(name, "set")
    command = [sys.executable, "-c", "import os; print(*os.environ)"]
    assert stack.spawn(command, tmp_path / "log", run.settings_unset()).wait() == 0
    seen = (tmp_path / "log").read_text().split()
    assert not [name for name in seen if name.startswith(("HEADROOM_LOADTEST_", "LOCUST_"))]
    assert {"HEADROOM_HF_API_KEY", "PYTHONUNBUFFERED"} <= set(seen)


def test_json_is_written_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run.write_json(path, {"a": 1})
    run.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_target_that_cannot_be_replaced_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "a.json" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.json"):
        run.write_json(tmp_path / "a.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
