"""`python -m benchmarks.ladder`: what batching and paging each bring, from one request at a time up to vLLM.

Every rung of `servers.hf` and vLLM get the same requests, one server after the other. The figures go to ladder.json,
and from there to ladder.md. A later run into the same folder replaces the cells it measures and keeps the others.
"""

import argparse
import asyncio
import json
import re
import shlex
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median_low

import aiohttp
import torch
import transformers

from benchmarks import serving
from benchmarks.serving import JSON, RUNGS, Result, Servers, closed_loop, read
from experiment.run.stack import Program, RunError
from loadtest.options import Options as Load
from loadtest.work.workloads import paper
from servers.hf.kv import bytes_per_token
from servers.models import ModelError, resolve

FIT_RUNGS = ("batch", "batch-static", "continuous", "vllm")
REASONS = ("reserved", "padding", "finished", "fragmentation")
SAMPLE_SECONDS, SETTLE_SECONDS, START_SECONDS = 0.1, 3.0, 1200.0
METRIC = re.compile(r"^(?:hf|vllm):((?:kv|torch|num|cache_config)\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Options:
    """What is measured; lengths in tokens, sizes in bytes, times in seconds."""

    model: str
    concurrency: tuple[int, ...]
    rungs: tuple[str, ...]
    out: Path
    max_model_len: int
    cell_seconds: float
    warmup_seconds: float
    kv_budget: int | None
    fit: int | None
    fit_concurrency: int
    vllm_args: str

    @property
    def dtype(self) -> str:
        """The dtype of weights and KV cache on all servers."""
        return "bfloat16" if torch.cuda.is_available() else "float32"


@dataclass(frozen=True)
class Cell:
    """One rung with a number of requests in flight and a KV budget, in the first table or (`fit`) in the second."""

    rung: str
    users: int
    budget: int | None
    fit: bool = False

    @property
    def server(self) -> str:
        """Name of its server: cells with the same name share one."""
        return self.rung + ("-fit" if self.fit else f"-{self.users}" if self.rung.startswith("batch") else "")

    def command(self, options: Options) -> list[str]:
        """Module and arguments of its server."""
        common = ["--model", options.model, "--port", "{port}", "--dtype", options.dtype]
        common += ["--max-model-len", str(options.max_model_len)]
        common += ["--kv-budget", str(self.budget)] if self.budget else []
        if self.rung == "vllm":
            seats = ["--max-num-seqs", str(self.users)] if self.fit else []
            return ["servers.vllm", *common, *seats, *shlex.split(options.vllm_args)]
        # A paged server is started once for all concurrencies.
        rows = self.users if self.fit or self.rung.startswith("batch") else max(options.concurrency)
        return ["servers.hf", *common, *RUNGS[self.rung].format(batch=rows).split()]


@dataclass(frozen=True)
class Sample:
    """One reading of /metrics; names without their prefix, the reason of a waste after a colon."""

    at_ns: int
    values: dict[str, float]


def cells(options: Options) -> list[Cell]:
    """What is measured, in order: cells that can share a server follow each other."""
    first = [Cell(rung, users, options.kv_budget) for rung in options.rungs for users in options.concurrency]
    fit = [Cell(rung, options.fit_concurrency, options.fit, True) for rung in options.rungs if rung in FIT_RUNGS]
    return first + (fit if options.fit else [])


def readings(text: str) -> dict[str, float]:
    """The gauges of either server that the tables need, from the text of /metrics."""
    found: dict[str, float] = {}
    for name, labels, value in METRIC.findall(text):
        given = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if name == "cache_config_info":
            found |= {key: float(given[key]) for key in ("num_gpu_blocks", "block_size")}
        else:
            found[f"{name}:{given['reason']}" if "reason" in given else name] = float(value)
    return found


async def watch(url: str, seconds: float) -> list[Sample]:
    """Read /metrics ten times a second."""
    samples = []
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while (begun := time.monotonic()) < deadline:
            try:
                async with session.get(f"{url}/metrics") as response:
                    samples.append(Sample(time.monotonic_ns(), readings(await response.text())))
            except (aiohttp.ClientError, TimeoutError):
                pass  # one sample less; when the server is gone, the requests say so
            await asyncio.sleep(max(0.0, SAMPLE_SECONDS - (time.monotonic() - begun)))
    return samples


async def load(options: Options, users: int, url: str) -> tuple[list[Result], list[Sample]]:
    """Keep a server busy for the time of a cell, and watch it."""
    requests = paper(Load(workload="sharegpt", max_context=options.max_model_len))
    bodies = (request.body(options.model) for request in requests)
    loop = closed_loop(url, bodies, users, options.cell_seconds)
    exchanges, samples = await asyncio.gather(loop, watch(url, options.cell_seconds))
    return [read(exchange) for exchange in exchanges], samples


def measure(options: Options, users: int, program: Program, size: int) -> JSON:
    """Load a server and make the figures of a cell; `size` is the KV bytes of a token."""
    started, cpu = time.monotonic_ns(), time.process_time()
    results, samples = asyncio.run(load(options, users, program.url))
    share = (time.process_time() - cpu) / ((time.monotonic_ns() - started) / 1e9)
    program.check()
    begin, finish = (started + int(s * 1e9) for s in (options.warmup_seconds, options.cell_seconds))
    inside = [sample for sample in samples if begin <= sample.at_ns < finish]
    tokens = sum(made(result, finish) - made(result, begin) for result in results)
    errors = Counter(result.error for result in results if result.error)
    if not inside or not tokens:
        seen = f"{tokens} tokens and {len(inside)} samples of /metrics in the window"
        raise RunError(f"{seen}; errors: {dict(errors) or 'none'}")
    seconds = options.cell_seconds - options.warmup_seconds
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        **first_tokens(results, begin, finish),
        "requests_ended": sum(r.complete and not r.error and begin <= r.stamps[-1] < finish for r in results),
        "errors": errors,
        "kv": kv(inside, results, size),
        "allocator_fragmentation": allocator(inside),
        "held": held(inside),
        "client_cpu_share": share,
    }


def made(result: Result, at_ns: int) -> int:
    """Output tokens that had come by a time."""
    index = bisect_right(result.stamps, at_ns)
    return result.counts[index - 1] if index else 0


def first_tokens(results: Iterable[Result], begin: int, finish: int) -> JSON:
    """Median TTFT of the requests that waited for their first token at some time in the window.

    Some still wait at its end; when the median is among them or beyond, it is only the least that it can be.
    """
    waited = []
    for result in results:
        first = result.stamps[0] if result.stamps else finish
        if not result.error and begin <= first and result.sent_ns < finish:
            waited.append(((min(first, finish) - result.sent_ns) / 1e9, first < finish))
    middle = median_low(seconds for seconds, _ in waited) if waited else None
    return {"ttft_p50": middle, "ttft_exact": all(seen for seconds, seen in waited if seconds <= (middle or 0))}


def kv(samples: Sequence[Sample], results: Sequence[Result], size: int) -> JSON:
    """Mean bytes of the KV cache in the window.

    `live_seen` is what the client knows of: prompt and output tokens of requests whose first token has come and whose
    last has not, also when the server has dropped them from its cache for a while. vLLM does not export live bytes:
    `live_least` is `live_seen`, or once it has preempted, all that is allocated but for one token in each last block.
    """

    def mean(name: str) -> float:
        return fmean(sample.values.get(name, 0.0) for sample in samples)

    seen = fmean(stored(results, sample.at_ns) for sample in samples) * size
    if blocks := samples[0].values.get("num_gpu_blocks"):
        # The pool keeps one block back, and usage is a share of the others.
        capacity = (blocks - 1) * samples[0].values["block_size"] * size
        allocated = mean("kv_cache_usage_perc") * capacity
        last_blocks = mean("num_requests_running") * (samples[0].values["block_size"] - 1) * size
        least = allocated - last_blocks if samples[-1].values.get("num_preemptions_total") else seen
        known = {"live": None, "live_least": least, "live_seen": seen}
        return {"capacity": capacity, "allocated": allocated, **known, "waste": {"fragmentation": allocated - least}}
    sizes = {name: mean(f"kv_{name}_bytes") for name in ("capacity", "allocated", "live")}
    return sizes | {"live_seen": seen, "waste": {reason: mean(f"kv_waste_bytes:{reason}") for reason in REASONS}}


def stored(results: Iterable[Result], at_ns: int) -> int:
    """Tokens that the requests in flight had in the cache; the newest of each is not fed back yet."""
    flying = (r for r in results if r.stamps and r.stamps[0] <= at_ns and not (r.complete and r.stamps[-1] <= at_ns))
    return sum(result.prompt_tokens + made(result, at_ns) - 1 for result in flying)


def allocator(samples: Iterable[Sample]) -> float | None:
    """Mean share of what torch has reserved that no tensor holds; None where the server does not say."""
    found = [s.values["torch_fragmentation_ratio"] for s in samples if "torch_fragmentation_ratio" in s.values]
    return fmean(found) if found else None


def held(samples: Sequence[Sample]) -> JSON:
    """Sequences at once while more were waiting; `saturated` is the share of the window in which that was so."""
    full = [s.values["num_requests_running"] for s in samples if s.values.get("num_requests_waiting")]
    mean = fmean(full) if full else None
    return {"saturated": len(full) / len(samples), "mean": mean, "most": max(full, default=None)}


def run(options: Options, found: JSON) -> bool:
    """Measure all cells, one server at a time; a cell that fails is kept with its error. True when none failed."""
    config = transformers.AutoConfig.from_pretrained(resolve(options.model).source)
    size = bytes_per_token(config, getattr(torch, options.dtype).itemsize)
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    with Servers(options.out / "logs", START_SECONDS) as servers:
        rows = []
        for cell in cells(options):
            row = {**asdict(cell), "command": shlex.join(cell.command(options))}
            try:
                row |= measure(options, cell.users, serve(options, cell, servers), size)
            except RunError as error:
                row["failed"] = str(error)
                servers.stop()
            rows.append(row)
            write(options.out, found, row)
            said = row.get("failed") or f"{row['tokens_per_second']:.1f} tokens/s"
            print(f"{cell.rung}, {cell.users} in flight: {said}", file=sys.stderr)
    return not any("failed" in row for row in rows)


def serve(options: Options, cell: Cell, servers: Servers) -> Program:
    """The server that a cell needs: the one that runs if it was started alike, else a new one in its place."""
    if program := servers.programs.get(cell.server):
        time.sleep(SETTLE_SECONDS)  # the requests that were cut off end
        return program
    servers.stop()
    program = servers.start(cell.server, cell.command(options), serving.environment(options.model))
    servers.wait()
    return program


def write(out: Path, found: JSON, row: JSON) -> None:
    """Add a cell to what was found, or replace it, and write all figures and the page from them."""
    key = ("rung", "users", "budget", "fit")
    found["cells"] = [cell for cell in found["cells"] if any(cell[k] != row[k] for k in key)] + [row]
    found["cells"].sort(key=lambda cell: ((*RUNGS, "vllm").index(cell["rung"]), cell["users"]))
    text = json.dumps(found, indent=1).replace(str(Path.home()), "~")
    (out / "ladder.json").write_text(text + "\n")
    (out / "ladder.md").write_text(page(json.loads(text)))


PAGE = """# {model}, {dtype}, on {device_name}

A closed loop sent the same requests (log-normal, means of 161 prompt and 338 output tokens) to one server at a time.
Tokens/s, and the means of /metrics read ten times a second, are of the seconds that the table gives, after a warm-up.

| rung | in flight | seconds | tokens/s | TTFT p50 | KV allocated | live | {reasons} | torch |
|---|---|---|---|---|---|---|---|---|---|---|---|
{first}

Live and waste are shares of the allocated bytes; torch: share of what its allocator has reserved that no tensor holds.
vLLM does not export live bytes: its share is the least that it can be, from the client's own token counts or, where
sequences were preempted, from the size of a block; its waste is the most. A time with > is of requests half of which
had no token when the cell ended. *: fewer requests ended than were in flight, so that a batch rung was
not seen at the end of its batches, where it is slowest.

With a fixed KV budget and more requests in flight than fit, sequences held at once while more were waiting:

| rung | in flight | KV budget | mean | most | share of the time with some waiting | live | output tokens/s |
|---|---|---|---|---|---|---|---|
{second}

Made by:

{made_by}
"""


def page(found: JSON) -> str:
    """The two tables as Markdown."""
    tables = {
        "first": "\n".join(first_row(cell) for cell in found["cells"] if not cell["fit"]),
        "second": "\n".join(second_row(cell) for cell in found["cells"] if cell["fit"]) or "| not measured |",
        "reasons": " | ".join(REASONS),
        "made_by": "\n".join(f"    {command}" for command in found["made_by"]),
    }
    return PAGE.format(**found["options"], **{k: found[k] for k in ("dtype", "device_name")}, **tables)


def first_row(cell: JSON) -> str:
    """One row of the first table."""
    if "failed" in cell:
        return failed_row(cell, 12)
    kv, few = cell["kv"], "*" * (cell["requests_ended"] < cell["users"])
    ttft = f"{'> ' * (not cell['ttft_exact'])}{cell['ttft_p50']:.3f} s" if cell["ttft_p50"] is not None else ""
    row = [cell["rung"], cell["users"], f"{cell['seconds']:g}", f"{cell['tokens_per_second']:,.0f}{few}", ttft]
    row += [
        f"{kv['allocated'] / 1e9:.3f} GB",
        live(kv),
        *(percent(kv["waste"].get(r), kv["allocated"]) for r in REASONS),
    ]
    return f"| {' | '.join(map(str, row))} | {percent(cell['allocator_fragmentation'], 1)} |"


def second_row(cell: JSON) -> str:
    """One row of the second table."""
    if "failed" in cell:
        return failed_row(cell, 8)
    held = cell["held"]
    row = [cell["rung"], cell["users"], f"{cell['budget'] / 1e9:g} GB"]
    row += [f"{held[name]:.1f}" if held[name] is not None else "never full" for name in ("mean", "most")]
    row += [percent(held["saturated"], 1), live(cell["kv"]), f"{cell['tokens_per_second']:,.0f}"]
    return f"| {' | '.join(map(str, row))} |"


def failed_row(cell: JSON, columns: int) -> str:
    """A row with the last line of what went wrong; ladder.json has it all."""
    reason = cell["failed"].splitlines()[-1].strip().replace("|", "/")
    return f"| {cell['rung']} | {cell['users']} | failed: {reason} |" + " |" * (columns - 3)


def live(kv: JSON) -> str:
    """Live share of the allocated bytes; the least that it can be where the server does not say."""
    least = kv["live"] is None
    return ">= " * least + percent(kv["live_least" if least else "live"], kv["allocated"])


def percent(part: float | None, whole: float) -> str:
    """A share as text, empty when it is not known."""
    return "" if part is None or not whole else f"{part / whole:.1%}"


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.ladder", description=(__doc__ or "").partition("\n")[0])
    add, known = partial(parser.add_argument, metavar="..."), (*RUNGS, "vllm")
    add("--model", default="random:llama-7b", help="as for the servers")
    add("--concurrency", type=serving.numbers, default="1,32,128", help="requests in flight; '': no first table")
    add("--rungs", type=partial(serving.names, allowed=known), default=",".join(known), help=", ".join(known))
    add("--out", type=Path, default="ladder", help="folder for ladder.json, ladder.md and logs")
    add("--max-model-len", type=int, default=2048, help="prompt + output tokens")
    add("--cell-seconds", type=float, default=40, help="how long a cell is")
    add("--warmup-seconds", type=float, default=10, help="how much of its beginning does not count")
    add("--kv-budget", type=int, help="bytes of KV cache for every server; default: each one's own choice")
    add("--fit", type=int, help="bytes of KV cache for the second table: how many sequences fit")
    add("--fit-concurrency", type=int, default=256, help="requests in flight for it")
    add("--vllm-args", default="", help="more arguments for servers.vllm")
    return Options(**vars(parser.parse_args(arguments)))


def earlier(options: Options) -> JSON:
    """What the folder holds already, with this run's command; raises RunError if it was measured otherwise."""
    found = serving.about("cuda" if torch.cuda.is_available() else "cpu", options.dtype)
    found |= {"options": {**asdict(options), "out": str(options.out)}, "cells": [], "made_by": []}
    path = options.out / "ladder.json"
    before: JSON = json.loads(path.read_text()) if path.exists() else found
    for name in ("model", "max_model_len", "kv_budget"):
        was, now = before["options"][name], found["options"][name]
        if was != now:
            raise RunError(f"--out: {path} was measured with {name} {was}, not {now}: choose another folder")
    command = shlex.join(["python", "-m", "benchmarks.ladder", *sys.argv[1:]])
    return found | {"cells": before["cells"], "made_by": [*before["made_by"], command]}


def main() -> int:
    """Run the benchmark; 1 when a cell failed."""
    try:
        options = parse(sys.argv[1:])
        return 0 if run(options, earlier(options)) else 1
    except (RunError, ModelError) as error:
        print(f"benchmarks.ladder: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
