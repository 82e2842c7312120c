"""`headroom compare` as a user runs it: to its end, interrupted, and with each part killed in the middle."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest

from experiment.analysis.analyse import analyse
from experiment.analysis.results import CellResult, Results, load
from experiment.history.listing import describe, line
from tests.integration.harness import KV_BUDGET, Compare, comparisons

WHOLE = {"repeats": 2, "output_mean": 30}
#: A run that is stopped before its end and whose servers are not what the test is about: quick to start.
HF_ONLY = {"targets": [{"name": "hf", "kind": "hf"}], "vllm_args": "", "output_mean": 150, "min_requests": 60}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compare]:
    """A run that came to its end."""
    with comparisons(tmp_path_factory.mktemp("whole")) as start:
        run = start(**WHOLE)
        code, output = run.finish()
        assert code == 0, output
        yield run


@dataclass(frozen=True)
class Killed:
    """A run like the whole one that was killed, the processes that outlived it, and what its folder held then."""

    run: Compare
    left: list[str]
    results: Results


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    with comparisons(tmp_path_factory.mktemp("killed")) as start:
        run = start(**WHOLE)
        run.wait_for_records("vllm")
        run.process.kill()
        run.process.wait()
        yield Killed(run, run.left_behind(), load(run.folder))


def test_a_run_leaves_a_report_that_agrees_with_its_records(whole: Compare) -> None:
    folder = whole.folder
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "complete"
    order = [(cell["level"], cell["target"]) for cell in summary["cells"]]
    assert [target for level, target in order if level == 3] == ["hf", "vllm", "vllm", "hf"]
    work = next(gate for gate in summary["gates"] if gate["id"] == "same-work")
    assert work["passed"], work

    table = pq.read_table(folder / "records.parquet").to_pylist()
    own = [r for r in table if r["level"] == 3 and r["target"] == "vllm" and r["phase"] == "measured"]
    ttft = sum(r["chunk_ns"][0] - r["sent_ns"] for r in own) / len(own) / 1e9
    level = next(level for level in summary["levels"] if level["level"] == 3)
    assert level["targets"]["vllm"]["ttft_seconds"]["mean"] == pytest.approx(ttft)
    assert level["targets"]["vllm"]["requests"] == len(own) == 12

    page = (folder / "report.html").read_text()
    assert "the output tokens per second of HF: " in page
    assert len(list((folder / "charts" / "en").glob("*.png"))) == page.count("<svg") // 2 == 14
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
    assert summary.pop("headline") in page
    assert json.loads(json.dumps(analyse(load(folder)))) == summary


#: What is killed, by words of its command line, and what the run then says.
VICTIMS = {
    "vLLM's engine": (("VLLM::EngineCore",), "vllm ended with code 1"),
    "vLLM's server": (("vllm.entrypoints.openai.api_server",), "vllm ended with code 1"),
    "what looks after vLLM": (("-m servers.vllm",), "vllm was killed by signal 9"),
    "HF server": (("-m servers.hf",), "hf was killed by signal 9"),
}


def kill(run: Compare, words: Sequence[str]) -> tuple[int, str]:
    """Kill a process while its server is loaded; returns exit code and output of the run."""
    run.wait_for_records("hf" if "-m servers.hf" in words else "vllm")
    run.find(*words).kill()
    return run.finish(180)


@pytest.fixture(scope="module")
def killings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Compare, Future[tuple[int, str]]]]]:
    """A run for each victim, all at once: most of the time vLLM loads, which keeps one core busy."""
    # The victim's cell is the first.
    both = [{"name": name, "kind": name} for name in ("vllm", "hf")]
    # On a GPU they share it: each vLLM takes a pool of so many bytes, and wants no more than a tenth to be free.
    whole_stack = {"output_mean": 150, "min_requests": 60, "targets": both}
    whole_stack |= {"kv_budget": KV_BUDGET, "gpu_memory_utilization": 0.1}
    with comparisons(tmp_path_factory.mktemp("killings")) as start, ThreadPoolExecutor(len(VICTIMS)) as pool:
        found = {}
        for victim, (words, _) in VICTIMS.items():
            options = HF_ONLY if victim == "HF server" else whole_stack
            run = start(victim, **options)
            found[victim] = run, pool.submit(kill, run, words)
        yield found


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_server_ends_the_run_with_its_name_and_a_partial_report(
    killings: dict[str, tuple[Compare, Future[tuple[int, str]]]], victim: str
) -> None:
    run, ended = killings[victim]
    code, output = ended.result()
    assert code == 1, output
    assert VICTIMS[victim][1] in output, output
    assert "Traceback" not in output.replace("(APIServer", "").split("The end of")[0]
    assert run.left_behind() == []
    assert load(run.folder).partial
    assert "Partial." in (run.folder / "report.html").read_text()


def test_a_killed_load_generator_ends_the_run(compare: Callable[..., Compare]) -> None:
    run = compare(**HF_ONLY)
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


def test_a_killed_headroom_leaves_no_process_and_a_readable_folder(killed: Killed) -> None:
    assert killed.left == []
    assert killed.results.partial
    assert killed.results.cells[0].records
    assert killed.results.memory.caches["hf"].time_ns.size


def test_a_killed_run_goes_on_and_its_report_is_that_of_a_whole_one(
    compare: Callable[..., Compare], whole: Compare, killed: Killed
) -> None:
    folder = killed.run.folder
    code, output = compare(resume=folder).finish()
    assert code == 0, output

    first, second = (load(path) for path in (whole.folder, folder))
    assert not second.partial
    assert len(second.environment["parts"]) == 2
    assert len(list((folder / "set-aside").iterdir())) == 1
    assert [path.name for path in sorted(folder.glob("cells/*"))] == [
        path.name for path in sorted(whole.folder.glob("cells/*"))
    ]
    for one, other in zip(first.cells, second.cells, strict=True):
        assert one.complete
        assert other.complete
        assert sent(one) == sent(other)
    summary, expected = analyse(second), analyse(first)
    assert [gate["id"] for gate in summary["gates"]] == [gate["id"] for gate in expected["gates"]]
    for passed in ({gate["id"]: gate["passed"] for gate in found["gates"]} for found in (summary, expected)):
        assert passed["cells"]
        assert passed["answered"]
        assert passed["same-work"]
    assert [level["level"] for level in summary["levels"]] == [level["level"] for level in expected["levels"]]
    for level in summary["levels"]:
        assert all(figures["memory"]["kv"]["samples"] > 0 for figures in level["targets"].values())
    assert "Partial." not in (folder / "report.html").read_text()


def sent(cell: CellResult) -> list[tuple[int, str, int | None, int | None]]:
    """What was asked for and came back, without its times."""
    return sorted((r.index, r.phase, r.prompt_tokens, r.output_tokens) for r in cell.records)


def test_servers_under_load_together_are_told_so_and_a_killed_pair_runs_anew(compare: Callable[..., Compare]) -> None:
    targets = [{"name": "one", "kind": "hf"}, {"name": "paged", "kind": "hf", "args": "--engine continuous"}]
    options = {"targets": targets, "together": True, "levels": [3], "repeats": 2, "vllm_args": "", "min_seconds": 2}
    run = compare(max_model_len=256, **options)
    run.wait_for_records("paged")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.finish(90)[0] == 130
    resumed = compare(resume=run.folder)
    code, output = resumed.finish()
    assert code == 0, output
    assert len(list((run.folder / "set-aside").iterdir())) == 2
    cells = load(run.folder).cells
    assert [cell.target for cell in cells] == ["one", "paged", "paged", "one"]
    for pair in (cells[:2], cells[2:]):
        # Each was sent its first request before the other had its last answer.
        assert max(cell.requests.sent_ns.min() for cell in pair) < min(cell.requests.end_ns.max() for cell in pair)
        assert pair[0].requests.shared_ns == pair[1].requests.shared_ns
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["together"]
    gates = {gate["id"]: gate for gate in summary["gates"]}
    assert gates["same-work"]["passed"]
    # The faster one goes on until the slower has its requests.
    assert gates["together"]["found"][0]["share"] > 0.6
    assert "all servers under load at once" in summary["headline"]
    for figures in summary["levels"][0]["targets"].values():
        assert figures["memory"]["kv"]["samples"] > 0
    assert "together" in line(describe(run.folder))


def test_one_server_at_a_time_and_a_search_for_the_highest_rate(compare: Callable[..., Compare]) -> None:
    targets = [{"name": "sequential", "kind": "hf"}, {"name": "batch", "kind": "hf", "args": "--engine batch"}]
    limits = {"ttft_seconds": 0.5}
    options = {"resident": "one", "max_model_len": 256, "arrival": "poisson", "levels": [8], "limits": limits}
    options |= {"attainment": 0.9, "saturation": True, "duration_seconds": 1.5, "ramp_seconds": 0.2}
    run = compare(targets=targets, output_mean=30, vllm_args="", **options)
    code, output = run.finish(500)
    assert code == 0, output
    cells = load(run.folder).cells
    for name in ("sequential", "batch"):
        searched = [cell for cell in cells if cell.target == name and cell.search]
        assert 1 <= len(searched) <= 12
        assert all(cell.complete for cell in searched)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["saturation"]["sequential"]["rate"] > 0
    assert {gate["id"]: gate["passed"] for gate in summary["gates"]}["cells"]
