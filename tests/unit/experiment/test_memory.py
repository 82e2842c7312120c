"""Series for charts, from tables as the monitor answers them."""

import pyarrow as pa

from experiment import memory
from monitor.timeline import Series
from tests.unit.experiment.folders import SECOND, timeline

HF, VLLM = (Series("host_pss_bytes", server=name) for name in ("hf", "vllm"))


def owners(series: list[memory.Series]) -> list[str]:
    return [one.owner for one in series]


def on_gpu(server: str, gpu: int) -> Series:
    return Series("gpu_process_memory_bytes", server=server, gpu=gpu)


def test_each_server_has_its_own_series_from_the_start_of_the_run() -> None:
    series = memory.host_series(timeline({VLLM: [10, 20, 30], HF: [1, 2]}), SECOND)
    assert owners(series) == ["hf", "vllm"]
    assert series[0].values.tolist() == [1, 2]
    assert series[1].values.tolist() == [10, 20, 30]
    assert series[1].seconds.tolist() == [-1.0, 0.0, 1.0]


def test_other_metrics_and_other_processes_are_left_out() -> None:
    rows = {HF: [1.0], Series("host_rss_bytes", server="hf"): [5.0], Series("host_pss_bytes", server="monitor"): [9.0]}
    (only,) = memory.host_series(timeline(rows), 0)
    assert (only.owner, only.values.tolist()) == ("hf", [1.0])


def test_memory_of_no_server_is_shown_on_the_gpu_only() -> None:
    rows = {on_gpu("unattributed", 0): [7.0], Series("host_pss_bytes", server="unattributed"): [9.0]}
    assert owners(memory.gpu_series(timeline(rows), 0)) == ["unattributed"]
    assert memory.host_series(timeline(rows), 0) == []


def test_one_gpu_is_not_numbered_and_several_are() -> None:
    assert owners(memory.gpu_series(timeline({on_gpu("hf", 0): [1.0]}), 0)) == ["hf"]
    two = timeline({on_gpu("vllm", 1): [4.0], on_gpu("hf", 1): [3.0], on_gpu("hf", 0): [1.0]})
    series = memory.gpu_series(two, 0)
    assert owners(series) == ["hf, GPU 0", "hf, GPU 1", "vllm, GPU 1"]
    assert [one.values.tolist() for one in series] == [[1.0], [3.0], [4.0]]


def test_there_are_no_series_without_samples() -> None:
    empty = timeline({HF: [1.0]}).slice(0, 0)
    assert memory.host_series(empty, 0) == memory.gpu_series(empty, 0) == []


def test_pieces_of_a_timeline_are_put_in_the_order_of_time() -> None:
    whole = timeline({HF: [1.0, 2.0, 3.0]})
    (series,) = memory.host_series(pa.concat_tables([whole.slice(2), whole.slice(0, 2)]), 0)
    assert series.seconds.tolist() == [0.0, 1.0, 2.0]
    assert series.values.tolist() == [1.0, 2.0, 3.0]


def test_a_long_series_is_thinned_and_its_spike_kept() -> None:
    values = [1.0] * 3001
    values[1234] = 99.0
    (series,) = memory.host_series(timeline({HF: values}), 0)
    assert len(series.seconds) == len(series.values) <= memory.MAX_POINTS
    assert series.values.max() == 99.0
    assert series.values.min() == 1.0


def test_a_series_that_fits_is_kept_as_it_is() -> None:
    values = [float(value) for value in range(memory.MAX_POINTS)]
    (series,) = memory.host_series(timeline({HF: values}), 0)
    assert series.values.tolist() == values
