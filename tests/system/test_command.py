"""The headroom command in its container, against the servers of the stack: what it leaves on the host, and for whom."""

import json
from pathlib import Path

import pytest

from tests.system.compose import Compose

SMALL = "--concurrency 2 --requests 6 --repeats 2 --output-mean 200".split()


@pytest.fixture(scope="module")
def result(stack: Compose) -> Path:
    """Folder of a comparison, as the container calls it: inside the clone."""
    said = stack.headroom("compare", *SMALL, seconds=300)
    report = Path(said.split("The report is at ")[1].strip())
    assert (stack.folder / report).stat().st_size > 0
    return report.parent


def test_a_comparison_leaves_its_report_on_the_host_to_the_owner_of_results(stack: Compose, result: Path) -> None:
    owner = (stack.folder / "results").stat().st_uid
    files = [stack.folder / result, *(stack.folder / result).rglob("*")]
    assert {path.stat().st_uid for path in files} == {owner}


def test_a_comparison_loads_the_servers_of_the_stack_and_watches_them(stack: Compose, result: Path) -> None:
    plan, status, summary = (
        json.loads((stack.folder / result / name).read_text()) for name in ("plan.json", "status.json", "summary.json")
    )
    assert {target["url"] for target in plan["targets"]} == {"http://hf:8000", "http://vllm:8001"}
    assert status["state"] == "complete"
    (level,) = summary["levels"]
    assert set(level["targets"]) == {"hf", "vllm"}
    for figures in level["targets"].values():
        assert figures["failed"] == {}
        assert figures["requests"] == 12
        assert figures["memory"]["host"]["held"]["max"] > 1e8  # bytes: from the stack's monitor
        assert figures["memory"]["kv"]["samples"] > 0
    gates = {gate["id"]: gate["passed"] for gate in summary["gates"]}
    assert gates["cells"]
    assert gates["answered"]
    assert gates["same-work"]


def test_the_other_commands_read_what_it_left(stack: Compose, result: Path) -> None:
    folder = str(result)
    assert result.name in stack.headroom("list")
    report = stack.folder / result / "report.html"
    before = report.stat().st_mtime_ns
    assert "The report is at" in stack.headroom("report", folder)
    assert report.stat().st_mtime_ns > before
    # Valid or not, which on a busy machine is not the test's to say: each figure is that of the same run.
    told = stack.headroom("diff", folder, folder)
    assert told.count("1.000 (1.000 to 1.000)") == 14


def test_bad_input_is_named(stack: Compose) -> None:
    with pytest.raises(AssertionError, match=r"headroom: requests: '?1'?: "):
        stack.headroom("compare", "--requests", "1")
