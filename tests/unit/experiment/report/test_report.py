"""The page of a report: what it says, and that it needs nothing from outside."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from experiment import report
from experiment.analysis import memory
from experiment.analysis.analyse import analyse
from experiment.analysis.live import caches
from experiment.analysis.results import load
from experiment.plan.plan import Plan
from experiment.report import formats, layers, look
from experiment.words import Words
from monitor.timeline import Series
from tests.unit.experiment.analysis.test_analyse import LADDER, make, requests
from tests.unit.experiment.folders import (
    change_json,
    change_records,
    kv_row,
    kv_table,
    make_folder,
    make_plan,
    paged_row,
    timeline,
    write_kv,
    write_timeline,
)


def page(folder: Path, language: str = "en") -> str:
    """What a reader of a language sees."""
    report.write(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text[text.index(f'<main lang="{language}">') :].split("</main>")[0]


def layer_chart(folder: Path) -> str:
    results = load(folder)
    summary = analyse(results)
    return layers.draw(report.frame_of(summary, "en"), results.memory, summary)["memory"]


def make_small(folder: Path, state: str = "complete") -> Path:
    return make_folder(folder, make_plan(concurrency=[1], repeats=1), state=state)


def test_a_page_shows_the_headline_and_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    series = {Series("host_pss_bytes", server=name): [2.0**30, 2.0**31] for name in ("hf", "vllm")}
    write_timeline(tmp_path / "timeline" / "1.arrow", timeline(series, step_ns=1000 * 10**9))
    page(make_folder(tmp_path))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    english, chinese = text.split('<main lang="zh">')
    assert "At concurrency 2 vLLM made 2.00 times" in english
    assert "并发 2 时" in chinese
    assert "Partial." not in english
    assert "Not valid." not in english
    # What carries the verdict, latencies and their distributions, throughput against latency, memory, and the sketch.
    assert english.count("<figure") == chinese.count("<figure") == 2 + 3 + 3 + 1 + 1 + 1
    outside = [link for link in re.findall(r"\w*://[^\s\"'<>]*", text) if not link.startswith("http://www.w3.org/")]
    assert outside == []


def test_a_page_of_servers_under_load_together_says_so_and_marks_their_cells_as_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_plan(levels=[1], repeats=1, together=True))
    write_kv(folder)
    for path in folder.glob("cells/*/cell.json"):
        change_json(path, start_ns=1000 * 10**9, end_ns=1040 * 10**9)
    text = page(folder)
    assert "Together: all servers were under load at the same time" in text
    assert "so they shared what they run on" in text
    assert "Grey bands mark the cells" in text
    (band,) = layers._groups(analyse(load(folder))["cells"])
    assert (band["target"], band["start_ns"], band["end_ns"]) == ("", 1000 * 10**9, 1040 * 10**9)


def row(text: str, server: str) -> list[str]:
    """Cells of the server's row in the table of KV caches."""
    table = text[text.rindex("KV cache at its load</h2>") :]
    found = re.search(rf'<tr><td class="l">[^<]*</td><td><span [^>]*>{server}</span>.*?</tr>', table, re.DOTALL)
    assert found is not None
    return [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", found[0], re.DOTALL)]


@pytest.mark.usefixtures("no_charts")
def test_the_table_of_kv_caches_shows_live_and_waste_and_where_live_comes_from(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    write_kv(folder)
    text = page(folder)
    hf, vllm = row(text, "HF"), row(text, "vLLM")
    assert hf[:4] == ["1 in flight", "HF", "400.0 KiB", "40.0 KiB  peak 40.0 KiB"]
    assert hf[4:9] == ["60.0", "30.0", "10.0", "0.0", "0.0"]
    # A prompt of 7 and up to four tokens in a block of 16.
    low, high = (float(end) for end in vllm[4].split(" to "))
    assert 0 <= low <= 9 / 0.16 <= high <= 11 / 0.16
    assert vllm[5:8] == ["-", "-", "-"]
    assert "the server counts its live tokens itself" in text
    assert "vLLM: live tokens are not exported; they are between two bounds" in text
    assert "A block holds 16 tokens" in text


@pytest.mark.usefixtures("no_charts")
def test_what_is_not_known_of_a_cache_is_said(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    sent = {cell.target: (cell.start_ns + cell.end_ns) // 2 for cell in load(folder).cells}
    write_timeline(folder / "kv" / "hf.arrow", kv_table(kv_row(sent["hf"], bytes_per_token=None)))
    several = paged_row(sent["vllm"], unit="blocks", capacity=100, allocated=7, bytes_per_token=None)
    write_timeline(folder / "kv" / "vllm.arrow", kv_table(several))
    text = page(folder)
    assert row(text, "HF")[2:4] == ["100 tokens", "10 tokens  peak 10 tokens"]
    assert row(text, "vLLM")[2:9] == ["100 blocks", "7 blocks  peak 7 blocks", "-", "-", "-", "-", "-"]
    assert "how many tokens are live in them is not known" in text
    assert "HF: in tokens, because the bytes of one are not known: the model" in text


@pytest.mark.usefixtures("no_charts")
def test_of_a_server_that_ran_already_the_true_reason_is_told_why_its_cache_is_in_tokens(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    plan = json.loads((folder / "plan.json").read_text())
    plan["targets"][1]["url"] = "http://127.0.0.1:8001"
    change_json(folder / "plan.json", targets=plan["targets"])
    sent = {cell.target: (cell.start_ns + cell.end_ns) // 2 for cell in load(folder).cells}
    write_timeline(folder / "kv" / "vllm.arrow", kv_table(paged_row(sent["vllm"], bytes_per_token=None)))
    text = page(folder)
    assert "vLLM: in tokens, because the bytes of one are not known: that a server which ran already" in text
    assert "configuration could not be read" not in text


def test_a_server_that_the_chart_of_kv_bytes_leaves_out_is_named_in_its_note(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    write_kv(folder)
    assert "Not drawn:" not in page(folder)
    sent = {cell.target: (cell.start_ns + cell.end_ns) // 2 for cell in load(folder).cells}
    write_timeline(folder / "kv" / "vllm.arrow", kv_table(paged_row(sent["vllm"], bytes_per_token=None)))
    assert "Not drawn: vLLM, whose bytes are not known" in page(folder)


@pytest.mark.usefixtures("no_charts")
def test_samples_that_do_not_add_up_and_those_missed_are_counted_in_the_table(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    sent = json.loads((folder / "cells" / "01-hf-c1-r1" / "cell.json").read_text())["start_ns"] + 3 * 10**9
    rows = [kv_row(sent), kv_row(sent + 10, live=7), kv_row(sent + 20, skipped=4)]
    write_timeline(folder / "kv" / "hf.arrow", kv_table(*rows))
    text = page(folder)
    assert row(text, "HF")[-1].split() == ["3", "4", "missed", "1", "wrong"]
    assert '<span class="bad">1 wrong</span>' in text
    assert row(text, "vLLM") == ["1 in flight", "vLLM", "no samples"]


def test_every_layer_has_a_panel_and_the_cells_are_marked(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    gpu = {
        Series("gpu_memory_used_bytes", gpu="0"): [2.0**34] * 9,
        Series("gpu_process_memory_bytes", server="vllm", gpu="0"): [2.0**33] * 9,
        Series("gpu_process_memory_bytes", server="unattributed", gpu="0"): [2.0**20] * 9,
        Series("host_pss_bytes", server="hf"): [2.0**30] * 9,
    }
    write_timeline(folder / "timeline" / "1.arrow", timeline(gpu, step_ns=500 * 10**9))
    write_kv(folder)
    sampled = [kv_row(1001 * 10**9, torch_allocated_bytes=5 * 2**20, torch_reserved_bytes=6 * 2**20)]
    write_timeline(folder / "kv" / "hf.arrow", kv_table(*sampled))
    chart = layer_chart(folder)
    titles = ["Device: ", "Process: GPU", "Process: host", "Allocator: ", "KV cache of HF", "KV cache of vLLM"]
    places = [chart.index(title) for title in titles]
    assert places == sorted(places)
    for word in ("unattributed", "live or unused", "fragmentation", "padding", "seconds since the first cell began"):
        assert word in chart
    assert "finished" not in chart  # there were none
    # The line and its symbol in the legend.
    assert chart.count('stroke-dasharray="4,3"') == 2
    assert all(color in chart for color in look.COLORS[:2])


def test_what_is_on_several_gpus_has_a_panel_for_each_with_its_own_legend(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    held = {("hf", "0"), ("hf", "1"), ("vllm", "1")}
    series = {Series("gpu_memory_used_bytes", gpu=gpu): [2.0**34] * 9 for gpu in ("0", "1")}
    series |= {Series("gpu_process_memory_bytes", server=server, gpu=gpu): [2.0**33] * 9 for server, gpu in held}
    write_timeline(folder / "timeline" / "1.arrow", timeline(series, step_ns=500 * 10**9))
    chart = layer_chart(folder)
    assert re.findall(r">((?:Device|Process): [^<]*|HF|vLLM|used)<", chart) == [
        *["used", "Device: GPU 0 memory in use (NVML)", "used", "Device: GPU 1 memory in use (NVML)"],
        *["HF", "Process: GPU 0 memory by server (NVML)", "HF", "vLLM", "Process: GPU 1 memory by server (NVML)"],
    ]


def drawn(time_ns: list[int], *columns: list[float]) -> list[tuple[float, int, list[float]]]:
    """Second, run and values of what is drawn in the first 100 seconds."""
    arrays = [np.array(values, dtype=np.float64) for values in columns]
    steps = layers._steps(np.array(time_ns, dtype=np.int64), arrays, (0, 100 * 10**9))
    values = [[float(array[at]) for array in arrays] for at in steps.at]
    return list(zip(steps.seconds, steps.run, values, strict=True))


def test_nothing_is_drawn_where_nothing_was_sampled() -> None:
    seconds = [0, 1, 2, 10, 11, 99.5]
    found = drawn([int(second * 10**9) for second in seconds], [5, 6, 7, 8, 9, 4])
    # The last sample of each run is held for one period, and the window ends at 100.
    assert found == [
        *[(0, 0, [5]), (1, 0, [6]), (2, 0, [7]), (3, 0, [7])],
        *[(10, 1, [8]), (11, 1, [9]), (12, 1, [9])],
        *[(99.5, 2, [4]), (100, 2, [4])],
    ]


def test_a_spike_of_any_part_of_a_kv_cache_is_drawn_while_what_is_allocated_stays_the_same() -> None:
    rows = [kv_row(at * 10**7, allocated=100, live=100, reserved=0, padding=0) for at in range(6000)]
    spikes = {"reserved": 40, "padding": 30, "finished": 20, "fragmentation": 10}
    for number, (part, size) in enumerate(spikes.items()):
        rows[1000 * number + 777] |= {part: size, "live": 100 - size}
    cache = caches({"hf": kv_table(*rows)}, {})["hf"]
    frame = look.Frame(Words("en"), ["hf"], True)
    drawing = layers.Drawing(frame, (0, 60 * 10**9), "memory", 1)
    _, (areas, *_) = layers._areas(drawing, "hf", cache, np.full(6000, True))
    points = json.loads(areas.data["values"])
    drawn = {part: max(row["to"] - row["from"] for row in points if row["name"] == part) for part in spikes}
    assert drawn == pytest.approx({part: size * 4096 / 2**10 for part, size in spikes.items()})
    assert len(points) < 1.1 * memory.MAX_POINTS * len({row["name"] for row in points})


def test_both_ends_of_every_run_are_drawn_however_many_samples_there_are() -> None:
    times = [at * 10**6 + (20 * 10**9 if at >= 30_000 else 0) for at in range(50_000)]
    found = drawn(times, list(np.random.default_rng(1).uniform(1, 2, 50_000)))
    ends = {run: (min(s for s, r, _ in found if r == run), max(s for s, r, _ in found if r == run)) for run in (0, 1)}
    assert ends == {0: (0, 30), 1: (50, 70)}
    assert len(found) < 1.1 * memory.MAX_POINTS


def test_a_server_that_was_gone_for_a_while_has_a_gap_in_every_layer(tmp_path: Path) -> None:
    def marks(gone: bool) -> list[int]:
        folder = make_small(tmp_path / str(gone))
        start = json.loads((folder / "cells" / "01-hf-c1-r1" / "cell.json").read_text())["start_ns"]
        times = [start + n * 10**9 for n in range(60) if not (gone and 20 < n < 40)]
        series = {Series("host_pss_bytes", server="hf"): [2.0**30]}
        pieces = [timeline(series).set_column(0, "time_ns", pa.array([at])) for at in times]
        write_timeline(folder / "timeline" / "1.arrow", pa.concat_tables(pieces))
        write_timeline(folder / "kv" / "hf.arrow", kv_table(*(kv_row(at) for at in times)))
        chart = layer_chart(folder)
        return [len(re.findall(rf'class="mark-{kind} [^>]*><path', chart)) for kind in ("line", "area")]

    whole, gap = marks(gone=False), marks(gone=True)
    assert whole[0] == 1
    assert [more - less for more, less in zip(gap, whole, strict=True)] == [1, whole[1]]


def test_without_a_sample_in_the_time_of_the_cells_there_is_no_chart(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    write_timeline(folder / "timeline" / "1.arrow", timeline({Series("host_pss_bytes", server="hf"): [1.0]}))
    results = load(folder)
    summary = analyse(results)
    assert layers.draw(report.frame_of(summary, "en"), results.memory, summary) == {}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2**30, "bytes", "1.0 GiB"),
        (2**20, "bytes", "1.0 MiB"),
        (512, "bytes", "0.5 KiB"),
        (1234, "tokens", "1,234 tokens"),
        (1234, "blocks", "1,234 blocks"),
    ],
)
def test_amounts_are_in_the_largest_unit_that_fits(value: float, unit: str, text: str) -> None:
    assert layers.amount(Words("en"), value, unit) == text


@pytest.mark.parametrize(
    ("ends", "text"),
    [((0.5, 0.5), "50.0"), ((0.25, 0.5), "25.0 to 50.0"), ((0.5, 0.50001), "50.0"), ((None, None), "-")],
)
def test_a_share_is_one_figure_where_its_bounds_are_the_same(ends: tuple[float, float], text: str) -> None:
    assert formats.share(ends, Words("en")) == text


def rows_of_layers(text: str) -> list[list[str]]:
    """The cells of each row of the table of layers, its head first."""
    table = text[text.rindex("The other layers at that load</h2>") :].split("</table>")[0]
    return [
        [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    ]


@pytest.mark.usefixtures("no_charts")
def test_the_table_of_layers_has_a_row_for_each_gpu_with_what_is_of_no_server(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    held = {("hf", "0"): 1, ("unattributed", "0"): 2, ("unattributed", "1"): 3}
    series = {Series("gpu_memory_used_bytes", gpu=gpu): [2.0**34] for gpu in ("0", "1")}
    series |= {
        Series("gpu_process_memory_bytes", server=server, gpu=gpu): [size * 2.0**30]
        for (server, gpu), size in held.items()
    }
    series[Series("host_pss_bytes", server="hf")] = [2.0**30]
    cells = [cell for cell in load(folder).cells if cell.target == "hf"]
    pieces = [timeline(series).set_column(0, "time_ns", pa.array([cells[0].start_ns + 10**9] * 6))]
    write_timeline(folder / "timeline" / "1.arrow", pa.concat_tables(pieces))
    head, first, second = rows_of_layers(page(folder))[:3]
    assert head[2:] == ["GPU", "device: used", "process: held", "process: unattributed", "host, PSS"]
    assert [cell.split("  ")[0] for cell in first] == [
        "1 in flight",
        "HF",
        "0",
        "16.0 GiB",
        "1.0 GiB",
        "2.0 GiB",
        "1.0 GiB",
    ]
    assert [cell.split("  ")[0] for cell in second] == ["", "", "1", "16.0 GiB", "-", "3.0 GiB", ""]


@pytest.mark.usefixtures("no_charts")
def test_each_server_has_the_gpus_on_which_it_held_memory_and_the_cores_that_it_used(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    change_json(folder / "environment.json", gpus=[{"name": "A", "memory_bytes": 2**34, "driver": "1"}] * 2)
    gpus = {"0": "hf", "1": "vllm"}
    series = {Series("gpu_process_memory_bytes", server=server, gpu=gpu): [2.0**30] * 6 for gpu, server in gpus.items()}
    series |= {Series("gpu_utilization_ratio", gpu=gpu): [0.25 + int(gpu) / 2] * 6 for gpu in gpus}
    series |= {Series("gpu_power_watts", gpu=gpu): [100.0 + int(gpu)] * 6 for gpu in gpus}
    series[Series("host_cpu_seconds_total", server="hf")] = [1.05 * second for second in range(6)]
    pieces = []
    for cell in load(folder).cells:
        at = timeline(series)
        pieces.append(at.set_column(0, "time_ns", pa.array([ns + cell.start_ns for ns in at["time_ns"].to_pylist()])))
    write_timeline(folder / "timeline" / "1.arrow", pa.concat_tables(pieces))
    text = page(folder)
    busy = text[text.index("busy time and power") :].split("</tr>")[0]
    assert re.findall(r'<td class="n">(.*?)</td>', busy) == [
        "GPU&nbsp;0: 25.0%, 100&nbsp;W",
        "GPU&nbsp;1: 75.0%, 101&nbsp;W",
    ]
    assert "the first second of each steady window is left out" in text
    used = text[text.index("processor cores that its processes used") :].split("</tr>")[0]
    assert re.findall(r'<td class="n">(.*?)</td>', used) == ["1.05", "-"]


@pytest.mark.usefixtures("no_charts")
def test_equal_gpus_are_counted_and_the_variables_of_a_run_are_told(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    gpu = {"name": "NVIDIA H200", "memory_bytes": 2**34, "driver": "1"}
    variables = {"VLLM_ALLREDUCE_USE_FLASHINFER": "0", "VLLM_NO_USAGE_STATS": "<1>"}
    change_json(folder / "environment.json", gpus=[gpu, gpu, gpu | {"name": "other"}], variables=variables)
    text = page(folder)
    assert "2 cores, 2 x NVIDIA H200, other." in text
    assert "2 x NVIDIA H200 16.0 GiB, driver 1, other 16.0 GiB, driver 1." in text
    assert "VLLM_ALLREDUCE_USE_FLASHINFER=0, VLLM_NO_USAGE_STATS=&lt;1&gt;." in text


@pytest.mark.usefixtures("no_charts")
def test_html_in_a_reason_is_shown_and_not_run(tmp_path: Path) -> None:
    folder = make_small(tmp_path, state="partial")
    change_json(folder / "status.json", reason="<script>alert('x')</script>")
    text = page(folder)
    assert "<script" not in text
    assert "<script" not in page(folder, "zh")
    assert "&lt;script&gt;" in text
    assert "<strong>Partial.</strong>" in text


@pytest.mark.usefixtures("no_charts")
def test_html_in_the_name_of_a_model_is_shown_and_not_run(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    change_json(folder / "plan.json", model="<em>model</em>")
    assert "<em>" not in page(folder)


@pytest.mark.usefixtures("no_charts")
def test_latencies_without_a_mean_are_marked_and_not_compared(tmp_path: Path) -> None:
    cells = [(name, 1.0, 1, False, requests(ttft)) for name, ttft in (("one", 30), ("vllm", 0.1))]
    text = page(make(tmp_path, cells, levels=[1], repeats=1, workload="alpaca"))
    means = re.findall(r"<tr[^>]*><td>[^<]*, ms: mean</td>(.*?)</tr>", text, re.DOTALL)
    assert len(means) == 4
    assert [(row.count("&nbsp;&uarr;"), row.count("not compared"), row.count("×")) for row in means] == [(1, 1, 0)] * 4  # noqa: RUF001
    assert "×" in text  # noqa: RUF001 - the ratio of throughput
    assert "the requests of one waited in a queue that grew" in text


@pytest.mark.usefixtures("no_charts")
def test_a_broken_rule_has_a_banner(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    change_records(folder, "01-hf-c1-r1", lambda records: records[:-1])
    text = page(folder)
    assert '<div class="banner"><strong>Not valid.</strong>' in text
    assert '<span class="bad">invalid</span>' in text
    assert ">faster</span>" not in text
    assert "计划中的每个测试单元都已运行" in page(folder, "zh")


@pytest.mark.usefixtures("no_charts")
def test_a_folder_without_any_sample_of_memory_says_so_at_the_top(tmp_path: Path) -> None:
    folder = make_small(tmp_path)
    top = page(folder).split("<h2")[0]
    assert "Memory is missing" in top
    write_kv(folder)
    assert "Memory is missing" not in page(folder)


@pytest.mark.usefixtures("no_charts")
def test_the_reason_of_a_run_that_was_cut_off_is_in_the_language_of_the_page(tmp_path: Path) -> None:
    folder = make_small(tmp_path, state="running")
    change_json(folder / "status.json", reason="the run did not come to its end")
    assert "运行没有到达终点" in page(folder, "zh")
    assert "the run did not come to its end" not in page(folder, "zh")


@pytest.mark.usefixtures("no_charts")
def test_servers_with_the_same_source_share_a_line_and_one_without_an_allocator_is_named(tmp_path: Path) -> None:
    targets = [{"name": name, "kind": "hf"} for name in ("a", "b")] + [{"name": "vllm", "kind": "vllm"}]
    plan = make_plan(targets=targets, levels=[1], repeats=1)
    folder = make_folder(tmp_path, plan, speed=lambda _: 1.0)
    for cell in load(folder).cells:
        middle = (cell.start_ns + cell.end_ns) // 2
        row = paged_row(middle) if cell.target == "vllm" else kv_row(middle, torch_allocated_bytes=2**20)
        write_timeline(folder / "kv" / f"{cell.target}.arrow", kv_table(row))
    text = page(folder)
    assert text.count("the server counts its live tokens itself") == 1
    assert "a, b: the server counts its live tokens itself" in text
    assert "vLLM: nothing stands under torch" in text


@pytest.mark.usefixtures("no_charts")
def test_samples_that_are_missing_are_said_to_be(tmp_path: Path) -> None:
    text = page(make_small(tmp_path))
    assert "There are no memory samples." in text
    assert row(text, "HF") == ["1 in flight", "HF", "no samples"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"levels": [1, 4, 16], "model": "some/model", "max_model_len": 512, "sigma": 0.25},
        {"hf_args": "--one 'a b'", "vllm_args": "-- --enforce-eager"},
        {"out": "a folder/with $HOME & <b>"},
        {"arrival": "poisson", "levels": [0.5, 2], "limits": {"ttft_seconds": 0.2}},
    ],
)
@pytest.mark.usefixtures("no_charts")
def test_the_plan_on_a_page_is_that_of_its_run(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = make_plan(repeats=1, **options)
    shown = re.search(r'<pre class="plan">(.*?)</pre>', page(make_folder(tmp_path, plan)), re.DOTALL)
    assert shown is not None
    assert Plan(**yaml.safe_load(html.unescape(shown[1]))) == plan


@pytest.mark.usefixtures("no_charts")
def test_a_page_has_as_many_columns_as_targets_and_compares_each_with_the_first(tmp_path: Path) -> None:
    cells = [(one["name"], 1.0, repeat, False, requests(0.1)) for one in LADDER for repeat in (1, 2)]
    text = page(make(tmp_path, cells, targets=LADDER, repeats=2, workload="alpaca"))
    table = text[text.rindex("All figures by level</h2>") :].split("</table>")[0]
    assert re.findall(r"<th class=\"n\"><span [^>]*>(\w+)</span>", table) == ["one", "batch", "paged", "vLLM"]
    throughput = table[table.index("output throughput") :].split("</tr>")[0]
    assert throughput.count(", 1.00 to 1.00<") == 3
    assert "compare with one" in text
    ladder = text[text.rindex("The ladder: what each step brings</h2>") :]
    assert "continuous batching and paging" in ladder


@pytest.mark.usefixtures("no_charts")
def test_a_search_for_the_saturation_is_told_with_its_limits(tmp_path: Path) -> None:
    cells = [("one", 1.0, 1, False, requests(0.1)), ("one", 2.0, 1, True, requests(0.9))]
    text = page(make(tmp_path, cells, workload="alpaca"))
    assert "Limits for goodput: TTFT at most 0.5 s, E2E at most 1.5 s." in text
    assert "one met them at no rate that was tried" in text
    assert "Where each server saturates</h2>" in text
    assert "响应时间，从计划发送时刻算起" in page(tmp_path, "zh")  # noqa: RUF001


def test_a_page_of_many_requests_is_no_larger_than_three_megabytes(tmp_path: Path) -> None:
    """Five targets, each sampled 100 times a second while it ran, and as many points of each chart as there can be."""
    targets = [{"name": name, "kind": "hf"} for name in ("hf", "a", "b", "c")] + [{"name": "vllm", "kind": "vllm"}]
    folder = make_folder(tmp_path, make_plan(targets=targets, levels=[1, 2, 4], repeats=1), speed=lambda _: 20.0)
    cells = load(folder).cells
    begin, end = min(cell.start_ns for cell in cells), max(cell.end_ns for cell in cells)
    random = np.random.default_rng(1)
    series = {
        Series("host_pss_bytes", server=one["name"]): random.uniform(2**30, 2**31, 3000).tolist() for one in targets
    }
    write_timeline(folder / "timeline" / "1.arrow", timeline(series, step_ns=end // 3000))
    for one in targets:
        parts = random.integers(1, 100, (3000, 5)).tolist()
        rows = [
            kv_row(begin + (end - begin) * at // 3000, live=live, reserved=reserved, padding=padding, finished=finished,
                   fragmentation=rest, allocated=live + reserved + padding + finished + rest)
            for at, (live, reserved, padding, finished, rest) in enumerate(parts)
        ]  # fmt: skip
        write_timeline(folder / "kv" / f"{one['name']}.arrow", kv_table(*rows))
    results = load(folder)
    summary = analyse(results)
    assert 500_000 < len(report.page(results, summary, report.draw(results, summary)).encode()) < 3_000_000
