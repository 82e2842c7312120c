"""The layers of memory, from tables as the monitor and the KV samplers leave them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.analysis import memory, requests
from experiment.analysis.memory import Memory, Series, gather
from monitor.timeline import Series as Sampled
from tests.unit.experiment.folders import SECOND, kv_row, kv_table, make_record, paged_row, timeline

HF, VLLM = (Sampled("host_pss_bytes", server=name) for name in ("hf", "vllm"))
WHOLE = [(0, 1000 * SECOND)]
SERVERS: dict[str, list[requests.Requests]] = {"hf": [], "vllm": []}


def on_gpu(server: str, gpu: str) -> Sampled:
    return Sampled("gpu_process_memory_bytes", server=server, gpu=gpu)


def of_monitor(rows: dict[Sampled, Any]) -> list[Series]:
    return gather(timeline(rows), {}, SERVERS).series


def names(series: list[Series]) -> list[tuple[str, str, str]]:
    return [(one.layer, one.owner, one.gpu) for one in series]


def test_each_server_has_a_series_of_its_own() -> None:
    hf, vllm = of_monitor({VLLM: [10, 20, 30], HF: [1, 2]})
    assert (hf.layer, hf.owner, hf.values.tolist(), hf.time_ns.tolist()) == ("host", "hf", [1, 2], [0, SECOND])
    assert (vllm.owner, vllm.values.tolist()) == ("vllm", [10, 20, 30])


def test_other_metrics_and_other_processes_are_left_out() -> None:
    rows = {HF: [1.0], Sampled("host_rss_bytes", server="hf"): [5.0], Sampled("host_pss_bytes", server="else"): [9.0]}
    assert names(of_monitor(rows)) == [("host", "hf", "")]


def test_the_device_the_driver_and_processes_of_no_server_are_there_on_a_gpu() -> None:
    rows = {
        on_gpu("unattributed", "0"): [7.0],
        Sampled("gpu_memory_used_bytes", gpu="0"): [9.0],
        Sampled("gpu_memory_reserved_bytes", gpu="0"): [2.0],
        Sampled("gpu_clock_hertz", gpu="0", detail="sm"): [1e9],
    }
    series = of_monitor(rows)
    assert names(series) == [("device", "", "0"), ("device", "", "0"), ("process", "unattributed", "0")]
    assert [one.name for one in series] == ["used", "reserved by the driver", "held"]


def test_gpus_and_their_parts_are_in_the_order_of_their_numbers() -> None:
    gpus = ["10", "2:GPU-7", "0/1", "0/1:MIG-5", "2", "0"]
    ordered = ["0", "0/1", "0/1:MIG-5", "2", "2:GPU-7", "10"]
    assert [one.gpu for one in of_monitor({on_gpu("hf", gpu): [1.0] for gpu in gpus})] == ordered


def test_a_timeline_with_numbers_for_gpus_is_read_too() -> None:
    table = timeline({on_gpu("hf", "1"): [3.0]}).drop_columns(["detail"])
    table = table.set_column(table.schema.get_field_index("gpu"), "gpu", pa.array([1], pa.int16()))
    assert names(gather(table, {}, SERVERS).series) == [("process", "hf", "1")]


def test_there_are_no_series_without_samples() -> None:
    assert gather(timeline({HF: [1.0]}).slice(0, 0), {}, {}).series == gather(None, {}, {}).series == []


def test_pieces_of_a_timeline_are_put_in_the_order_of_time() -> None:
    whole = timeline({HF: [1.0, 2.0, 3.0]})
    (series,) = gather(pa.concat_tables([whole.slice(2), whole.slice(0, 2)]), {}, SERVERS).series
    assert series.values.tolist() == [1.0, 2.0, 3.0]


def test_the_allocator_is_a_layer_where_the_server_tells_of_it() -> None:
    rows = [kv_row(1, torch_allocated_bytes=5, torch_reserved_bytes=8), kv_row(2)]
    series = gather(None, {"hf": kv_table(*rows), "vllm": kv_table(paged_row(1))}, {}).series
    assert [(one.layer, one.owner, one.name, one.values.tolist()) for one in series] == [
        ("allocator", "hf", "reserved", [8]),
        ("allocator", "hf", "allocated", [5]),
    ]


def test_figures_are_those_of_the_windows_and_of_the_server() -> None:
    rows = {HF: [1.0, 2.0, 6.0, 100.0], VLLM: [50.0] * 4, Sampled("gpu_memory_used_bytes", gpu="0"): [7.0] * 4}
    found = Memory(of_monitor(rows), {}).figures("hf", [(0, SECOND), (2 * SECOND, 3 * SECOND)])
    assert found == {
        "device": {"GPU 0 used": {"mean": 7.0, "max": 7.0}},
        "host": {"held": {"mean": 3.5, "max": 6.0}},
    }
    assert Memory(of_monitor(rows), {}).figures("hf", [(90 * SECOND, 91 * SECOND)]) == {}


def test_a_ledger_gives_bytes_and_shares_that_add_up_to_one() -> None:
    rows = [kv_row(SECOND), kv_row(2 * SECOND, allocated=30, live=26, skipped=3)]
    found = gather(None, {"hf": kv_table(*rows)}, {}).figures("hf", [(0, 3 * SECOND)])["kv"]
    assert (found["unit"], found["live_source"], found["block_size"]) == ("bytes", "ledger", None)
    assert found["allocated"] == {"mean": 20 * 4096, "max": 30 * 4096}
    assert found["capacity"]["max"] == 100 * 4096
    assert found["parts"]["live"]["share"] == [0.8, 0.8]
    assert sum(part["share"][0] for part in found["parts"].values()) == pytest.approx(1)
    assert (found["samples"], found["samples_per_second"], found["missed"], found["broken"]) == (2, 2 / 3, 3, 0)


def test_the_mean_of_a_cache_is_over_time() -> None:
    """The server answered late under load: two samples of a second, of which the last holds for four fifths of it."""
    rows = [kv_row(SECOND, allocated=10, live=10), kv_row(SECOND + SECOND // 5, allocated=30, live=15)]
    found = gather(None, {"hf": kv_table(*rows)}, {}).figures("hf", [(SECOND, 2 * SECOND)])["kv"]
    assert found["allocated"]["mean"] == pytest.approx(26 * 4096)
    assert found["parts"]["live"]["share"][0] == pytest.approx(14 / 26)


def test_bounds_of_live_give_bounds_of_the_waste() -> None:
    chunks = {"chunk_ns": [SECOND, 3 * SECOND, 4 * SECOND], "chunk_tokens": [1, 1, 1], "end_ns": 5 * SECOND}
    record = make_record(target="vllm", prompt_tokens=9, output_tokens=3, **chunks)
    samples = {"hf": kv_table(kv_row(0)), "vllm": kv_table(paged_row(2 * SECOND))}
    parts = gather(None, samples, {"vllm": [requests.of([record])]}).figures("vllm", WHOLE)["kv"]["parts"]
    assert parts["live"]["share"] == [9 / 16, 11 / 16]
    assert parts["fragmentation"]["share"] == [5 / 16, 7 / 16]
    assert set(parts) == {"live", "fragmentation"}


def test_a_cache_whose_tokens_have_no_known_size_is_counted_in_tokens() -> None:
    row = paged_row(0, running=0, bytes_per_token=None)
    found = gather(None, {"vllm": kv_table(row)}, {}).figures("vllm", WHOLE)["kv"]
    assert (found["unit"], found["allocated"]["mean"], found["broken"]) == ("tokens", 16, 1)


def test_a_cache_in_blocks_has_no_parts() -> None:
    row = paged_row(0, unit="blocks", capacity=100, allocated=7, bytes_per_token=None)
    found = gather(None, {"vllm": kv_table(row)}, {}).figures("vllm", WHOLE)["kv"]
    assert (found["unit"], found["live_source"], found["parts"]) == ("blocks", "unknown", {})
    assert (found["capacity"]["max"], found["allocated"]["mean"]) == (100, 7)


def test_an_empty_cache_has_no_shares() -> None:
    empty = kv_row(0, allocated=0, live=0, reserved=0, padding=0)
    found = gather(None, {"hf": kv_table(empty)}, {}).figures("hf", WHOLE)["kv"]
    assert found["parts"]["live"]["share"] == [None, None]


def test_the_table_of_all_samples_has_a_row_for_each_of_every_server() -> None:
    samples = {"hf": kv_table(kv_row(3), kv_row(4)), "vllm": kv_table(paged_row(5))}
    table = memory.cache_table(gather(None, samples, {}))
    assert table["target"].to_pylist() == ["hf", "hf", "vllm"]
    assert table["time_ns"].to_pylist() == [3, 4, 5]
    assert table["padding_low"].to_pylist() == [1, 1, None]
    assert table["unit"].to_pylist() == ["tokens"] * 3


def test_a_silence_of_more_than_three_seconds_begins_another_run() -> None:
    seconds = np.array([0, 1, 2, 2.5, 5.5, 8.6, 8.7])
    assert memory.runs((seconds * SECOND).astype(np.int64)).tolist() == [0, 0, 0, 0, 0, 1, 1]


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(-1e9, 1e9)), min_size=1, max_size=400), st.integers(3, 50))
def test_thinning_keeps_order_and_extremes_and_shows_nothing_wrong_for_longer_than_a_stretch(
    samples: list[tuple[int, float]], points: int
) -> None:
    times, array = np.cumsum([step for step, _ in samples]), np.array([value for _, value in samples])
    kept = memory.thin(times, array, points)
    assert 0 < len(kept) <= max(3, points)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert (array[kept].max(), array[kept].min()) == (array.max(), array.min())
    stretch_ns = (times[-1] - times[0] + 1) / max(1, points // 3)
    for number, at in enumerate(kept.tolist()):
        until = kept[number + 1] if number + 1 < len(kept) else len(times)
        left_out = np.flatnonzero(array[at:until] != array[at])
        assert not len(left_out) or times[until - 1] - times[at + left_out[0]] <= stretch_ns


def test_what_ends_before_samples_become_seldom_is_not_shown_until_they_are_frequent_again() -> None:
    times = np.concatenate([np.arange(0, 3_000), np.arange(3_000, 300_000, 1_000), np.arange(300_000, 303_000)])
    values = np.zeros(len(times))
    values[2_900:2_990] = 5.0
    kept = memory.thin(times, values)
    shown_ns = np.diff(times[kept], append=times[-1])
    assert shown_ns[values[kept] > 0].sum() < 1_500


def test_a_spike_of_one_sample_in_each_direction_is_kept() -> None:
    values = np.full(100_000, 5.0)
    values[54_321], values[54_322] = 99.0, 1.0
    kept = memory.thin(np.arange(100_000), values)
    assert len(kept) <= memory.MAX_POINTS
    assert {54_321, 54_322} <= set(kept.tolist())


def test_a_series_that_fits_is_kept_as_it_is() -> None:
    values = np.arange(memory.MAX_POINTS, dtype=np.float64)
    assert memory.thin(np.arange(memory.MAX_POINTS), values).tolist() == list(range(memory.MAX_POINTS))


def series_of(times_seconds: list[float], values: list[float], owner: str = "hf", gpu: str = "0") -> Series:
    times = (np.array(times_seconds) * SECOND).astype(np.int64)
    return Series("process", owner, gpu, "held", times, np.array(values))


def seconds(*windows: tuple[float, float]) -> list[memory.Window]:
    return [(round(start * SECOND), round(end * SECOND)) for start, end in windows]


def test_the_mean_of_what_is_sampled_more_often_while_it_changes_is_over_time() -> None:
    series = series_of([0, 1, 1.01, 1.02, 2, 3], [1, 1, 50, 1, 1, 1])
    mean = Memory([series], {}).figures("hf", seconds((0, 4)))["process"]["GPU 0 held"]["mean"]
    assert mean == pytest.approx(1 + 49 * 0.01 / 4)


def test_a_window_begins_with_the_last_sample_before_it_and_ends_within_the_one_that_lasts_longer() -> None:
    series = series_of([0, 1, 2], [9, 1, 4])
    assert memory.over_time(series, seconds((0.5, 1.5))) == {"mean": (9 * 0.5 + 1 * 0.5), "max": 9}
    assert memory.over_time(series, seconds((1.2, 1.4))) == {"mean": 1, "max": 1}
    assert memory.over_time(series, seconds((0, 1), (2, 4))) == {"mean": pytest.approx((9 + 2 * 4) / 3), "max": 9}


def test_a_sample_holds_for_three_seconds_and_no_longer() -> None:
    series = series_of([0, 10], [6, 2])
    assert memory.over_time(series, seconds((2, 11))) == {"mean": pytest.approx((6 + 2) / 2), "max": 6}
    assert memory.over_time(series, seconds((4, 9))) is None
    assert memory.over_time(series, seconds((12, 20))) == {"mean": 2, "max": 2}


@given(st.lists(st.integers(1, 900), min_size=2, max_size=40), st.integers(0, 5000), st.integers(1, 5000))
def test_what_is_never_more_than_another_has_no_larger_mean_however_seldom_it_is_sampled(
    steps: list[int], start: int, length: int
) -> None:
    times = np.cumsum([0, *steps]) / 1000
    values = np.arange(len(times), dtype=np.float64)
    more = series_of(list(times), list(values))
    # The same, read each second time only: as it grows, what was read last is never too much.
    less = series_of(list(times[::2]), list(values[::2]))
    window = seconds((start / 1000, (start + length) / 1000))
    whole, part = memory.over_time(more, window), memory.over_time(less, window)
    if whole and part and window[0][1] <= times[-1] * SECOND:
        assert part["mean"] <= whole["mean"] * (1 + 1e-9)


def test_what_the_monitor_knows_no_server_for_is_in_the_figures_of_each_gpu() -> None:
    rows = [series_of([0, 1], [5, 5]), series_of([0, 1], [2, 4], owner="unattributed", gpu="1")]
    assert Memory(rows, {}).figures("hf", seconds((0, 2)))["process"] == {
        "GPU 0 held": {"mean": 5, "max": 5},
        "GPU 1 unattributed": {"mean": 3, "max": 4},
    }


def test_a_server_is_on_the_gpus_where_its_processes_held_memory_in_the_windows() -> None:
    rows = [
        series_of([0, 1], [5, 5], gpu="0"),
        series_of([0, 1], [0, 0], gpu="1"),
        series_of([0, 1], [7, 7], gpu="2", owner="vllm"),
        series_of([50], [5], gpu="3"),
    ]
    assert Memory(rows, {}).gpus("hf", seconds((0, 2))) == ["0"]
    assert Memory(rows, {}).gpus("hf", seconds((0, 2), (51, 52))) == ["0", "3"]
    assert Memory(rows, {}).gpus("other", seconds((0, 2))) == []
