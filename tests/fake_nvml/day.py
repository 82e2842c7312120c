"""Samples a GPU for a day of simulated time at 10 Hz, and prints what that left: `python -m tests.fake_nvml.day`.

Clock and fake NVML stand still between two ticks, so a day takes as long as its ticks.
"""

import ctypes

import psutil
import pynvml

from monitor.gpu import Rates
from monitor.gpus import Gpus
from monitor.processes import Processes
from monitor.sampler import SECOND, Schedule
from monitor.timeline import Instant, Series, Timeline
from monitor.window import table
from tests.fake_nvml.fake import GIB

HZ, MINUTES, DAY_NS = 10, 30, 24 * 3600 * SECOND
USED = Series("gpu_memory_used_bytes", gpu="0")


def main() -> None:
    """Sample a day."""
    now_ns = 0
    timeline = Timeline(lambda: Instant(now_ns, now_ns))
    gpu = Gpus(timeline, Processes(), Rates(HZ, 1.0, MINUTES * 60)).found["0"]
    clock = ctypes.c_longlong.in_dll(pynvml.nvmlLib, "fake_nvml_now")
    ticks, worst, settled = 0, 0.0, 0

    def tick(lateness: float) -> bool:
        nonlocal ticks, worst
        ticks, worst = ticks + 1, max(worst, lateness)
        return gpu.source.main.tick(lateness)

    def moment() -> int:
        return now_ns

    for wait in Schedule(HZ, tick, clock=moment).steps():
        now_ns += round(wait * SECOND)
        clock.value = now_ns
        if now_ns >= DAY_NS:
            break
        if not settled and now_ns > 2 * MINUTES * 60 * SECOND:
            settled = psutil.Process().memory_info().rss
    print("grown_bytes", psutil.Process().memory_info().rss - settled)
    rows = [row["value"] for row in table(timeline.rings, 0, DAY_NS).to_pylist() if row["metric"] == USED.metric]
    print("ticks", ticks)
    print("worst_lateness_seconds", worst)
    print("kept_rows", len(rows))
    print("kept_spike_rows", rows.count(9 * GIB))


if __name__ == "__main__":
    main()
