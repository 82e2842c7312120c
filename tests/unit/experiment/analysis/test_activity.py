"""How busy GPUs and processor were in the windows of cells."""

import pyarrow as pa
import pytest

from experiment.analysis import activity
from monitor.timeline import Series
from tests.unit.experiment import folders
from tests.unit.experiment.folders import SECOND

ROWS = [
    (1, "gpu_utilization_ratio", "0", 0.0),
    (2, "gpu_utilization_ratio", "0", 0.5),
    (3, "gpu_utilization_ratio", "0", 1.0),
    (9, "gpu_utilization_ratio", "0", 0.1),
    (2, "gpu_utilization_ratio", "1", 0.25),
    (3, "gpu_power_watts", "0", 700.0),
    (1, "gpu_power_watts", "1", 100.0),
    (3, "gpu_memory_used_bytes", "0", 1e9),
]


def timeline() -> pa.Table:
    seconds, metrics, gpus, values = zip(*ROWS, strict=True)
    times = [second * SECOND for second in seconds]
    columns = {"time_ns": times, "metric": pa.array(metrics).dictionary_encode(), "gpu": gpus, "value": values}
    return pa.table(columns)


def test_utilization_and_power_are_by_gpu_and_of_the_windows_alone() -> None:
    assert activity.gpus(timeline(), [(1 * SECOND, 4 * SECOND)]) == {
        "0": {"utilization": {"mean": 0.75, "max": 1.0}, "power_watts": {"mean": 700.0, "max": 700.0}},
        "1": {"utilization": {"mean": 0.25, "max": 0.25}},
    }
    both = [(0, 2 * SECOND), (8 * SECOND, 10 * SECOND)]
    assert activity.gpus(timeline(), both)["0"] == {"utilization": {"mean": 0.05, "max": 0.1}}


def test_samples_of_the_first_second_of_a_window_tell_of_the_time_before_it_and_are_left_out() -> None:
    assert activity.gpus(timeline(), [(SECOND + 1, 4 * SECOND)])["0"]["utilization"]["mean"] == 1.0
    assert (
        activity.gpus(timeline(), [(SECOND, 2 * SECOND)])
        == activity.gpus(timeline(), [(3 * SECOND, 3 * SECOND + 1)])
        == {}
    )


def test_of_the_gpus_only_those_that_are_asked_for_are_told() -> None:
    window = [(SECOND, 4 * SECOND)]
    assert activity.gpus(timeline(), window, ["1"]).keys() == {"1"}
    assert activity.gpus(timeline(), window, ["2"]) == {}


def test_without_a_monitor_or_a_sample_there_is_nothing() -> None:
    assert activity.gpus(None, [(SECOND, 4 * SECOND)]) == {}
    assert activity.gpus(timeline(), []) == {}


def processor(*used: float) -> pa.Table:
    """Processor time of HF once a second, beside that of a server that used none."""
    rows = {
        Series("host_cpu_seconds_total", server="hf"): used,
        Series("host_cpu_seconds_total", server="vllm"): [0, 0],
    }
    return folders.timeline(rows)


def test_cores_are_processor_time_over_the_time_between_the_samples_of_each_window() -> None:
    table = processor(10, 11, 13, 50, 50.5, 60)
    assert activity.cores(table, "hf", [(0, 3 * SECOND)]) == pytest.approx(3 / 2)
    assert activity.cores(table, "hf", [(0, 3 * SECOND), (3 * SECOND, 5 * SECOND)]) == pytest.approx((3 + 0.5) / 3)
    assert activity.cores(table, "vllm", [(0, 3 * SECOND)]) == 0


def test_cores_are_not_known_without_two_samples_in_a_window() -> None:
    assert activity.cores(processor(1, 2), "hf", [(0, SECOND), (SECOND, 2 * SECOND)]) is None
    assert activity.cores(processor(1, 2), "other", [(0, 2 * SECOND)]) is None
    assert activity.cores(None, "hf", [(0, SECOND)]) is None
