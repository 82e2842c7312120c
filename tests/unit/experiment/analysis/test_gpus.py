"""What NVML says of the GPUs in the windows of cells."""

import pyarrow as pa

from experiment.analysis.gpus import activity

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
    times, metrics, gpus, values = zip(*ROWS, strict=True)
    columns = {"time_ns": times, "metric": pa.array(metrics).dictionary_encode(), "gpu": gpus, "value": values}
    return pa.table(columns)


def test_utilization_and_power_are_by_gpu_and_of_the_windows_alone() -> None:
    assert activity(timeline(), [(2, 4)]) == {
        "0": {"utilization": {"mean": 0.75, "max": 1.0}, "power_watts": {"mean": 700.0, "max": 700.0}},
        "1": {"utilization": {"mean": 0.25, "max": 0.25}},
    }
    assert activity(timeline(), [(1, 2), (9, 10)])["0"] == {"utilization": {"mean": 0.05, "max": 0.1}}


def test_without_a_monitor_or_a_sample_there_is_nothing() -> None:
    assert activity(None, [(2, 4)]) == {}
    assert activity(timeline(), []) == {}
