"""`headroom compare` as a user runs it: to its end, interrupted, and with each part killed in the middle."""

import json
import os
import signal
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest

from experiment.analysis import analyse
from experiment.results import load
from tests.integration.harness import Compare


def test_a_run_leaves_a_report_that_agrees_with_its_records(compare: Callable[..., Compare]) -> None:
    run = compare(repeats=2)
    code, output = run.finish()
    assert code == 0, output
    folder = run.folder
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "complete"
    order = [(cell["concurrency"], cell["target"]) for cell in summary["cells"]]
    assert [target for level, target in order if level == 3] == ["hf", "vllm", "vllm", "hf"]
    work = next(gate for gate in summary["gates"] if "same work" in gate["rule"])
    assert work["passed"], work

    table = pq.read_table(folder / "records.parquet").to_pylist()
    own = [r for r in table if r["concurrency"] == 3 and r["target"] == "vllm" and r["phase"] == "measured"]
    ttft = sum(r["chunk_ns"][0] - r["sent_ns"] for r in own) / len(own) / 1e9
    level = next(level for level in summary["levels"] if level["concurrency"] == 3)
    assert level["targets"]["vllm"]["ttft_seconds"]["mean"] == pytest.approx(ttft)
    assert level["targets"]["vllm"]["requests"] == len(own) == 12

    page = (folder / "report.html").read_text()
    assert summary["headline"] in page
    assert page.count("<svg") == 5
    assert "://" not in page.replace("http://www.w3.org", "")  # nothing is fetched from a network
    assert f"{ttft * 1e3:,.1f}" in page
    assert pq.read_table(folder / "timeline.parquet").num_rows > 100
    for target, source in (("hf", "ledger"), ("vllm", "records")):
        cache = level["targets"][target]["memory"]["kv"]
        assert (cache["live_source"], cache["unit"]) == (source, "bytes")
        assert cache["samples"] > 0
        assert cache["broken"] == 0
        low, high = cache["parts"]["live"]["share"]
        assert 0 < high <= 1
        assert low <= high
        assert cache["allocated"]["max"] <= cache["capacity"]["max"]
    assert set(pq.read_table(folder / "kv.parquet")["target"].to_pylist()) == {"hf", "vllm"}
    assert json.loads(json.dumps(analyse(load(folder)))) == summary


@pytest.mark.parametrize(
    ("victim", "words", "message"),
    [
        ("vllm", ("VLLM::EngineCore",), "vllm ended with code 1"),
        ("vllm", ("vllm.entrypoints.openai.api_server",), "vllm ended with code 1"),
        ("vllm", ("-m servers.vllm",), "vllm was killed by signal 9"),
        ("hf", ("-m servers.hf",), "hf was killed by signal 9"),
    ],
    ids=["vLLM's engine", "vLLM's server", "what looks after vLLM", "HF server"],
)
def test_a_killed_server_ends_the_run_with_its_name_and_a_partial_report(
    compare: Callable[..., Compare], victim: str, words: tuple[str, ...], message: str
) -> None:
    run = compare(output_mean=150, min_requests=60)
    run.wait_for_records(victim)
    run.find(*words).kill()
    code, output = run.finish(90)
    assert code == 1, output
    assert message in output, output
    assert "Traceback" not in output.replace("(APIServer", "").split("The end of")[0]
    assert run.left_behind() == []
    assert load(run.folder).partial
    assert "Partial." in (run.folder / "report.html").read_text()


def test_a_killed_load_generator_ends_the_run(compare: Callable[..., Compare]) -> None:
    run = compare(output_mean=150)
    run.wait_for_records("hf")
    run.find("locustfile.py").kill()
    code, output = run.finish(90)
    assert code == 1, output
    assert "the load generator was killed by signal 9" in output, output
    assert run.left_behind() == []
    results = load(run.folder)
    assert results.partial
    assert results.cells[0].records
    assert results.memory.caches["hf"].time_ns.size


def test_ctrl_c_keeps_what_was_measured_and_leaves_no_process(compare: Callable[..., Compare]) -> None:
    run = compare(output_mean=150)
    run.wait_for_records("hf")
    os.killpg(run.process.pid, signal.SIGINT)
    code, output = run.finish(90)
    assert code == 130, output
    assert "Traceback" not in output
    assert run.left_behind() == []
    results = load(run.folder)
    assert results.status == {"state": "partial", "reason": "interrupted by the user"}
    assert any(record.error == "cancelled" for record in results.cells[0].records)
    assert "Partial." in (run.folder / "report.html").read_text()


def test_a_killed_headroom_leaves_no_process_and_a_readable_folder(compare: Callable[..., Compare]) -> None:
    run = compare(output_mean=150)
    run.wait_for_records("hf")
    run.process.kill()
    run.process.wait()
    assert run.left_behind() == []
    results = load(run.folder)
    assert results.partial
    assert results.cells[0].records
    assert results.memory.caches["hf"].time_ns.size
