"""`python -m benchmarks.monitor`: what the monitor costs, how late its samples are, and what it does to a server.

All servers are resident and under load while a monitor is measured. Each rate has a monitor of its own. Its CPU is that
of the whole process, HTTP server and host included; beside it are that of all threads which sample the GPUs, and that
of those which read memory and processes. Without a GPU only the host is sampled. Bare loops, in Python and in C, and
`nvidia-smi --loop-ms`, where there is a GPU, ask for the same memory as often as they can at that rate. An exporter
that the user has installed is scraped as the monitor is. The CPU of a scrape is what scrapes cost beyond the share that
goes on without them.
"""

import argparse
import asyncio
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import kv_sampling, serving
from benchmarks.peers import compiled
from benchmarks.peers.watchers import (
    EXPORTER,
    HOW,
    bare_loop,
    c_loop,
    cpu_seconds,
    exporter_cost,
    nvidia_smi,
    quantiles,
    scrape_cost,
)
from benchmarks.serving import JSON, Servers, closed_loop
from experiment.environment import describe
from experiment.run.stack import MONITOR_CPU, Program, RunError, end, get

# So that what the monitor slows down, it has slowed down: it looks every 5 s.
SETTLE_SECONDS, START_SECONDS = 16.0, 900.0
# What a monitor must be allowed of a core for each sample a second to take them all.
SAMPLE_CPU_SECONDS = 1e-4
LATENESS, MISSED = "monitor_sample_lateness_seconds", "monitor_samples_missed"


@dataclass(frozen=True)
class Bench:
    """What is measured; times in seconds."""

    hz: tuple[int, ...]
    seconds: float
    exporter: str
    load: kv_sampling.Options


@contextmanager
def monitor(hz: int, servers: Servers) -> Iterator[Program]:
    """A monitor at a rate; it keeps a few minutes."""
    program = servers.start(f"monitor-{hz}", ["monitor", "--port", "{port}", *options(hz)], {})
    try:
        servers.wait()
        yield program
    finally:
        program.process.terminate()
        end(program.process, serving.STOP_SECONDS)
        del servers.programs[program.name]


def options(hz: int) -> list[str]:
    """Options of a monitor at a rate: it may take what it may by default, or what so many samples need, if more.

    With less it takes fewer samples, as the table says; with far more it would read dear values that often.
    """
    return ["--hz", str(hz), "--minutes", "5", "--max-cpu", f"{max(MONITOR_CPU, hz * SAMPLE_CPU_SECONDS):g}"]


def cost(hz: int, seconds: float, program: Program) -> JSON:
    """CPU share and lateness of a monitor that is left alone, then how long it takes to answer scrapes."""
    time.sleep(SETTLE_SECONDS)
    pid, begun = program.process.pid, time.monotonic_ns()
    sources, before = scrape(program), cpu_seconds(pid)
    time.sleep(seconds)
    wall = (time.monotonic_ns() - begun) / 1e9
    cpu, sampling = cpu_seconds(pid) - before, scrape(program)
    name = "headroom_monitor_source_cpu_seconds_total"
    used = {key[1:]: value - sources.get(key, 0.0) for key, value in sampling.items() if key[0] == name}
    gpus = {source for source, _ in used if source.startswith("gpu")}
    late, ticks = lateness(program, begun, "gpu" if gpus else "host", hz)
    threads = {key: seconds / wall for key, seconds in sorted(used.items())}
    # What looks for GPUs ("nvml") is a part of what it takes to sample them.
    share = sum(one for (source, _), one in threads.items() if source != "host")
    fast = sum(one for (_, thread), one in threads.items() if thread.endswith("-fast"))
    return {
        "hz": hz,
        "memory": memory(sampling),
        "gpus": len(gpus),
        "samples_per_second": ticks / wall,
        "samples_missed": len(late) - ticks,
        "cpu_share": cpu / wall,
        "thread_cpu_shares": {thread: one for (_, thread), one in threads.items()},
        "gpu_sampling_cpu_share": share if gpus else None,
        "gpu_memory_cpu_share": fast if gpus else None,
        "cpu_seconds_per_sample": fast * wall / ticks if gpus and ticks else None,
        "lateness_seconds": quantiles(late),
        **scrape_cost(program, cpu / wall),
    }


def memory(samples: dict[tuple[str, ...], float]) -> JSON:
    """Bytes in use on each GPU, and those of each server's processes on it; `unattributed` is the rest."""
    used, part = "headroom_gpu_memory_used_bytes", "headroom_gpu_process_memory_bytes"
    gpus: JSON = {key[1]: {"used": value, "parts": {}} for key, value in samples.items() if key[0] == used}
    for key, value in samples.items():
        if key[0] == part:
            gpus[key[1]]["parts"][key[2]] = value
    return gpus


def scrape(program: Program) -> dict[tuple[str, ...], float]:
    """Samples of /metrics by name and label values."""
    text = (get(program.url + "/metrics") or b"").decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def lateness(program: Program, since_ns: int, source: str, hz: int) -> tuple[list[float], int]:
    """How late samples began in seconds, and how many were taken, of sources whose name begins so.

    A sample stands for those that were missed by the time it was taken: it was late for each of them.
    """
    body = get(f"{program.url}/timeline?since_ns={since_ns}") or b""
    table = pa.ipc.open_stream(body).read_all()
    table = table.filter(pc.is_in(table["metric"].cast(pa.string()), pa.array([LATENESS, MISSED])))
    table = table.filter(pc.starts_with(table["detail"].cast(pa.string()), source))
    columns = (table[name].to_pylist() for name in ("metric", "detail", "time_ns", "value"))
    rows = {(metric, detail, time_ns): value for metric, detail, time_ns, value in zip(*columns, strict=True)}
    taken = {key: value for key, value in rows.items() if key[0] == LATENESS}
    if not taken:
        raise RunError(f"{program.name} took no sample of {source}")
    late = []
    for (_, detail, time_ns), seconds in taken.items():
        missed = int(rows.get((MISSED, detail, time_ns), 0))
        late += [seconds - number / hz for number in range(missed + 1)]
    return late, len(taken)


def slowdown(bench: Bench, servers: Servers, rows: list[JSON]) -> None:
    """Throughput of each server beside monitors of the two highest rates, stopped and at work in A B B A order."""
    for hz in bench.hz[-2:]:
        with monitor(hz, servers) as watcher:
            for server in bench.load.servers:
                found = kv_sampling.paired(bench.load, servers.programs[server], psutil.Process(watcher.process.pid))
                watcher.check()
                rows.append({"server": server, "hz": hz, **found})
                print(slowed(rows[-1]), flush=True)


@contextmanager
def loaded(load: kv_sampling.Options, urls: Sequence[str]) -> Iterator[None]:
    """Keep all servers under load from a process of its own; raises RunError when it did not last."""
    process = multiprocessing.get_context("spawn").Process(target=send, args=(load, urls), daemon=True)
    process.start()
    try:
        yield
        if process.exitcode is not None:
            raise RunError(f"the load on the servers ended with {process.exitcode}; what it said is above")
    finally:
        process.kill()
        process.join()


def send(load: kv_sampling.Options, urls: Sequence[str]) -> None:
    """Send requests to all servers, as many in flight at each, until killed; runs in a process of its own."""

    async def all_of_them() -> None:
        requests = (kv_sampling.bodies(load, seed) for seed in range(len(urls)))
        await asyncio.gather(*(closed_loop(*one, load.users) for one in zip(urls, requests, strict=True)))

    asyncio.run(all_of_them())


def ms(times: JSON) -> str:
    """Times in milliseconds."""
    return ", ".join(f"{seconds * 1e3:.2f}" for seconds in times.values())


def line(found: JSON) -> str:
    """One rate of the monitor."""
    names = ("gpu_sampling_cpu_share", "gpu_memory_cpu_share")
    gpu = ["-" if found[name] is None else f"{found[name]:.2%}" for name in names]
    each = "-" if found["cpu_seconds_per_sample"] is None else f"{found['cpu_seconds_per_sample'] * 1e6:.1f} us"
    taken = f"{found['samples_per_second']:.1f} ({found['samples_missed']})"
    row = [f"{found['hz']} Hz", taken, f"{found['cpu_share']:.2%}", *gpu, each]
    row += [ms(found["lateness_seconds"]), ms(found["scrape_seconds"]), scraped(found)]
    return f"| {' | '.join(row)} |"


def apart(found: JSON) -> str:
    """What each thread that samples takes, the dearest first."""
    shares = sorted(found["thread_cpu_shares"].items(), key=itemgetter(1), reverse=True)
    return f"of a core at {found['hz']} Hz: {', '.join(f'{thread} {share:.2%}' for thread, share in shares)}"


def scraped(found: JSON) -> str:
    """CPU time of one scrape."""
    return f"{found['cpu_seconds_per_scrape'] * 1e3:.2f} ms"


def slowed(found: JSON) -> str:
    """One server with and without the monitor."""
    said = kv_sampling.ratio(found)
    return f"{found['server']}: throughput with the monitor at {found['hz']} Hz over that without: {said}"


def held(gpus: JSON) -> str:
    """Who holds the memory of each GPU, and what share of it is nobody's."""
    lines = []
    for gpu, one in gpus.items():
        parts = ", ".join(f"{server} {size / 1e9:.2f} GB" for server, size in one["parts"].items())
        share = one["parts"].get("unattributed", 0.0) / one["used"]
        lines.append(f"GPU {gpu}: {one['used'] / 1e9:.2f} GB in use; {parts} ({share:.2%} unattributed)")
    return "\n".join(lines) or "no GPU: no memory by server on one"


HEAD = """| asked | samples/s (missed) | CPU | GPUs | memory | each | late ms p50, p99, max | scrape ms | its CPU |
|---|---|---|---|---|---|---|---|---|"""


def beside(bench: Bench, logs: Path, found: JSON) -> None:
    """Measure the others that watch a GPU, print what they cost, or why they are not here; raises RunError."""
    theirs = shutil.which("nvidia-smi")
    if theirs is None:
        print("nvidia-smi: not found, so it is not beside the monitor")
    for hz in bench.hz if found["monitor"][-1]["gpus"] else ():
        found["bare_loop"].append(one := bare_loop(hz, bench.seconds))
        print(f"a bare loop at {hz} Hz: {one['samples_per_second']:.1f} samples/s, {one['cpu_share']:.2%} of a core")
    if found["monitor"][-1]["gpus"]:
        loops_in_c(bench, logs, found["c_loop"])
    for hz in bench.hz if theirs else ():
        found["nvidia_smi"].append(one := nvidia_smi(str(theirs), hz, bench.seconds))
        print(f"nvidia-smi at {hz} Hz: {one['samples_per_second']:.1f} samples/s, {one['cpu_share']:.2%} of a core")
    program = shutil.which(bench.exporter)
    if program is None:
        print(f"{bench.exporter}: not found. To have it beside the monitor: {HOW}")
        return
    found["exporter"] = one = exporter_cost(Path(program), logs / "exporter.log", bench.seconds)
    share, times = f"{one['cpu_share']:.2%} of a core", ms(one["scrape_seconds"])
    print(f"{one['exporter']}: {share}, a scrape {times} ms (p50, p99, max) and {scraped(one)} of CPU", flush=True)


def loops_in_c(bench: Bench, folder: Path, found: list[JSON]) -> None:
    """Measure a bare loop in C at each rate, print what it costs, or why it cannot be had; raises RunError."""
    try:
        program = compiled("watch", folder)
    except OSError as error:
        print(f"no loop in C: {error}")
        return
    for hz in bench.hz:
        found.append(one := c_loop(program, hz, bench.seconds))
        costs = f"{one['cpu_share']:.2%} of a core, {one['waking_cpu_share']:.2%} where it only wakes up"
        print(f"the same in C at {hz} Hz: {one['samples_per_second']:.1f} samples/s, {costs}")


def run(bench: Bench, found: JSON) -> None:
    """Measure all, print as it comes, and add it to `found`; raises RunError."""
    with tempfile.TemporaryDirectory() as name, Servers(Path(name), START_SECONDS) as servers:
        for server in bench.load.servers:
            known = serving.environment(bench.load.model) | {"HEADROOM_SERVER": server}
            servers.start(server, bench.load.command(server), known)
            servers.wait()  # vLLM measures how much memory is free: the others must have taken theirs by then
        urls = [program.url for program in servers.programs.values()]
        print(HEAD)
        with loaded(bench.load, urls) if urls else nullcontext():
            for hz in bench.hz:
                with monitor(hz, servers) as program:
                    found["monitor"].append(cost(hz, bench.seconds, program))
                print(line(found["monitor"][-1]), flush=True)
            for one in found["monitor"]:
                print(apart(one), flush=True)
            print(held(found["monitor"][-1]["memory"]), flush=True)
            beside(bench, Path(name), found)
        slowdown(bench, servers, found["slowdown"])


def parse(arguments: Sequence[str]) -> tuple[Bench, Path | None]:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.monitor", description=(__doc__ or "").partition("\n")[0])
    add = partial(parser.add_argument, metavar="...")
    add("--hz", type=serving.numbers, default="10,100,1000", help="samples a second; servers run beside the last two")
    add("--seconds", type=float, default=20, help="how long each monitor is measured")
    add("--exporter", default=EXPORTER, help="program of the exporter beside it, if it is there: nvitop-exporter")
    kv_sampling.add_load(add, "sequential,vllm")
    add("--out", type=serving.new_file, help="file for the figures as JSON")
    given = vars(parser.parse_args(arguments))
    own, out = {name: given.pop(name) for name in ("hz", "seconds", "exporter")}, given.pop("out")
    return Bench(**own, load=kv_sampling.Options(**given, out=None)), out


def main() -> int:
    """Run the benchmark; 1 when a program failed. What was measured before an interruption is kept."""
    bench, out = parse(sys.argv[1:])
    found: JSON = {"monitor": [], "bare_loop": [], "c_loop": [], "nvidia_smi": [], "exporter": None, "slowdown": []}
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
