"""What becomes of GPUs over minutes and hours: `python -m tests.fake_nvml.scenarios NAME` prints figures as JSON."""

import json
import os
import sys
from typing import Any

from monitor.gpu import Rates
from monitor.sampler import SECOND
from monitor.timeline import Series
from tests.fake_nvml.fake import FOREVER, GIB
from tests.fake_nvml.simulation import Simulation, script

LOST, ARGUMENT_VERSION_MISMATCH, UNKNOWN = 15, 25, 999
RATES = Rates(hz=2, max_cpu=1.0, seconds=600)
Figures = dict[str, Any]


def shown(simulation: Simulation) -> Figures:
    """Sources that are up, GPUs that are there with their UUID and used GiB, and how often NVML was opened."""
    gpus, since_ns = simulation.gpus, simulation.now_ns() - 2 * SECOND
    latest = {
        series: value for ring in simulation.timeline.rings.values() for series, value in ring.latest(since_ns).items()
    }
    return {
        "up": [source.name for source in gpus.sources() if source.up(simulation.now_ns())],
        "down": [source.name for source in gpus.sources() if not source.up(simulation.now_ns())],
        "there": {device.gpu: device.uuid for device in gpus.identities()},
        "used": {s.gpu: value / GIB for s, value in latest.items() if s.metric == "gpu_memory_used_bytes"},
        "opened": simulation.opened(),
        "rings": sorted({name.partition("-")[0] for name in simulation.timeline.rings}),
    }


def taken_away() -> Figures:
    """One of three GPUs is taken away for good, and the driver then counts the third as its second."""
    made = script()
    for gpu in (0, 1, 2):
        made.add("device", gpu, 80 * GIB).add("memory 0", gpu, (gpu + 1) * GIB)
    simulation = Simulation(made, RATES).run(60)
    figures: Figures = {"before": shown(simulation)}
    made.lines = [line for line in made.lines if not line.startswith("device 1")]
    simulation.change()
    figures["soon"] = shown(simulation.run(80))
    missed = simulation.gpus.found["2"].source.samples
    figures["later"] = shown(simulation.run(2000))
    figures["samples"] = simulation.gpus.found["2"].source.samples - missed
    return figures


def fails_for_ever() -> Figures:
    """The memory of one GPU of two can never be read, with whatever error, from a minute on."""
    made = script()
    for gpu in (0, 1):
        made.add("device", gpu, 80 * GIB)
    made.add("fault 60", FOREVER, "1 memory", UNKNOWN)
    simulation = Simulation(made, RATES).run(60)
    return {"before": shown(simulation), "hour": shown(simulation.run(3660)), "two": shown(simulation.run(7260))}


def unknown_error() -> Figures:
    """Every call on the GPU fails with an unknown error until NVML is opened anew."""
    made = script().add("device 0", 80 * GIB).add("fault 60 61 0 *", UNKNOWN)
    simulation = Simulation(made, RATES).run(60)
    return {"before": shown(simulation), "soon": shown(simulation.run(63)), "later": shown(simulation.run(75))}


def mig() -> Figures:
    """MIG devices are removed and made while the GPU goes on."""
    made = script().add("device 0", 80 * GIB, 1).add("value 0 power 100000")
    for part in ("0/0", "0/1"):
        made.add("device", part, 40 * GIB).add("memory 0", part, 8 * GIB)
    simulation = Simulation(made, RATES).run(60)
    figures = {"before": shown(simulation)}
    made.lines = [line for line in made.lines if not line.startswith("device 0/1")]
    made.add("device 0/2", 40 * GIB).add("memory 0 0/2", 5 * GIB).add("value 0/0 uuid 7")
    simulation.change()
    figures["soon"] = shown(simulation.run(80))
    return figures | {"later": shown(simulation.run(1200))}


def supported_later() -> Figures:
    """NVLink is not supported until its fabric is up, and the driver is too old for another call."""
    made = script().add("device 0", 80 * GIB).add("fault 0", FOREVER, "0 power", ARGUMENT_VERSION_MISMATCH)
    simulation = Simulation(made, RATES).run(30)
    made.add("value 0 links 1").add("value 0 nvlink-tx 5").add("value 0 nvlink-rx 7")
    simulation.change()
    simulation.run(100)
    ring = simulation.timeline.rings["gpu0-nvlink"]
    sent = ring.latest(0).get(Series("gpu_nvlink_bytes_total", gpu="0", detail="tx"))
    return {"sent": sent, "errors": simulation.gpus.errors()["0", "power"]}


def throttled() -> Figures:
    """A reason holds the clocks down for 30 s, then another, then the GPU is lost for a while."""
    made = script().add("device 0", 80 * GIB).add("value 0 throttling 4").add("fault 60 90 0 *", LOST)
    simulation = Simulation(made, RATES).run(30)
    made.add("value 0 throttling 64")
    simulation.change()
    figures = dict[str, Any](enough=simulation.run(50).gpus.throttled()["0", "sw_power_cap"])
    simulation.run(120)
    return figures | {reason: seconds for (_, reason), seconds in simulation.gpus.throttled().items()}


def overcount() -> Figures:
    """NVML counts more for the processes of a server than the device has in use."""
    made = script().add("device 0", 80 * GIB).add("memory 0 0", 10 * GIB).add("process 0 0", os.getpid(), 12 * GIB)
    ring = Simulation(made, RATES).run(10).timeline.rings["gpu0-processes"]
    return {series.server: value / GIB for series, value in ring.latest(0).items() if series.server}


def changing() -> Figures:
    """Memory stands still for 10 s, then a spike of 3 ms, then it changes with every millisecond of a second."""
    made = script().add("device 0", 80 * GIB).add("process 0 0", os.getpid(), GIB).add("memory 0 0", 2 * GIB)
    made.add("memory 10.0005 0", 5 * GIB).add("memory 10.0035 0", 2 * GIB)
    for millisecond in range(1000):
        made.add(f"memory {11 + millisecond / 1000}", 0, 2 * GIB + (millisecond + 1) % 2)
    simulation = Simulation(made, Rates(hz=1000, max_cpu=1.0, seconds=60)).run(13)
    ring = simulation.timeline.rings["gpu0-processes"]
    read = [ring.time_ns(number) / SECOND for number in range(*ring.bounds())]
    return {"calm": [at for at in read if at < 10], "spike": [at for at in read if 10 <= at < 10.02], "read": read}


def dear_processes() -> Figures:
    """Memory changes all the time, and each list of processes takes 2 ms of CPU."""
    made = script().add("device 0", 80 * GIB).add("process 0 0", os.getpid(), GIB).add("work 0 1e9 0 processes 0.002")
    for hundredth in range(4000):
        made.add(f"memory {hundredth / 100}", 0, 2 * GIB + hundredth % 2)
    rings = Simulation(made, Rates(hz=100, max_cpu=0.1, seconds=60)).run(40).timeline.rings
    times = {
        name: [ring.time_ns(number) / SECOND for number in range(*ring.bounds())]
        for name, ring in rings.items()
        if name in {"gpu0-memory", "gpu0-processes"}
    }
    return {"memory": len(times["gpu0-memory"]), "processes": times["gpu0-processes"]}


ALL = (taken_away, fails_for_ever, unknown_error, mig, supported_later, throttled, overcount, changing, dear_processes)
SCENARIOS = {run.__name__: run for run in ALL}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]]()))
