"""`python -m benchmarks.kv_sampling`: what it costs a server that its KV cache is sampled ten times a second.

Each server is loaded in cells of equal length, without and with sampling in A B B A order. The ratio is that of
neighbours, with a 95 % interval over the pairs; it is within noise when the interval holds 1. The sampler is that of
`headroom compare`, in a process of its own, which is stopped (SIGSTOP) in the cells without it. The time and the CPU of
one scrape are measured on the idle server.
"""

import argparse
import asyncio
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import fmean

import numpy as np
import psutil
import pyarrow.compute as pc

from benchmarks import serving
from benchmarks.ladder import made
from benchmarks.serving import JSON, RUNGS, Servers, closed_loop, read
from experiment.analysis.stats import ratio_of_pairs
from experiment.environment import describe
from experiment.run import kv
from experiment.run.stack import Program, RunError
from loadtest.options import Options as Load
from loadtest.work.workloads import paper

SCRAPES, START_SECONDS, SETTLE_SECONDS = 200, 900.0, 1.0


@dataclass(frozen=True)
class Options:
    """What is measured; times in seconds."""

    model: str
    servers: tuple[str, ...]
    users: int
    rounds: int
    cell_seconds: float
    warmup_seconds: float
    vllm_args: str
    out: Path | None

    def command(self, server: str) -> list[str]:
        """Module and arguments of a server: a rung of `servers.hf`, or vllm."""
        common = ["--model", self.model, "--port", "{port}"]
        if server == "vllm":
            return ["servers.vllm", *common, *shlex.split(self.vllm_args)]
        return ["servers.hf", *common, *RUNGS[server].format(batch=self.users).split()]


def target(server: str) -> str:
    """Whose metrics a server has."""
    return "vllm" if server == "vllm" else "hf"


def sample(server: str, url: str, path: Path, ready: Event, over: Event) -> None:
    """Sample at full rate until it is over; runs in a process of its own."""
    sampler = kv.Sampler(target(server), url, path)
    sampler.pace(kv.LOADED_NS)
    ready.set()
    over.wait()
    sampler.stop()
    sampler.check()


@contextmanager
def sampling(server: str, url: str, path: Path) -> Iterator[psutil.Process]:
    """Sample a server into a file, in a process of its own, from the beginning of the block to its end."""
    context = multiprocessing.get_context("spawn")
    ready, over = context.Event(), context.Event()
    process = context.Process(target=sample, args=(server, url, path, ready, over), daemon=True)
    process.start()
    try:
        if not ready.wait(30):
            raise RunError("the sampler did not start within 30 s")
        yield psutil.Process(process.pid)
    finally:
        over.set()
        process.join(10)
    if process.exitcode:
        raise RunError(f"the sampler of {server} ended with {process.exitcode}; what it said is above")


def bodies(options: Options, seed: int) -> Iterator[JSON]:
    """Requests without end."""
    return (request.body(options.model) for request in paper(Load(workload="alpaca", max_context=512, seed=seed)))


def throughput(options: Options, url: str, round_: int) -> float:
    """Output tokens per second of a server under load, without the beginning of the cell."""
    started = time.monotonic_ns()
    exchanges = asyncio.run(closed_loop(url, bodies(options, round_), options.users, options.cell_seconds))
    results = [read(exchange) for exchange in exchanges]
    begin, finish = (started + int(s * 1e9) for s in (options.warmup_seconds, options.cell_seconds))
    if errors := {result.error for result in results if result.error}:
        raise RunError(f"{len(errors)} kinds of errors, one of them: {errors.pop()}")
    tokens = sum(made(result, finish) - made(result, begin) for result in results)
    return tokens / (options.cell_seconds - options.warmup_seconds)


def scrape_cost(server: str, program: Program, folder: Path) -> JSON:
    """Seconds of one scrape of an idle server, and of CPU on both sides."""
    sampler = kv.Sampler(target(server), program.url, folder / "cost.arrow")
    sampler.stop()
    before, client, started = _cpu_seconds(program), time.process_time(), time.perf_counter()
    for _ in range(SCRAPES):
        sampler.scrape()
    ended = time.perf_counter()
    return {
        "seconds": (ended - started) / SCRAPES,
        "client_cpu_seconds": (time.process_time() - client) / SCRAPES,
        "server_cpu_seconds": (_cpu_seconds(program) - before) / SCRAPES,
    }


def _cpu_seconds(program: Program) -> float:
    process = psutil.Process(program.process.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def paired(options: Options, program: Program, watcher: psutil.Process) -> JSON:
    """Load a server in A B B A order, with what watches it stopped and at work; hold each cell against its neighbour.

    Nothing starts or ends between cells, so that a server waits as long before each.
    """
    speeds: dict[bool, list[float]] = {False: [], True: []}
    throughput(options, program.url, 0)  # warm-up
    for number, now in enumerate([False, True, True, False] * options.rounds):
        time.sleep(SETTLE_SECONDS)  # the requests that were cut off end
        with nullcontext() if now else stopped(watcher):
            speeds[now].append(throughput(options, program.url, number // 2 + 1))
        program.check()
    ratios = [b / a for a, b in zip(speeds[False], speeds[True], strict=True)]
    known = {"without": speeds[False], "with": speeds[True]}
    return {"tokens_per_second": known, "ratios": ratios, **asdict(ratio_of_pairs(ratios))}


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """A process does nothing during the block."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def ratio(found: JSON) -> str:
    """A ratio with its interval, what it says, and the pairs that it is of."""
    said = "within noise" if found["verdict"] == "no detectable difference" else found["verdict"]
    pairs = ", ".join(f"{one:.3f}" for one in found["ratios"])
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}), {said}; pairs {pairs}"


def measure(options: Options, server: str, program: Program, folder: Path) -> JSON:
    """What sampling costs one server."""
    path = folder / f"{server}.arrow"
    with sampling(server, program.url, path) as sampler:
        found = paired(options, program, sampler)
    scrape = scrape_cost(server, program, folder)
    return {"server": server, **found, "samples_per_second": rate(path, options.cell_seconds), "scrape": scrape}


def rate(path: Path, cell_seconds: float) -> float:
    """Good samples per second in a file; where two are a cell apart, the sampler was stopped."""
    table = kv.read(path)
    good = table.filter(pc.is_null(table["error"]))
    gaps = np.diff(good["answered_ns"].to_numpy()) / 1e9
    return float(1 / np.mean(gaps[gaps < cell_seconds]))


def line(found: JSON) -> str:
    """One row of the table that is printed."""
    means = [fmean(found["tokens_per_second"][name]) for name in ("without", "with")]
    costs = [f"{seconds * 1e3:.2f} ms" for seconds in found["scrape"].values()]
    row = [
        found["server"],
        *(f"{mean:,.0f}" for mean in means),
        ratio(found),
        f"{found['samples_per_second']:.1f}",
        *costs,
    ]
    return f"| {' | '.join(row)} |"


HEAD = """| server | tokens/s without | with | ratio (95 % interval) | samples/s | a scrape | CPU here | at server |
|---|---|---|---|---|---|---|---|"""


def run(options: Options, rows: list[JSON]) -> None:
    """Measure one server after the other, print a row for each and add it to `rows`; raises RunError."""
    print(HEAD)
    with tempfile.TemporaryDirectory() as name, Servers(Path(name), START_SECONDS) as servers:
        for server in options.servers:
            program = servers.start(server, options.command(server), serving.environment(options.model))
            servers.wait()
            (folder := Path(name) / server).mkdir()
            rows.append(measure(options, server, program, folder))
            print(line(rows[-1]), flush=True)
            servers.stop()


def add_load(add: Callable[..., object], servers: str) -> None:
    """Add the options of servers under load, `servers` by default."""
    known = (*RUNGS, "vllm")
    add("--model", default="random:tiny", help="as for the servers")
    add("--servers", type=partial(serving.names, allowed=known), default=servers, help=", ".join(known))
    add("--users", type=serving.number, default=8, help="requests in flight")
    add("--rounds", type=serving.number, default=2, help="how often A B B A; each has two pairs")
    add("--cell-seconds", type=float, default=8, help="how long a cell is")
    add("--warmup-seconds", type=float, default=2, help="how much of its beginning does not count")
    add("--vllm-args", default="-- --enforce-eager", help="more arguments for servers.vllm")


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.kv_sampling", description=(__doc__ or "").partition("\n")[0])
    add = partial(parser.add_argument, metavar="...")
    add_load(add, "sequential,continuous,vllm")
    add("--out", type=serving.new_file, help="file for the figures as JSON")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> int:
    """Run the benchmark; 1 when a server failed. What was measured before an interruption is kept."""
    options = parse(sys.argv[1:])
    rows: list[JSON] = []
    try:
        run(options, rows)
    except RunError as error:
        print(f"benchmarks.kv_sampling: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if options.out:
            options.out.write_text(json.dumps(describe() | {"results": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
