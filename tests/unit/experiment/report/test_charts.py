"""The charts of a report: which there are, what they hold, and that they stay small."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment import report
from experiment.analysis.analyse import analyse
from experiment.analysis.results import JSON, load
from experiment.report import caches, charts, layers, look, tables
from experiment.report.charts import NO_MEAN
from experiment.report.quantiles import POINTS, quantiles, thinned
from experiment.words import Words
from tests.unit.experiment.analysis.test_analyse import LADDER, make, requests
from tests.unit.experiment.folders import make_folder, make_plan, write_kv

CLOSED = {"throughput", "latency", "ttft", "tpot", "e2e", "cdf-ttft", "cdf-tpot", "cdf-e2e", "tradeoff"}
OPEN = {name.replace("e2e", "response") for name in CLOSED} | {"normalized", "goodput"}


def drawn(folder: Path) -> dict[str, str]:
    """The charts in English; drawing is what takes time here."""
    results = load(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "LANGUAGES", ("en",))
        return report.draw(results, analyse(results))["en"]


def open_loop(folder: Path, **plan: Any) -> Path:
    cells = [(name, level, repeat, False, requests(0.1, level)) for name in ("one", "vllm") for level in (1, 2)
             for repeat in (1, 2)]  # fmt: skip
    search = [("vllm", rate, 1, True, requests(ttft)) for rate, ttft in ((1.0, 0.1), (2.0, 0.1), (4.0, 0.9))]
    return make(folder, [*cells, *search], levels=[1, 2], repeats=2, workload="alpaca", **plan)


def test_a_closed_loop_has_its_charts_and_no_others(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_plan(levels=[1, 2], repeats=1))
    assert drawn(folder).keys() == CLOSED
    write_kv(folder)
    assert drawn(folder).keys() == CLOSED | {"kv", "waste", "held", "memory", "memory-narrow"}


def test_an_open_loop_has_normalized_latency_and_goodput_and_the_search(tmp_path: Path) -> None:
    assert drawn(open_loop(tmp_path)).keys() == OPEN | {"saturation"}


def test_an_axis_of_rates_has_each_rate_as_it_was_given(tmp_path: Path) -> None:
    rates = (0.5, 16, 32, 64)
    cells = [(name, rate, 1, False, requests(0.1, rate)) for name in ("one", "vllm") for rate in rates]
    chart = drawn(make(tmp_path, cells, levels=list(rates), repeats=1, workload="alpaca"))["normalized"]
    assert [rate for rate in ("0.5", "16", "32", "64") if f">{rate}</text>" in chart] == ["0.5", "16", "32", "64"]


def test_an_arrow_is_over_latencies_that_have_no_mean(tmp_path: Path) -> None:
    steady = [("vllm", level, 1, False, requests(0.1, level)) for level in (1, 2)]
    waiting = [("one", level, 1, False, requests(ttft, level)) for level, ttft in ((1, 0.1), (2, 30))]
    charts = drawn(make(tmp_path, [*steady, *waiting], levels=[1, 2], repeats=1, workload="alpaca"))
    arrows = {name: chart.count(NO_MEAN) for name, chart in charts.items()}
    assert arrows == dict.fromkeys(charts, 0) | {"normalized": 1, "response": 1, "ttft": 1, "tpot": 1, "latency": 2}


def test_without_limits_there_is_no_chart_of_goodput(tmp_path: Path) -> None:
    assert "goodput" not in drawn(open_loop(tmp_path, limits={}))


def test_the_ladder_has_a_row_for_each_step(tmp_path: Path) -> None:
    cells = [(one["name"], 1.0, 1, False, requests(0.1)) for one in LADDER]
    chart = drawn(make(tmp_path, cells, targets=LADDER))["ladder"]
    assert re.findall(r">([^<>]* → [^<>]*)<", chart) == [
        "one → batch",
        "batch → paged",
        "paged → vLLM",
    ]
    assert chart.count(">1.00<") == 3  # none is faster


def test_every_chart_is_a_file_in_both_languages_and_a_picture(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_plan(levels=[1], repeats=1))
    report.write(folder)
    names = {path.name for path in (folder / "charts" / "en").iterdir()}
    assert names == {f"{name}.{kind}" for name in CLOSED for kind in ("svg", "png")}
    assert {path.name for path in (folder / "charts" / "zh").iterdir()} == {f"{name}.svg" for name in CLOSED}
    assert (folder / "charts" / "en" / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert "毫秒" in (folder / "charts" / "zh" / "ttft.svg").read_text(encoding="utf-8")


def test_a_table_has_every_number_of_the_summary(tmp_path: Path) -> None:
    folder = open_loop(tmp_path)
    summary = report.write(folder)
    table = pyarrow.csv.read_csv(folder / "summary.csv")
    assert table.to_pylist() == pq.read_table(folder / "summary.parquet").cast(table.schema).to_pylist()
    found = {(row["level"], row["target"], row["metric"], row["statistic"]): row["value"] for row in table.to_pylist()}
    level = summary["levels"][1]
    assert found[2, "vllm", "ttft_seconds", "p99"] == level["targets"]["vllm"]["ttft_seconds"]["p99"]
    assert found[2, "vllm", "output_throughput", "2"] == level["targets"]["vllm"]["output_throughput"][1]
    assert found[2, "vllm", "e2e_seconds_ratio", "low"] == level["ratios"]["vllm"]["e2e_seconds"]["low"]
    assert found[None, "vllm", "saturation", "rate"] == summary["saturation"]["vllm"]["rate"]
    assert found[4, "vllm", "saturation", "attainment"] == 0
    assert not any(isinstance(value, bool) for value in found.values())


def test_a_summary_without_levels_is_an_empty_table(tmp_path: Path) -> None:
    tables.write(tmp_path, {"levels": []})
    assert pq.read_table(tmp_path / "summary.parquet").num_rows == 0


@given(st.lists(st.floats(1e-6, 1e3), max_size=700))
def test_a_thinned_distribution_says_what_share_does_not_exceed_a_value(values: list[float]) -> None:
    found = thinned(np.array(values))
    assert len(found) == min(POINTS, len(values))
    for share, value in found:
        assert value in values
        assert np.mean(np.array(values) <= value) >= share - 1e-4
    assert [value for _, value in found] == sorted(value for _, value in found)
    assert not values or found[-1] == (1, max(values))


def test_failed_requests_and_those_of_the_search_are_in_no_distribution(tmp_path: Path) -> None:
    rows = list(quantiles(load(open_loop(tmp_path))))
    assert {row["level"] for row in rows} == {1, 2}
    assert {row["metric"] for row in rows} == {"ttft_seconds", "tpot_seconds", "e2e_seconds", "response_seconds"}
    own = [row["value"] for row in rows if row["metric"] == "ttft_seconds" and row["target"] == "vllm"]
    assert own == pytest.approx([0.1] * 80)  # two levels with two repeats of 20


@given(st.floats(1e-4, 1e5), st.floats(1.5, 1e6))
def test_a_logarithmic_axis_has_few_round_marks_within_its_ends(low: float, times: float) -> None:
    high = low * times
    ticks = look.log_ticks(low, high)
    assert len(ticks) >= 2
    assert ticks == sorted(ticks)
    assert all(low * 0.9 <= tick <= high * 1.1 for tick in ticks)
    assert times > 1e5 or len(ticks) <= 6


def test_hf_and_vllm_keep_their_colours_and_no_two_of_seven_targets_share_one() -> None:
    targets = ["b", "vllm", "a", "hf", "c", "d", "e"]
    frame = look.Frame(Words("en"), targets, True)
    assert len({frame.color(target) for target in targets}) == 7
    pair = look.Frame(Words("en"), ["hf", "vllm"], True)
    assert [frame.color(name) for name in pair.targets] == [pair.color(name) for name in pair.targets]


def test_the_longest_name_that_a_target_may_have_is_whole_in_a_legend() -> None:
    name = "vllm-tensor-parallel-over-two-gpus-eager"
    assert len(name) == 40
    frame = look.Frame(Words("en"), [name], True)
    chart = look.table([{"x": 1, "target": name}]).mark_point().encode(x="x:Q", **frame.by_target())
    assert f">{name}<" in look.svg(chart, "name")


def test_our_own_servers_keep_their_colours_whatever_their_place_and_none_is_that_of_a_part_of_a_cache() -> None:
    own = ["sequential", "batch", "batch-static", "continuous", "vllm"]
    whole, part = (look.Frame(Words("en"), targets, True) for targets in (own, ["x", "vllm", "continuous"]))
    assert len({whole.color(target) for target in own}) == 5
    assert [part.color(name) for name in ("vllm", "continuous")] == [whole.color(n) for n in ("vllm", "continuous")]
    both = look.Frame(Words("en"), ["sequential", "hf"], True)
    assert both.color("sequential") != both.color("hf")
    assert not {color.lower() for color in look.COLORS} & set(layers.PARTS.values())


def test_the_charts_that_lead_are_those_of_the_question() -> None:
    def lead(closed: bool, **changes: Any) -> list[str]:
        frame = look.Frame(Words("en"), ["hf", "vllm"], closed)
        names = "throughput latency kv held waste ladder normalized response saturation tradeoff goodput".split()
        return charts.lead(frame, {"levels": [], "kv_budget": None} | changes, names)

    full = {"running": {"mean": 1, "max": 1}, "capacity": {"max": 10}, "allocated": {"max": 10}}
    level = {"level": 4, "targets": {name: {"memory": {"kv": full}} for name in ("hf", "vllm")}}
    steps = [{"level": 4}]
    assert lead(True) == ["throughput", "latency", "kv"]
    assert lead(True, ladder=steps, levels=[level]) == ["ladder", "throughput", "kv"]
    assert lead(True, ladder=steps, levels=[level], kv_budget=10) == ["held", "waste", "throughput"]
    assert lead(False, levels=[level]) == ["normalized", "response", "throughput"]
    assert lead(False, saturation={"hf": {}}) == ["saturation", "tradeoff", "goodput"]


def test_one_level_is_drawn_as_bars_and_not_as_lines(tmp_path: Path) -> None:
    one = drawn(make_folder(tmp_path / "one", make_plan(levels=[1], repeats=2)))
    two = drawn(make_folder(tmp_path / "two", make_plan(levels=[1, 2], repeats=2)))
    for name in ("throughput", "latency", "ttft", "tpot", "e2e"):
        assert "mark-line" not in one[name]
        assert "mark-rect" in one[name]
        assert "mark-line" in two[name]


def test_places_in_a_chart_are_rounded_and_its_figures_are_not() -> None:
    rows = [{"x": 1 / 3, "text": "12.3456"}]
    chart = look.table(rows).mark_text().encode(x="x:Q", text="text:N")
    text = look.svg(chart, "name")
    assert ">12.3456<" in text
    assert max(len(digits) for digits in re.findall(r'transform="[^"]*?\.(\d+)', text)) == 1


def figures(memory: JSON) -> JSON:
    return {"levels": [{"level": level, "targets": {"hf": {"memory": memory}}} for level in (1, 2, 4, 8, 16)]}


def test_a_cache_in_blocks_has_no_shares_and_one_that_holds_nothing_no_bar() -> None:
    frame = look.Frame(Words("en"), ["hf"], True)
    running = {"mean": 1, "max": 1}
    blocks = {"unit": "blocks", "allocated": {"mean": 3, "max": 4}, "running": running, "parts": {}}
    assert caches.draw(frame, figures({"kv": blocks})) == {}
    assert caches.draw(frame, figures({"kv": blocks | {"allocated": {"mean": 0, "max": 0}}})) == {}
    assert caches.draw(frame, figures({})) == {}


def test_sequences_held_at_once_are_in_order_with_their_mean_and_their_most() -> None:
    def cache(mean: float, most: float) -> JSON:
        running = {"mean": mean, "max": most}
        return {"memory": {"kv": {"unit": "blocks", "allocated": {"mean": 0}, "running": running}}}

    levels = [{"level": 4, "targets": {"hf": cache(6.14, 8), "vllm": cache(20, 31)}}]
    chart = caches.draw(look.Frame(Words("en"), ["hf", "vllm"], True), {"levels": levels})["held"]
    assert re.findall(r">(HF|vLLM|[\d.]+ / \d+)<", chart) == ["vLLM", "HF", "20.0 / 31", "6.1 / 8"]
    assert "sequences held at once, 4 in flight" in chart


def test_the_first_and_the_last_of_many_levels_are_chosen() -> None:
    levels: list[JSON] = [{"level": level} for level in range(10)]
    assert [one["level"] for one in look.chosen(levels)] == [0, 4, 9]
    assert [one["level"] for one in look.chosen(levels, 1)] == [9]
    assert look.chosen(levels[:2]) == levels[:2]
    assert look.chosen([]) == []


def test_a_latency_of_zero_has_no_place_on_a_logarithmic_axis() -> None:
    zero = {"count": 1, "mean": 0, "p50": 0, "p90": 0, "p99": 0}
    level = {"level": 1, "targets": {"hf": {"tpot_seconds": zero, "output_throughput": [None]}}}
    frame = look.Frame(Words("en"), ["hf"], True)
    level["targets"]["hf"]["output_throughput_mean"] = None  # type: ignore[index]
    assert charts.draw(frame, {"levels": [level], "cells": []}, [], None) == {}
    json.dumps(level)
