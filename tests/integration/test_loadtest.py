"""Against both real servers, which are up already: Locust, as anyone can use it alone, and a comparison."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiment.run.stack import Stack
from loadtest import records
from loadtest.selfcheck import LEAST_SECONDS
from tests.integration.harness import Compare

LOCUSTFILE = Path(records.__file__).with_name("locustfile.py")


def locust(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    urls = ["--hf-url", stack.programs["hf"].url, "--vllm-url", stack.programs["vllm"].url]
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", *urls]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("workload", ["classic", "lognormal", "alpaca"])
def test_both_servers_get_the_same_requests_and_do_the_same_work(stack: Stack, tmp_path: Path, workload: str) -> None:
    kept = tmp_path / "records.arrow"
    shorter = ["--output-mean", "12"] if workload == "lognormal" else []  # the others have their own lengths
    done = locust(
        stack, *("HF", "VLLM", "-u", "4", "-r", "4", "--requests", "8", "--warmup", "2", "--drain", "1"),
        *("--workload", workload, *shorter, "--records", str(kept)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = list(records.read(kept))
    by_target = {
        target: sorted((r for r in found if r.target == target), key=lambda r: r.index) for target in ("hf", "vllm")
    }
    work = {
        target: [(r.index, r.phase, r.prompt_tokens, r.output_tokens) for r in own] for target, own in by_target.items()
    }
    assert work["hf"] == work["vllm"]
    assert [row[1] for row in work["hf"]] == ["warmup"] * 2 + ["measured"] * 8 + ["drain"]
    for record in found:
        assert record.error is None, record
        assert record.token_source == "usage"
        assert record.output_tokens == record.max_tokens == sum(record.chunk_tokens)
        assert record.sent_ns < record.chunk_ns[0] <= record.chunk_ns[-1] <= record.end_ns
    client = json.loads((tmp_path / "client.json").read_text())
    assert client["requests_ended"] == {"hf": 11, "vllm": 11}
    (process,) = client["processes"]
    # A fast machine is done in less than a second, in which a share says nothing.
    assert client["cpu_share"] is None if process["wall_seconds"] < LEAST_SECONDS else 0 < client["cpu_share"] < 1


def test_a_stopped_run_keeps_a_record_of_each_request_in_flight(stack: Stack, tmp_path: Path) -> None:
    kept = tmp_path / "records.arrow"
    done = locust(
        stack, *("HF", "-u", "6", "-r", "6", "--run-time", "3s", "--output-mean", "400", "--sigma", "0"),
        *("--records", str(kept)),
    )  # fmt: skip
    found = list(records.read(kept))
    cancelled = [record for record in found if record.error == "cancelled"]
    assert len(cancelled) == 6, done.stdout + done.stderr
    assert len({record.index for record in found}) == len(found)


def test_requests_past_the_context_are_records_of_kind_http_4xx(stack: Stack, tmp_path: Path) -> None:
    kept = tmp_path / "records.arrow"
    locust(
        stack, *("HF", "VLLM", "-u", "2", "-r", "2", "--requests", "2", "--max-context", "20000", "--sigma", "0"),
        *("--input-mean", "3000", "--records", str(kept)),
    )  # fmt: skip
    found = list(records.read(kept))
    assert [(r.error, r.status) for r in found] == [("http_4xx", 400)] * 4
    assert all(r.ttft_seconds is None and r.e2e_seconds is None for r in found)
    assert all("2048" in str(r.error_detail) for r in found)


def test_servers_at_their_urls_are_used_and_stay_up_and_a_fast_one_goes_on_for_the_time(
    compare: Callable[..., Compare], stack: Stack
) -> None:
    urls = [{"name": name, "kind": name, "url": stack.programs[name].url} for name in ("hf", "vllm")]
    urls.append({"name": "other", "kind": "url", "url": stack.programs["vllm"].url})
    run = compare(targets=urls, levels=[2], vllm_args="", min_seconds=2, monitor_url=stack.programs["monitor"].url)
    code, output = run.finish()
    assert code == 0, output
    stack.check()
    summary = json.loads((run.folder / "summary.json").read_text())
    assert list(summary["levels"][0]["targets"]) == ["hf", "vllm", "other"]
    assert {gate["id"]: gate["passed"] for gate in summary["gates"]}["same-work"]
    assert all(cell["window_ns"][1] - cell["window_ns"][0] > 1.9e9 for cell in summary["cells"])
    assert min(cell["requests"] for cell in summary["cells"]) > 9  # those that were asked for
    assert {gate["id"]: gate["passed"] for gate in summary["gates"]}["cells"]
