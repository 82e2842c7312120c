"""Samples a GPU and processes for a day of simulated time, and prints what that left: `python -m tests.fake_nvml.day`.

Threads wake up late by up to 2 ms. Each hour the GPU is lost with an XID error, and NVML is opened anew. Every five
minutes the processes of the host are read and Prometheus scrapes.
"""

import json
import os
from collections import Counter
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, generate_latest

from monitor.collector import TimelineCollector
from monitor.gpu import Rates
from monitor.host import make_host
from monitor.sampler import SECOND
from monitor.window import table
from tests.fake_nvml.fake import GIB
from tests.fake_nvml.simulation import Simulation, script

HZ, MINUTES, LATE_NS = 1, 30, 2_000_000
HOUR, DAY, SCRAPE_EVERY = 3600, 24 * 3600, 300
VALUES = {"power": 350_500, "throttling": 4, "energy": 123_456, "pcie-tx": 7, "pcie-rx": 9, "ecc-corrected": 1}


def main() -> None:
    """Sample a day."""
    made = script().add("device 0", 80 * GIB).add("period 60")
    # A spike of a good second in each minute, and a process that is there for half of it.
    for at, used in ((0, 4), (30, 9), (31.2, 4)):
        made.add("memory", at, 0, used * GIB)
    for at, used in ((0, 0), (10, 2), (40, 0)):
        made.add("process", at, 0, os.getpid(), used * GIB)
    for name, value in VALUES.items():
        made.add("value 0", name, value)
    for lost in range(HOUR // 4, DAY, HOUR):
        made.add("fault", lost, lost + 5, "0 * 15").add("xid", lost, 0, 79)
    rates = Rates(HZ, 1.0, MINUTES * 60)
    simulation = Simulation(made, rates, LATE_NS)
    host = make_host(simulation.timeline, simulation.processes, rates, beside_gpus=True)
    registry = CollectorRegistry()
    TimelineCollector(simulation.timeline, host.source, simulation.gpus, registry, simulation.now_ns)
    peaks, settled = Counter[float | None](), 0
    for moment in range(SCRAPE_EVERY, DAY + 1, SCRAPE_EVERY):
        simulation.run(moment)
        host.source.main.tick(0)
        generate_latest(registry)
        peaks[registry.get_sample_value("headroom_gpu_memory_used_max_bytes", {"gpu": "0"})] += 1
        if moment == 2 * HOUR:
            settled = psutil.Process().memory_info().rss
    grown = psutil.Process().memory_info().rss - settled
    print(json.dumps({"grown_bytes": grown, "peaks": peaks, **counted(simulation), **kept(simulation)}))


def counted(simulation: Simulation) -> dict[str, Any]:
    """What was counted over the day."""
    gpu = simulation.gpus.found["0"]
    ((_, xid),) = simulation.gpus.xids().items()
    return {
        "samples": {source.name: (source.samples, source.missed) for source in simulation.gpus.sources()},
        "opened": simulation.opened(),
        "errors": sum(gpu.errors.values()),
        "xids": xid.count,
        "throttled_seconds": simulation.gpus.throttled()["0", "sw_power_cap"],
    }


def kept(simulation: Simulation) -> dict[str, Any]:
    """What the timeline holds at the end: rows by metric, how far off the grid they are, and what adds up."""
    rows = table(simulation.timeline.rings, 0, simulation.now_ns() + 1).to_pylist()
    period = SECOND // HZ
    used = [(row["time_ns"], row["value"]) for row in rows if row["metric"] == "gpu_memory_used_bytes"]
    parts = Counter[int]()
    for row in rows:
        if row["metric"] == "gpu_process_memory_bytes":
            parts[row["time_ns"]] += row["value"]
    return {
        # Other servers may run on this machine.
        "rows": Counter(row["metric"] for row in rows if row["server"] in (None, "hf", "unattributed")),
        "spike_rows": sum(value == 9 * GIB for _, value in used),
        "server_rows": sum(row["server"] == "hf" and row["metric"] == "gpu_process_memory_bytes" for row in rows),
        "off_grid_ns": max(time_ns % period for time_ns, _ in used),
        "adds_up": parts == dict(used),
    }


if __name__ == "__main__":
    main()
