"""From a result folder to figures and verdicts, and what makes a comparison invalid."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from experiment.analysis.analyse import analyse
from experiment.analysis.results import JSON, ResultError, load, write_tables
from experiment.plan.plan import Cell, Plan
from experiment.report import frame_of, sentence
from experiment.words import Words, findings
from loadtest.keeper import summarize
from loadtest.records import Record
from monitor.timeline import Series
from tests.unit.experiment.folders import (
    CLIENT,
    PROCESS,
    SECOND,
    SPEEDS,
    change_json,
    change_records,
    make_folder,
    make_plan,
    timeline,
    write_kv,
    write_timeline,
)

FIRST = "01-hf-c2-r1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def summary_of(folder: Path) -> JSON:
    return analyse(load(folder))


def verdicts(summary: JSON) -> set[str]:
    ratios = [ratio for level in summary["levels"] for one in level["ratios"].values() for ratio in one.values()]
    return {ratio["verdict"] for ratio in ratios if ratio and "verdict" in ratio}


def failed_gates(summary: JSON) -> list[str]:
    english, failed = Words("en"), [gate for gate in summary["gates"] if gate["passed"] is False]
    return [f"{findings.rule(english, gate)}: {findings.found(english, gate, 'closed')}" for gate in failed]


def headline(summary: JSON) -> str:
    return sentence.verdict(frame_of(summary, "en"), summary)


def changed(record: Record, **changes: Any) -> Record:
    return Record(**{name: getattr(record, name) for name in record.__slots__} | changes)


def failed(records: list[Record], index: int) -> list[Record]:
    return [changed(r, error="timeout") if r.index == index else r for r in records]


def longer(records: list[Record], index: int) -> list[Record]:
    return [changed(r, output_tokens=5, chunk_tokens=[1, 1, 1, 2]) if r.index == index else r for r in records]


def test_a_run_without_fault_is_valid_and_vllm_is_twice_as_fast(folder: Path) -> None:
    summary = summary_of(folder)
    assert failed_gates(summary) == []
    assert summary["valid"] is True
    assert verdicts(summary) == {"faster"}
    (level,) = summary["levels"]
    assert level["ratios"]["vllm"]["ttft_seconds"]["value"] == pytest.approx(2)
    assert level["ratios"]["vllm"]["output_throughput"]["value"] == pytest.approx(2)
    assert level["ratios"]["vllm"]["output_throughput"]["repeats"] == pytest.approx([2, 2])


def test_figures_of_a_server_are_those_of_its_measured_requests(folder: Path) -> None:
    (level,) = summary_of(folder)["levels"]
    hf = level["targets"]["hf"]
    assert (hf["requests"], hf["failed"]) == (2 * 4, {})
    # Each request takes 2 s for its four tokens; two are in flight, so that four tokens come a second.
    assert hf["output_throughput"] == [4.0, 4.0]
    assert (hf["ttft_seconds"]["mean"], hf["e2e_seconds"]["p99"], hf["tpot_seconds"]["p50"]) == (0.5, 2.0, 0.5)


@pytest.mark.parametrize(("state", "start"), [("complete", "At concurrency 2 "), ("partial", "Partial")])
def test_the_headline_says_whether_the_run_is_partial(tmp_path: Path, state: str, start: str) -> None:
    summary = summary_of(make_folder(tmp_path, state=state))
    assert headline(summary).startswith(start)
    assert summary["state"] == state


def test_a_run_that_was_killed_is_partial(tmp_path: Path) -> None:
    assert load(make_folder(tmp_path, state="running")).partial


@pytest.mark.parametrize(
    ("growth", "parts"),
    [
        # 4 tokens/s of HF in both repeats, 12 and 12.4 of vLLM.
        (0.1, ("At concurrency 2 ", "3.05 times (95 % interval 2.48 to 3.76)", "12 against 4.")),
        # 8 and 16 of vLLM: two repeats that differ so much say nothing.
        (2, ("2.83 times (95 % interval 0.03 to 231.22)", "12 against 4, which is no detectable difference.")),
    ],
)
def test_the_headline_shows_the_interval_and_whether_it_says_anything(
    tmp_path: Path, growth: float, parts: tuple[str, ...]
) -> None:
    def speed(cell: Cell) -> float:
        return 1.0 if cell.target == "hf" else (3.0 if growth < 1 else 2.0) + growth * (cell.repeat - 1)

    told = headline(summary_of(make_folder(tmp_path, speed=speed)))
    for part in parts:
        assert part in told
    assert told.endswith(parts[-1])


def test_the_headline_of_one_repeat_has_no_interval(tmp_path: Path) -> None:
    assert "2.00 times the output tokens" in headline(summary_of(make_folder(tmp_path, make_plan(repeats=1))))


def test_the_headline_is_of_the_highest_level_that_both_ran(tmp_path: Path) -> None:
    plan = make_plan(concurrency=[2, 8, 1], repeats=1)
    folder = make_folder(tmp_path, plan, state="partial")
    shutil.rmtree(folder / "cells" / "04-vllm-c8-r1")
    summary = summary_of(folder)
    assert "at concurrency 2 " in headline(summary)
    lonely = next(level for level in summary["levels"] if level["level"] == 8)
    assert list(lonely["targets"]) == ["hf"]
    assert not lonely["ratios"]


def beside(plan: Plan, folder: Path, slower: float) -> Path:
    """A run whose two servers began at the same moment, the first of them so many times slower than one token a s."""
    make_folder(folder, plan, speed=lambda cell: 1 / slower if cell.target == "hf" else 1.0)
    for group in plan.groups():
        for cell in group:
            back = (cell.index - group[0].index) * 1000 * SECOND
            change_records(folder, cell.name, partial(sooner, ns=back))
    return folder


def sooner(records: list[Record], ns: int) -> list[Record]:
    def one(record: Record) -> Record:
        stamps = [stamp - ns for stamp in record.chunk_ns]
        return changed(record, sent_ns=record.sent_ns - ns, end_ns=record.end_ns - ns, chunk_ns=stamps)

    return [one(record) for record in records]


def test_of_servers_under_load_together_only_the_time_in_which_all_were_is_measured(tmp_path: Path) -> None:
    plan = make_plan(levels=[2], requests=12, repeats=1, together=True)
    summary = summary_of(beside(plan, tmp_path, slower=2))
    hf, vllm = summary["levels"][0]["targets"].values()
    # vLLM sends a request a second, 15 in all, and HF one in two: it had sent its first measured one after 4 s, and
    # when vLLM's load fell after 15 s it had sent 6 of its 12.
    assert (hf["requests"], vllm["requests"]) == (6, 10)
    assert hf["output_throughput"] == pytest.approx([2], rel=0.1)
    assert vllm["output_throughput"] == pytest.approx([4], rel=0.1)
    (gate,) = [gate for gate in summary["gates"] if gate["id"] == "together"]
    assert gate["passed"]
    assert headline(summary).startswith("At concurrency 2, all servers under load at once, vLLM made 2.00 times")
    assert next(gate for gate in summary["gates"] if gate["id"] == "same-work")["passed"]


def test_servers_that_were_never_under_load_together_make_the_run_invalid(tmp_path: Path) -> None:
    plan = make_plan(levels=[2], requests=4, repeats=1, together=True)
    summary = summary_of(beside(plan, tmp_path, slower=50))
    assert "no request while all were under load" in "".join(failed_gates(summary))
    assert summary["valid"] is False


def test_a_level_that_no_server_ran_is_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_plan(concurrency=[1, 2], repeats=1), state="partial")
    for name in ("03-hf-c2-r1", "04-vllm-c2-r1"):
        shutil.rmtree(folder / "cells" / name)
    assert [level["level"] for level in summary_of(folder)["levels"]] == [1]


def test_a_run_in_which_nothing_was_measured_compares_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, state="partial")
    shutil.rmtree(folder / "cells")
    (folder / "cells").mkdir()
    summary = summary_of(folder)
    assert headline(summary).startswith("Not valid: no comparison")
    assert (summary["levels"], summary["cells"], summary["valid"]) == ([], [], False)


def test_a_folder_of_which_only_the_report_was_kept_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    shutil.rmtree(folder / "cells")
    with pytest.raises(ResultError, match="cells/ is missing, of which all figures are made"):
        load(folder)


def test_a_server_that_ran_twice_is_compared_only_where_the_other_ran_too(folder: Path) -> None:
    shutil.rmtree(folder / "cells" / "03-vllm-c2-r2")
    (level,) = summary_of(folder)["levels"]
    assert len(level["ratios"]["vllm"]["output_throughput"]["repeats"]) == 1


def lose_client(folder: Path) -> None:
    (folder / "cells" / FIRST / "client.json").unlink()


def lose_record(folder: Path) -> None:
    # On both servers, so that the work is equal and only the plan tells.
    for name in (FIRST, "02-vllm-c2-r1"):
        change_records(folder, name, lambda records: [r for r in records if r.index != 3])


def lose_warmup_record(folder: Path) -> None:
    for name in (FIRST, "02-vllm-c2-r1"):
        change_records(folder, name, lambda records: records[1:])


def lose_cell(folder: Path) -> None:
    shutil.rmtree(folder / "cells" / FIRST)


def lose_repeat(folder: Path) -> None:
    shutil.rmtree(folder / "cells" / "03-vllm-c2-r2")
    shutil.rmtree(folder / "cells" / "04-hf-c2-r2")


def repeat_record(folder: Path) -> None:
    change_records(folder, FIRST, lambda records: [*records[:-1], records[0]])


def cut_cell(folder: Path) -> None:
    change_json(folder / "cells" / FIRST / "cell.json", complete=False)


def fail_request(folder: Path) -> None:
    change_records(folder, FIRST, lambda records: failed(records, 3))


def do_other_work(folder: Path) -> None:
    change_records(folder, FIRST, lambda records: longer(records, 3))


def judge_client(folder: Path, **figures: Any) -> None:
    """Let the load generator judge itself by other figures."""
    process = PROCESS | figures
    path = folder / "cells" / FIRST / "client.json"
    path.write_text(json.dumps({"complete": True, **summarize([process], lost=[], calibrated=1000)}))


def burn_client(folder: Path) -> None:
    judge_client(folder, cpu_share=0.95)


def delay_client(folder: Path) -> None:
    judge_client(folder, loop_lag_p99_seconds=0.2)


def send_late(folder: Path) -> None:
    judge_client(folder, send_lateness_p99_seconds=0.5)


def outrun_calibration(folder: Path) -> None:
    judge_client(folder, chunks_per_second_max=2000)


def lose_worker(folder: Path) -> None:
    path = folder / "cells" / FIRST / "client.json"
    path.write_text(json.dumps({"complete": True, **summarize([], lost=[2], calibrated=None)}))


def keep_cache(folder: Path) -> None:
    path = folder / "cells" / FIRST / "cell.json"
    change_json(path, prefix_cache={"hf": "on"}, prefix_tokens={"queries": 100, "hits": 16})


def keep_cache_in_silence(folder: Path) -> None:
    change_json(folder / "cells" / FIRST / "cell.json", prefix_cache={"hf": "on"}, prefix_tokens=None)


def count_no_tokens(folder: Path) -> None:
    change_records(folder, FIRST, lambda records: [changed(r, token_source="unknown") for r in records])  # noqa: S106


def stop_client(folder: Path) -> None:
    change_json(folder / "cells" / FIRST / "client.json", complete=False)


@pytest.mark.parametrize(
    ("harm", "rule"),
    [
        (
            lose_client,
            "the load generator was fast enough, by its own check: no self-check in",
        ),
        (
            lose_client,
            "the load generator sent all requests and waited for every answer: no self-check in cell 1",
        ),
        (lose_record, "every planned cell"),
        (lose_warmup_record, "every planned cell"),
        (repeat_record, "every planned cell"),
        (lose_cell, "every planned cell"),
        (lose_repeat, "every planned cell"),
        (cut_cell, "every planned cell"),
        (fail_request, "every request was answered: 1 timeout"),
        (do_other_work, "the same work: vLLM, 2 in flight, repeat 1, request 3: other token counts"),
        (
            burn_client,
            "fast enough, by its own check: cell 1: cpu_share: 0.95: at most 0.8",
        ),
        (delay_client, "cell 1: loop_lag_p99_seconds: 0.2: at most 0.01"),
        (send_late, "cell 1: send_lateness_p99_seconds: 0.5: at most 0.01"),
        (outrun_calibration, "cell 1: chunks_per_second_max: 2000: at most 1000"),
        (lose_worker, "cell 1: lost_workers: 2: what they had not ended has no record"),
        (keep_cache, "prompts of another cell in a prefix cache: HF: its prefix cache was on and could not be emptied"),
        (keep_cache_in_silence, "could not be emptied before cell 1, and held tokens of their prompts or does not say"),
        (count_no_tokens, "counted their output tokens: of 7 answers nobody knows how many tokens they have"),
        (stop_client, "sent all requests and waited for every answer: not in cell 1"),
    ],
)
def test_one_fault_makes_every_verdict_invalid_and_says_which_rule_failed(folder: Path, harm: Any, rule: str) -> None:
    harm(folder)
    summary = summary_of(folder)
    assert any(rule in gate for gate in failed_gates(summary)), failed_gates(summary)
    assert summary["valid"] is False
    assert verdicts(summary) == {"invalid"}
    assert headline(summary).startswith("Not valid: ")


@pytest.mark.parametrize(
    ("state", "tokens", "passed", "told"),
    [
        ("off", {"queries": 0, "hits": 0}, True, "none has one that is on"),
        ("on", {"queries": 100, "hits": 0}, True, "HF: it was on, and no token of a prompt was found in it"),
        ("reset", {"queries": 100, "hits": 25}, True, "HF: it was emptied before each cell, and within the cells 25%"),
        ("unknown", None, None, "HF does not say whether it has a prefix cache, in cell 1"),
        ("gone", None, None, "HF does not say whether it has a prefix cache, in cell 1"),
    ],
)
def test_a_prefix_cache_that_lent_nothing_or_says_nothing_fails_no_rule(
    folder: Path, state: str, tokens: JSON | None, passed: bool | None, told: str
) -> None:
    kept = {} if state == "gone" else {"hf": state}
    change_json(folder / "cells" / FIRST / "cell.json", prefix_cache=kept, prefix_tokens=tokens)
    summary = summary_of(folder)
    (gate,) = [gate for gate in summary["gates"] if gate["id"] == "no-borrowed-cache"]
    assert gate["passed"] is passed
    assert findings.found(Words("en"), gate, "closed").startswith(told)
    assert summary["valid"] is True
    known = {"state": "unknown" if state == "gone" else state, **(tokens or {"queries": None, "hits": None})}
    assert summary["cells"][0]["prefix_cache"] == known


def test_tokens_that_were_counted_by_a_fallback_are_said(folder: Path) -> None:
    count = {"token_source": "max_tokens"}
    change_records(folder, FIRST, lambda records: [changed(r, **count) for r in records])
    summary = summary_of(folder)
    (gate,) = [gate for gate in summary["gates"] if gate["id"] == "tokens-counted"]
    assert (gate["passed"], gate["found"]) == (None, [{"id": "fallback", "count": 7}])
    assert summary["valid"] is True


def test_cells_that_are_too_short_for_a_trend_are_not_judged(folder: Path) -> None:
    summary = summary_of(folder)
    (gate,) = [gate for gate in summary["gates"] if gate["id"] == "no-drift"]
    assert gate["passed"] is None
    assert [one["id"] for one in gate["found"]] == ["too_short", "too_short", "no_trend"]
    assert summary["valid"] is True


def test_a_fault_at_one_level_makes_the_verdicts_at_all_levels_invalid(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_plan(concurrency=[1, 2], repeats=1))
    change_records(folder, "01-hf-c1-r1", lambda records: failed(records, 3))
    summary = summary_of(folder)
    assert len(summary["levels"]) == 2
    assert verdicts(summary) == {"invalid"}


def test_a_failed_request_is_counted_and_has_no_latency(folder: Path) -> None:
    fail_request(folder)
    (level,) = summary_of(folder)["levels"]
    hf = level["targets"]["hf"]
    assert (hf["requests"], hf["failed"], hf["ttft_seconds"]["count"]) == (8, {"timeout": 1}, 7)


def test_a_client_that_was_not_let_first_is_hinted_at(folder: Path) -> None:
    change_json(folder / "cells" / FIRST / "client.json", goes_first=False)
    found = [one["id"] for gate in summary_of(folder)["gates"] for one in gate["found"]]
    assert "not_first" in found


def test_a_cell_that_was_killed_ends_with_its_last_record(folder: Path) -> None:
    change_json(folder / "cells" / FIRST / "cell.json", complete=False, end_ns=None)
    cell = load(folder).cells[0]
    assert cell.end_ns == max(record.end_ns for record in cell.records)
    assert cell.complete is False


def test_cells_are_read_in_the_order_in_which_they_ran(folder: Path) -> None:
    cells = load(folder).cells
    assert [(cell.target, cell.repeat) for cell in cells] == [("hf", 1), ("vllm", 1), ("vllm", 2), ("hf", 2)]
    assert cells[0].client == CLIENT


def test_a_server_that_the_monitor_knows_by_another_name_is_the_target_s(tmp_path: Path) -> None:
    urls = [{"name": name, "kind": "url", "url": "http://a", "server": server} for name, server in
            (("hf", "vllm"), ("vllm", "My Server"))]  # fmt: skip
    folder = make_folder(tmp_path, make_plan(targets=urls))
    pss = {Series("host_pss_bytes", server=name): [1.0] for name in ("vllm", "My Server", "monitor")}
    write_timeline(folder / "timeline" / "1.arrow", timeline(pss | {Series("gpu_memory_used_bytes", gpu="0"): [2.0]}))
    found = load(folder).timeline
    assert found is not None
    assert found["server"].to_pylist() == ["hf", "vllm", "monitor", None]


def test_pieces_of_the_timeline_are_put_together(folder: Path) -> None:
    pss = Series("host_pss_bytes", server="hf")
    whole = timeline({pss: [1.0, 2.0], Series("host_pss_bytes", server="vllm"): [3.0, 4.0]})
    write_timeline(folder / "timeline" / "1.arrow", whole.slice(0, 2))
    write_timeline(folder / "timeline" / "2.arrow", whole.slice(2))
    table = load(folder).timeline
    assert table is not None
    assert table["value"].to_pylist() == [1.0, 3.0, 2.0, 4.0]


def test_a_run_without_a_timeline_has_none(folder: Path) -> None:
    assert load(folder).timeline is None


def test_tables_hold_every_request_and_every_sample(folder: Path) -> None:
    write_timeline(folder / "timeline" / "1.arrow", timeline({Series("host_pss_bytes", server="hf"): [1.0, 2.0]}))
    write_tables(load(folder))
    rows = pq.read_table(folder / "records.parquet").to_pylist()
    assert len(rows) == 4 * 7
    assert {(row["cell"], row["target"], row["repeat"]) for row in rows} == {
        (1, "hf", 1),
        (2, "vllm", 1),
        (3, "vllm", 2),
        (4, "hf", 2),
    }
    assert pq.read_table(folder / "timeline.parquet")["value"].to_pylist() == [1.0, 2.0]


def test_records_have_the_plans_name_of_their_target(tmp_path: Path) -> None:
    targets = [{"name": name, "kind": "hf"} for name in ("hf-1-gpu", "hf-2-gpus")]
    folder = make_folder(tmp_path, make_plan(targets=targets), speed=lambda _: 1.0)
    write_tables(load(folder))
    rows = pq.read_table(folder / "records.parquet").to_pylist()
    assert {(row["cell"], row["target"]) for row in rows} == {
        *((cell, "hf-1-gpu") for cell in (1, 4)),
        *((cell, "hf-2-gpus") for cell in (2, 3)),
    }


def test_memory_is_in_the_figures_of_each_server_and_level_and_of_each_cell(folder: Path) -> None:
    write_kv(folder)
    series = {Series("host_pss_bytes", server="hf"): [5.0] * 5, Series("host_pss_bytes", server="vllm"): [7.0] * 5}
    write_timeline(folder / "timeline" / "1.arrow", timeline(series, step_ns=1001 * 10**9))
    summary = summary_of(folder)
    (level,) = summary["levels"]
    hf, vllm = (level["targets"][target]["memory"] for target in ("hf", "vllm"))
    assert hf["host"] == {"held": {"mean": 5.0, "max": 5.0}}
    assert hf["kv"]["parts"]["live"]["share"] == [0.6, 0.6]
    assert (vllm["kv"]["live_source"], vllm["kv"]["unit"]) == ("records", "bytes")
    assert summary["cells"][0]["kv_samples"]["broken"] == 0
    assert summary["cells"][0]["kv_samples"]["samples_per_second"] == pytest.approx(10)
    write_tables(load(folder))
    assert set(pq.read_table(folder / "kv.parquet")["target"].to_pylist()) == {"hf", "vllm"}


def test_a_run_without_samples_of_the_kv_caches_has_none(folder: Path) -> None:
    summary = summary_of(folder)
    assert summary["levels"][0]["targets"]["hf"]["memory"] == {}
    assert summary["cells"][0]["kv_samples"] is None


def test_a_damaged_file_of_kv_samples_is_named(folder: Path) -> None:
    (folder / "kv").mkdir()
    (folder / "kv" / "hf.arrow").write_text("nonsense")
    with pytest.raises(ResultError, match=r"hf\.arrow: damaged"):
        load(folder)


def test_the_summary_is_the_same_from_the_same_records(folder: Path) -> None:
    assert json.dumps(summary_of(folder)) == json.dumps(summary_of(folder))


@pytest.mark.parametrize("name", ["plan.json", "environment.json", "status.json"])
def test_a_folder_that_lacks_a_file_of_a_run_is_refused_and_the_file_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ResultError, match=name):
        load(folder)


def test_speeds_of_the_made_folder_are_those_that_the_tests_expect() -> None:
    assert SPEEDS["vllm"] / SPEEDS["hf"] == 2
    assert Plan.model_validate(make_plan().model_dump()) == make_plan()


def test_a_cell_that_was_stopped_early_says_nothing_of_the_load_generator(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    slow = {"valid": False, "reasons": ["loop_lag_p99_seconds: 0.04: at most 0.01"]}
    last = sorted((folder / "cells").iterdir())[-1]
    change_json(last / "client.json", **slow)
    fast = [next(gate["passed"] for gate in analyse(load(folder))["gates"] if gate["id"] == "client-fast")]
    change_json(last / "cell.json", search=True, stopped_early=True)
    fast.append(next(gate["passed"] for gate in analyse(load(folder))["gates"] if gate["id"] == "client-fast"))
    assert fast == [False, True]
