"""The page of a report: what it says, and that it needs nothing from outside."""

import html
import re
import shlex
from pathlib import Path

import pytest
from pydantic_settings import CliApp

from experiment import report
from experiment.plan import Plan
from monitor.timeline import Series
from tests.unit.experiment.folders import change_json, change_records, make_folder, make_plan, timeline, write_timeline


def page(folder: Path) -> str:
    report.write(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def make_small(folder: Path, state: str = "complete") -> Path:
    return make_folder(folder, make_plan(concurrency=[1], repeats=1), state=state)


def test_a_page_shows_the_headline_and_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    series = {Series("host_pss_bytes", server=name): [2.0**30, 2.0**31] for name in ("hf", "vllm")}
    write_timeline(tmp_path / "timeline" / "1.arrow", timeline(series, step_ns=1000 * 10**9))
    text = page(make_folder(tmp_path))
    assert "At concurrency 2 vLLM made 2.00 times" in text
    assert "Partial." not in text
    assert "Not valid." not in text
    assert text.count("<figure>") == 5  # throughput, TTFT, TPOT, E2E and memory of the host
    outside = [link for link in re.findall(r"\w*://[^\s\"'<>]*", text) if not link.startswith("http://www.w3.org/")]
    assert outside == []


@pytest.mark.usefixtures("no_charts")
def test_html_in_a_reason_is_shown_and_not_run(tmp_path: Path) -> None:
    folder = make_small(tmp_path, state="partial")
    change_json(folder / "status.json", reason="<script>alert('x')</script>")
    text = page(folder)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<strong>Partial.</strong>" in text


@pytest.mark.usefixtures("no_charts")
def test_html_in_the_name_of_a_model_is_shown_and_not_run(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    change_json(folder / "plan.json", model="<b>model</b>")
    assert "<b>" not in page(folder)


@pytest.mark.usefixtures("no_charts")
def test_a_broken_rule_has_a_banner(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    change_records(folder, "01-hf-c1-r1", lambda records: records[:-1])
    text = page(folder)
    assert '<div class="banner"><strong>Not valid.</strong>' in text
    assert '<span class="bad">invalid</span>' in text
    assert ">faster</span>" not in text


@pytest.mark.usefixtures("no_charts")
def test_samples_that_are_missing_are_said_to_be(tmp_path: Path) -> None:
    assert "The monitor&#39;s samples are missing" in page(make_small(tmp_path)).replace("'", "&#39;")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"concurrency": [1, 4, 16], "model": "some/model", "max_model_len": 512, "sigma": 0.25},
        {"hf_args": "--one 'a b'", "vllm_args": "-- --enforce-eager"},
        {"vllm_args": "--enforce-eager", "hf_args": "--cpu"},
        {"out": "a folder/with $HOME & <b>"},
    ],
)
def test_the_command_that_repeats_a_run_gives_the_same_plan(options: dict[str, object]) -> None:
    plan = make_plan(**options)
    name, command, *arguments = shlex.split(report._command(plan.model_dump()))
    assert (name, command) == ("headroom", "compare")
    assert CliApp.run(Plan, cli_args=arguments) == plan


@pytest.mark.usefixtures("no_charts")
def test_the_page_shows_the_command_that_repeats_its_run(tmp_path: Path) -> None:
    plan = make_plan(concurrency=[1], repeats=1, vllm_args="-- --enforce-eager 'a<b'")
    shown = re.search(r"<pre>(.*?)</pre>", page(make_folder(tmp_path, plan)), re.DOTALL)
    assert shown is not None
    assert CliApp.run(Plan, cli_args=shlex.split(html.unescape(shown[1]))[2:]) == plan
