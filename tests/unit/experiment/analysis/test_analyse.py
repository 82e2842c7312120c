"""Any targets, open loops, limits, the search for the saturation and the ladder: from a folder to figures."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from experiment.analysis.analyse import analyse
from experiment.analysis.results import JSON, load
from loadtest.records import Record
from tests.unit.experiment.folders import CLIENT, ENVIRONMENT, SECOND, change_json, make_record, write_records

LADDER = [
    {"name": "one", "kind": "hf", "args": ""},
    {"name": "batch", "kind": "hf", "args": "--engine batch"},
    {"name": "paged", "kind": "hf", "args": "--engine continuous"},
    {"name": "vllm", "kind": "vllm", "args": ""},
]
LIMITS = {"ttft_seconds": 0.5, "e2e_seconds": 1.5}


def requests(ttft: float, rate: float = 1.0, count: int = 20, growth: float = 0.0) -> list[Record]:
    """An open loop in which all that is sent waits so long for its first token, and each one more than the one before.

    Three more tokens come in the second after the first, or in a tenth of that.
    """
    found = []
    for index in range(count):
        sent = round(index / rate * SECOND)
        first = sent + round((ttft + growth * index) * SECOND)
        stamps = [first, *(first + part * SECOND // 30 for part in (1, 2, 3))]
        times = {"scheduled_ns": sent - SECOND // 10, "sent_ns": sent, "chunk_ns": stamps, "end_ns": stamps[-1]}
        found.append(make_record(index=index, chunk_tokens=[1] * 4, **times))
    return found


def make(folder: Path, cells: list[tuple[str, float, int, bool, list[Record]]], **plan: Any) -> Path:
    """A folder with cells of target, level, repeat, search and records."""
    for index, (target, level, repeat, search, records) in enumerate(cells, 1):
        own = folder / "cells" / f"{index:02d}-{target}-q{level:g}-r{repeat}"
        write_records_in(own, records)
        state = {"index": index, "target": target, "level": level, "repeat": repeat, "seed": 1, "search": search}
        state |= {"planned_requests": len(records), "complete": True, "start_ns": 0, "end_ns": 100 * SECOND}
        (own / "cell.json").write_text(json.dumps(state))
        (own / "client.json").write_text(json.dumps(CLIENT))
    kept = {"model": "m", "targets": LADDER[:1] + LADDER[3:], "arrival": "poisson", "levels": [1.0], "repeats": 1}
    (folder / "plan.json").write_text(json.dumps(kept | {"limits": LIMITS, "attainment": 0.9} | plan))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "status.json").write_text(json.dumps({"state": "complete", "reason": None}))
    return folder


def write_records_in(folder: Path, records: list[Record]) -> None:
    folder.mkdir(parents=True)
    write_records(folder / "records.arrow", records)


def summary(folder: Path) -> JSON:
    return analyse(load(folder))


def test_every_target_is_compared_with_the_first_one_and_the_ladder_with_its_neighbours(tmp_path: Path) -> None:
    waits = {"one": 0.8, "batch": 0.4, "paged": 0.2, "vllm": 0.1}
    cells = [(name, 1.0, repeat, False, requests(wait)) for repeat in (1, 2) for name, wait in waits.items()]
    found = summary(make(tmp_path, cells, targets=LADDER, repeats=2))
    assert (found["baseline"], found["targets"]) == ("one", list(waits))
    ratios = found["levels"][0]["ratios"]["vllm"]
    # Of goodput there is no ratio: the first had none.
    assert (ratios["goodput"]["value"], ratios["goodput"]["verdict"]) == (None, "faster")
    assert found["comparisons"] == 3 * (len(ratios) - 1)
    assert found["valid"] is True
    (level,) = found["levels"]
    ratios = {name: ratio["ttft_seconds"]["value"] for name, ratio in level["ratios"].items()}
    assert ratios == pytest.approx({"batch": 2, "paged": 4, "vllm": 8})
    steps = [(step["from"], step["to"], step["adds"]) for step in found["ladder"]]
    assert steps == [
        ("one", "batch", "batching"),
        ("batch", "paged", "continuous batching and paging"),
        ("paged", "vllm", "kernels and scheduling"),
    ]
    product = found["ladder_product"]
    assert (product["from"], product["to"], len(product["factors"])) == ("one", "vllm", 3)
    assert product["value"] == pytest.approx(level["ratios"]["vllm"]["output_throughput"]["value"])
    throughput = [figures["output_throughput_mean"] for figures in level["targets"].values()]
    assert [step["ratio"]["value"] for step in found["ladder"]] == pytest.approx(
        [after / before for before, after in pairwise(throughput)]
    )


@pytest.mark.parametrize("missing", ["one", "paged"])
def test_a_ladder_with_a_missing_cell_is_that_of_the_repeats_that_all_rungs_ran(tmp_path: Path, missing: str) -> None:
    waits = {"one": (0.8, 0.7), "batch": (0.4, 0.9), "paged": (0.2, 0.3), "vllm": (0.1, 0.5)}
    cells = [(name, 1.0, repeat, False, requests(wait[repeat - 1], growth=0.05 * repeat))
             for repeat in (1, 2) for name, wait in waits.items() if (name, repeat) != (missing, 2)]  # fmt: skip
    found = summary(make(tmp_path, cells, targets=LADDER, repeats=2))
    assert [len(step["ratio"]["repeats"]) for step in found["ladder"]] == [1, 1, 1]
    product, whole = found["ladder_product"], found["levels"][0]["ratios"]["vllm"]["output_throughput"]
    assert product["value"] == pytest.approx(whole["repeats"][0])
    assert (product["low"], product["verdict"]) == (None, "invalid")
    # The headline tells all repeats of the two that it compares, which without the baseline is the same one.
    assert (product["value"] == pytest.approx(whole["value"])) is (missing == "one")


def test_figures_of_an_open_loop_count_from_the_schedule_and_are_held_against_the_limits(tmp_path: Path) -> None:
    slow = [*requests(0.4, count=10), make_record(index=10, sent_ns=10 * SECOND, end_ns=11 * SECOND, error="timeout")]
    found = summary(make(tmp_path, [("one", 1.0, 1, False, slow), ("vllm", 1.0, 1, False, requests(0.6))]))
    one, vllm = (found["levels"][0]["targets"][name] for name in ("one", "vllm"))
    assert one["response_seconds"]["mean"] == pytest.approx(0.1 + 0.4 + 0.1)
    assert one["normalized_latency"] == pytest.approx(0.6 / 4)
    assert (one["attainment"], vllm["attainment"]) == (pytest.approx(10 / 11), 0)
    # Ten were good, in the time from 0 until the last one, sent at 10 s, failed.
    assert one["goodput"] == pytest.approx(10 / 11)
    assert vllm["goodput"] == 0
    ratio = found["levels"][0]["ratios"]["vllm"]["goodput"]
    assert (ratio["value"], ratio["low"]) == (0, None)
    assert found["limits"] == LIMITS


def test_a_server_that_is_never_within_the_limits_is_slower_in_goodput(tmp_path: Path) -> None:
    waits = {"one": 0.1, "vllm": 0.6}
    cells = [(name, 1.0, repeat, False, requests(wait)) for repeat in (1, 2) for name, wait in waits.items()]
    found = summary(make(tmp_path, cells, repeats=2))["levels"][0]["ratios"]["vllm"]["goodput"]
    assert (found["value"], found["low"], found["verdict"], found["second"]) == (0, None, "slower", 0)


def test_requests_of_the_warm_up_are_not_within_the_limits_for_the_measured(tmp_path: Path) -> None:
    early = [replace(one, phase="warmup") for one in requests(0.1, count=5)]
    late = [replace(one, index=one.index + 5) for one in requests(0.6, count=5)]
    cells = [(name, 1.0, 1, False, [*early, *late]) for name in ("one", "vllm")]
    assert summary(make(tmp_path, cells))["levels"][0]["targets"]["one"]["goodput"] == 0


def test_without_limits_there_is_no_goodput_and_no_attainment(tmp_path: Path) -> None:
    cells = [(name, 1.0, 1, False, requests(0.1)) for name in ("one", "vllm")]
    found = summary(make(tmp_path, cells, limits={}))["levels"][0]["targets"]["one"]
    assert (found["goodput"], found["attainment"]) == (None, None)


def test_a_search_is_told_what_its_cells_came_to_and_they_belong_to_no_level(tmp_path: Path) -> None:
    cells = [(name, 1.0, 1, False, requests(0.1)) for name in ("one", "vllm")]
    searched = [(2.0, 0.1), (4.0, 0.9), (2.83, 0.2), (3.36, 0.8), (2.85, 0.7)]
    cells += [("vllm", rate, 1, True, requests(wait, rate)) for rate, wait in searched]
    folder = make(tmp_path, cells)
    # One that can no longer meet its limits is stopped.
    change_json(folder / "cells" / "04-vllm-q4-r1" / "client.json", complete=False)
    found = summary(folder)
    vllm = found["saturation"]["vllm"]
    assert list(found["saturation"]) == ["vllm"]
    assert vllm["rate"] == 2.83
    assert (vllm["missed"], vllm["above"], vllm["exact"]) == (2.85, None, True)
    assert [cell["met"] for cell in vllm["cells"]] == [True, False, True, False, False]
    # So few requests that all met the limits do not show that 99 % do.
    assert vllm["unsure"] == [2.83]
    assert all(cell["attainment_low"] <= cell["attainment"] <= cell["attainment_high"] for cell in vllm["cells"])
    assert [level["level"] for level in found["levels"]] == [1.0]
    assert (found["valid"], len(found["cells"])) == (True, 7)


def drifting(folder: Path, arrival: str) -> JSON:
    cells = [
        ("one", 1.0, 1, False, requests(0.1, count=60, growth=0.05)),
        ("vllm", 1.0, 1, False, requests(0.1, count=60)),
    ]
    return summary(make(folder, cells, arrival=arrival))


def test_a_closed_loop_that_drifts_makes_the_run_invalid(tmp_path: Path) -> None:
    found = drifting(tmp_path, "closed")
    (gate,) = [gate for gate in found["gates"] if gate["passed"] is False]
    assert gate["id"] == "no-drift"
    (rose,) = gate["found"]
    assert (rose["id"], rose["cell"], rose["metric"]) == ("rose", 1, "ttft_seconds")
    assert rose["change"] > 1
    assert found["levels"][0]["targets"]["one"]["unstable"] == [1]


def test_a_queue_that_grows_in_an_open_loop_takes_the_verdicts_on_latency_alone(tmp_path: Path) -> None:
    found = drifting(tmp_path, "poisson")
    assert found["valid"] is True
    told = next(gate["found"] for gate in found["gates"] if gate["id"] == "no-drift")
    assert [one["id"] for one in told] == ["over_saturated", "rose"]
    verdicts = {metric: ratio["verdict"] for metric, ratio in found["levels"][0]["ratios"]["vllm"].items()}
    assert {metric for metric, verdict in verdicts.items() if verdict == "invalid"} == {
        *("ttft_seconds", "tpot_seconds", "e2e_seconds", "response_seconds", "normalized_latency")
    }
    assert found["cells"][0]["drift"]["ttft_seconds"] > 1
    assert found["cells"][1]["drift"] is None


def test_a_cell_of_an_open_loop_in_which_requests_wait_for_most_of_the_time_tells_no_latency(tmp_path: Path) -> None:
    cells = [("one", 1.0, 1, False, requests(8, count=20)), ("vllm", 1.0, 1, False, requests(0.1, count=20))]
    found = summary(make(tmp_path, cells))
    gate = next(gate for gate in found["gates"] if gate["id"] == "no-drift")
    assert (found["valid"], gate["passed"]) == (True, None)
    (waited,) = [one for one in gate["found"] if one["id"] == "waited"]
    assert (waited["cell"], waited["share"]) == (1, pytest.approx(8 / 19, rel=0.05))
    figures = found["levels"][0]["targets"]
    assert (figures["one"]["short"], figures["vllm"]["short"]) == ([1], [])
    assert figures["one"]["offered_rate"] == pytest.approx(1)
    ratios = found["levels"][0]["ratios"]["vllm"]
    assert ratios["ttft_seconds"]["verdict"] == "invalid"
    assert ratios["output_throughput"]["verdict"] != "invalid"


def test_gates_have_names_of_their_own(tmp_path: Path) -> None:
    found = summary(make(tmp_path, [("one", 1.0, 1, False, requests(0.1))]))
    names = [gate["id"] for gate in found["gates"]]
    first = ["cells", "answered", "tokens-counted", "same-work", "no-borrowed-cache", "no-drift"]
    assert names == [*first, "client-complete", "client-fast"]
    assert found["gates"][5]["found"] == [{"id": "no_trend", "judged": 1, "cells": 1}]
    assert found["gates"][0]["found"] == [{"id": "missing", "target": "vllm", "level": 1.0, "repeat": 1}]
