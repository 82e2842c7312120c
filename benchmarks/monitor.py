"""`python -m benchmarks.monitor`: what the monitor costs, how late its samples are, and what it does to a server.

Each rate has a monitor of its own. Its CPU is that of the whole process, HTTP server and host included, and beside it
that of the threads which sample the GPUs; without a GPU only the host is sampled. `nvidia-smi --loop-ms`, where there
is one, asks for the same memory as often as it can at that rate.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import kv_sampling, serving
from benchmarks.serving import JSON, Servers
from experiment.environment import describe
from experiment.stack import Program, RunError, end, get

SCRAPES, SCRAPE_SECONDS = 100, 0.05
SETTLE_SECONDS, START_SECONDS = 3.0, 900.0
LATENESS = "monitor_sample_lateness_seconds"


@dataclass(frozen=True)
class Bench:
    """What is measured; times in seconds."""

    hz: tuple[int, ...]
    seconds: float
    load: kv_sampling.Options


@contextmanager
def monitor(hz: int, servers: Servers) -> Iterator[Program]:
    """A monitor that never slows down; it keeps a few minutes."""
    program = servers.start(f"monitor-{hz}", ["monitor", "--port", "{port}", *options(hz)], {})
    try:
        servers.wait()
        yield program
    finally:
        end(program.process, serving.STOP_SECONDS)
        del servers.programs[program.name]


def options(hz: int) -> list[str]:
    """Options of a monitor at a rate."""
    return ["--hz", str(hz), "--minutes", "5", "--max-cpu", "1"]


def cost(hz: int, seconds: float, program: Program) -> JSON:
    """CPU share and lateness of a monitor that is left alone, then how long it takes to answer scrapes."""
    time.sleep(SETTLE_SECONDS)
    process, begun = psutil.Process(program.process.pid), time.monotonic_ns()
    before, sources = cpu_seconds(process), scrape(program)
    time.sleep(seconds)
    wall = (time.monotonic_ns() - begun) / 1e9
    cpu, sampling = cpu_seconds(process) - before, scrape(program)
    name = ("headroom_monitor_source_cpu_seconds_total",)
    gpus = [key for key in sampling if key[:1] == name and key[1] != "host"]
    late, ticks = lateness(program, begun, "gpu" if gpus else "host")
    share = sum(sampling[key] - sources.get(key, 0.0) for key in gpus) / wall
    return {
        "hz": hz,
        "gpus": len(gpus),
        "samples_per_second": ticks / wall,
        "cpu_share": cpu / wall,
        "gpu_sampling_cpu_share": share if gpus else None,
        "cpu_seconds_per_sample": share * wall / ticks if gpus and ticks else None,
        "lateness_seconds": dict(zip(("p50", "p99", "max"), late, strict=True)),
        "scrape_seconds": scrape_times(program),
    }


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def scrape(program: Program) -> dict[tuple[str, ...], float]:
    """Samples of /metrics by name and label values."""
    text = (get(program.url + "/metrics") or b"").decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def lateness(program: Program, since_ns: int, source: str) -> tuple[list[float], int]:
    """Quantiles of how late samples began, and how many there are, of sources whose name begins so."""
    body = get(f"{program.url}/timeline?since_ns={since_ns}") or b""
    table = pa.ipc.open_stream(body).read_all()
    table = table.filter(pc.equal(table["metric"].cast(pa.string()), LATENESS))
    table = table.filter(pc.starts_with(table["detail"].cast(pa.string()), source))
    if not table.num_rows:
        raise RunError(f"{program.name} took no sample of {source}")
    return np.quantile(table["value"].to_numpy(), (0.5, 0.99, 1)).tolist(), table.num_rows


def scrape_times(program: Program) -> JSON:
    """Quantiles of the seconds that a scrape takes, connection included."""
    times = []
    for _ in range(SCRAPES):
        begun = time.perf_counter()
        get(program.url + "/metrics")
        times.append(time.perf_counter() - begun)
        time.sleep(SCRAPE_SECONDS)
    return dict(zip(("p50", "p99", "max"), np.quantile(times, (0.5, 0.99, 1)).tolist(), strict=True))


def nvidia_smi(program: str, hz: int, seconds: float) -> JSON:
    """What NVIDIA's own program takes to print the memory in use as often."""
    query = ["--query-gpu=memory.used", "--format=csv,noheader", f"--loop-ms={max(1, 1000 // hz)}"]
    with tempfile.TemporaryFile() as lines:
        begun = time.monotonic()
        with subprocess.Popen([program, *query], stdout=lines) as process:
            time.sleep(seconds)
            cpu = cpu_seconds(psutil.Process(process.pid))
            wall = time.monotonic() - begun
            process.kill()
        lines.seek(0)
        printed = sum(1 for _ in lines)
    return {"hz": hz, "samples_per_second": printed / wall, "cpu_share": cpu / wall}


def slowdown(bench: Bench, servers: Servers) -> list[JSON]:
    """Throughput of each server without and with a monitor of the highest rate, in A B B A order."""
    rows = []
    for server in bench.load.servers:
        program = servers.start(server, bench.load.command(server), serving.environment(bench.load.model))
        servers.wait()
        found = kv_sampling.paired(bench.load, program, lambda _: watching(bench.hz[-1], servers))
        rows.append({"server": server, "hz": bench.hz[-1], **found})
        print(slowed(rows[-1]), flush=True)
        servers.stop()
    return rows


@contextmanager
def watching(hz: int, servers: Servers) -> Iterator[None]:
    """A monitor beside a cell."""
    with monitor(hz, servers):
        yield


def ms(times: JSON) -> str:
    """Times in milliseconds."""
    return ", ".join(f"{seconds * 1e3:.2f}" for seconds in times.values())


def line(found: JSON) -> str:
    """One rate of the monitor."""
    gpu = "-" if found["gpu_sampling_cpu_share"] is None else f"{found['gpu_sampling_cpu_share']:.2%}"
    each = "-" if found["cpu_seconds_per_sample"] is None else f"{found['cpu_seconds_per_sample'] * 1e6:.1f} us"
    row = [f"{found['hz']} Hz", f"{found['samples_per_second']:.1f}", f"{found['cpu_share']:.2%}", gpu, each]
    return f"| {' | '.join([*row, ms(found['lateness_seconds']), ms(found['scrape_seconds'])])} |"


def slowed(found: JSON) -> str:
    """One server with and without the monitor."""
    pairs = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
    return f"{found['server']}: {found['ratio']:.3f} of its throughput with the monitor at {found['hz']} Hz ({pairs})"


HEAD = """| asked | samples/s | CPU of a core | of it GPUs | a sample | late ms p50, p99, max | scrape ms |
|---|---|---|---|---|---|---|"""


def run(bench: Bench, found: JSON) -> None:
    """Measure all, print as it comes, and add it to `found`; raises RunError."""
    with tempfile.TemporaryDirectory() as name, Servers(Path(name), START_SECONDS) as servers:
        print(HEAD)
        for hz in bench.hz:
            with monitor(hz, servers) as program:
                found["monitor"].append(cost(hz, bench.seconds, program))
            print(line(found["monitor"][-1]), flush=True)
        theirs = shutil.which("nvidia-smi")
        for hz in bench.hz if theirs else ():
            found["nvidia_smi"].append(nvidia_smi(str(theirs), hz, bench.seconds))
            print(
                "nvidia-smi at {hz} Hz: {samples_per_second:.1f} samples/s, {cpu_share:.2%} of a core".format(
                    **found["nvidia_smi"][-1]
                )
            )
        found["slowdown"] = slowdown(bench, servers)


def parse(arguments: Sequence[str]) -> tuple[Bench, Path | None]:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.monitor", description=(__doc__ or "").partition("\n")[0])
    add = partial(parser.add_argument, metavar="...")
    add("--hz", type=serving.numbers, default="10,100,1000", help="samples a second; servers run beside the last")
    add("--seconds", type=float, default=20, help="how long each monitor is measured")
    kv_sampling.add_load(add, "sequential,vllm")
    add("--out", type=Path, help="file for the figures as JSON")
    given = vars(parser.parse_args(arguments))
    hz, seconds, out = given.pop("hz"), given.pop("seconds"), given.pop("out")
    return Bench(hz, seconds, kv_sampling.Options(**given, out=None)), out


def main() -> int:
    """Run the benchmark; 1 when a program failed. What was measured before an interruption is kept."""
    bench, out = parse(sys.argv[1:])
    found: JSON = {"monitor": [], "nvidia_smi": [], "slowdown": []}
    try:
        run(bench, found)
    except RunError as error:
        print(f"benchmarks.monitor: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if out:
            out.write_text(json.dumps(describe() | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
