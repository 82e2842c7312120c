"""`python -m benchmarks.hf_server`: how fast `servers.hf` is beside a bare `generate` loop and `transformers serve`.

Ratios are taken within one run: all programs hold the same weights in the same dtype, get the same requests, use the
same number of threads and are measured in turn, in one order and then in the reverse (A B B A).
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers

from benchmarks import serving
from benchmarks.serving import JSON, RUNGS, Bare, Request, Servers, closed_loop, read
from experiment.run.stack import RunError
from servers.hf.kv import bytes_per_token
from servers.models import Model, ModelError, resolve
from servers.settings import cpu_cores

#: The order in which programs are measured: each rung stands near what it is held against.
ORDER = (
    *("bare", "sequential", "sequential-compile", "serve"),
    *("batch", "batch-static", "batch-static-compile", "continuous", "serve-cb"),
)
PEERS = dict.fromkeys(RUNGS, ("serve",)) | {
    "sequential": ("bare", "serve"),
    "sequential-compile": ("bare", "serve"),
    "continuous": ("serve-cb",),
}
PROMPT_TOKEN_IDS = range(300, 1300)
WARM_UP_TOKENS = 2
#: As many tokens a step as the engine of `servers.hf` takes, and the page size of `transformers serve`.
MAX_BATCH_TOKENS, PAGE_TOKENS = 2048, 256


@dataclass(frozen=True)
class Bench:
    """What is measured, and how every program runs the model; lengths are in tokens."""

    model: Model
    device: str
    dtype: str
    threads: int
    concurrency: tuple[int, ...]
    requests: int
    input_tokens: int
    output_tokens: int
    repeats: int
    rungs: tuple[str, ...]

    @property
    def pages(self) -> int:
        """Pages of the cache that `transformers serve` gets: room for twice the requests that run at once."""
        return 2 * max(self.concurrency) * -(-(2 * self.input_tokens + self.output_tokens) // PAGE_TOKENS)

    @property
    def kv_budget(self) -> int:
        """Bytes of these pages, which the continuous rung gets too."""
        config = transformers.AutoConfig.from_pretrained(self.model.source)
        return self.pages * PAGE_TOKENS * bytes_per_token(config, getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True)
class Cell:
    """One program at one concurrency in one repeat; TTFT in seconds, None where it cannot be compared."""

    program: str
    concurrency: int
    repeat: int
    seconds: float
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    ttft_p50: float | None
    client_cpu_share: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Output tokens that came, over the time from the first request to the last token."""
        return sum(self.output_tokens) / self.seconds


Measure = Callable[[Sequence[Request], int], Cell]


def prompts(bench: Bench) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Texts with the ids that they have for every program, each new, so that no cache of prefixes helps."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.model.source)
    rng = random.Random(0)  # noqa: S311 - load, not secrets
    while True:
        text = tokenizer.decode(rng.choices(PROMPT_TOKEN_IDS, k=bench.input_tokens))
        yield text, tuple(tokenizer(text)["input_ids"])


def our_body(model: Model, request: Request) -> JSON:
    """What `servers.hf` is asked for."""
    return {
        "model": model.name,
        "prompt": request.text,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def serve_body(model: Model, request: Request) -> JSON:
    """The same for `transformers serve`: it takes text only, has no `ignore_eos`, and sends a usage unasked.

    `generate` puts the model's own end of text where a configuration has none, so it is given an id that no token has.
    """
    generation = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return {
        "model": model.source,
        "prompt": request.text,
        "max_tokens": request.max_tokens,
        "stream": True,
        "generation_config": json.dumps(generation),
    }


def commands(bench: Bench) -> dict[str, list[str]]:
    """Module and arguments of the servers: the rungs, and the peers that they need."""
    common = ["--port", "{port}", "--dtype", bench.dtype]
    ours = ["servers.hf", "--model", bench.model.name, "--threads", str(bench.threads), *common]
    batch = max(bench.concurrency)
    found = {rung: [*ours, *RUNGS[rung].format(batch=batch).split()] for rung in bench.rungs}
    serve = ["transformers.cli.transformers", "serve", bench.model.source, "--host", "127.0.0.1", *common]
    serve += ["--device", bench.device, "--log-level", "error"]
    if "continuous" in found:
        found["continuous"] += ["--kv-budget", str(bench.kv_budget)]
        sizes = f"--cb-num-blocks {bench.pages} --cb-max-batch-tokens {MAX_BATCH_TOKENS}"
        found["serve-cb"] = [*serve, "--continuous-batching", *sizes.split()]
    if any("serve" in PEERS[rung] for rung in bench.rungs):
        found["serve"] = serve
    return found


def start(bench: Bench, stack: ExitStack) -> dict[str, Measure]:
    """Start every program; returns how each is measured, in order."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    servers = stack.enter_context(Servers(logs, 600))
    for name, command in commands(bench).items():
        servers.start(name, command, serving.environment(bench.model.name, bench.threads))
    measures: dict[str, Measure] = {}
    if any("bare" in PEERS[rung] for rung in bench.rungs):
        bare = stack.enter_context(Bare(bench.model.source, bench.device, bench.dtype, bench.threads))
        measures["bare"] = partial(measure_bare, bare)
    servers.wait()
    for name, program in servers.programs.items():
        body = partial(serve_body if name.startswith("serve") else our_body, bench.model)
        measures[name] = partial(measure_http, name, program.url, body)
    return {name: measures[name] for name in ORDER if name in measures}


def measure_http(name: str, url: str, body: Callable[[Request], JSON], requests: Sequence[Request], users: int) -> Cell:
    """Send all requests with a number of users in a closed loop; raises RunError when one fails."""
    cpu, begun = time.process_time(), time.monotonic()
    exchanges = asyncio.run(closed_loop(url, map(body, requests), users))
    share = (time.process_time() - cpu) / (time.monotonic() - begun)
    results = [read(exchange) for exchange in exchanges]
    if error := next((result.error for result in results if result.error), None):
        raise RunError(f"{name}: a request failed: {error}")
    seconds = (max(result.stamps[-1] for result in results) - results[0].sent_ns) / 1e9
    prompt_tokens = tuple(result.prompt_tokens for result in results)
    output_tokens = tuple(result.output_tokens for result in results)
    return Cell(name, users, 0, seconds, prompt_tokens, output_tokens, median(r.ttft for r in results), share)


def measure_bare(bare: Bare, requests: Sequence[Request], users: int) -> Cell:
    """Run the requests one after the other; a loop has no queue, so TTFT is given at a concurrency of 1 only."""
    seconds, output_tokens, ttfts = bare.run(requests, first_tokens=users == 1)
    prompt_tokens = tuple(len(request.ids) for request in requests)
    return Cell("bare", users, 0, seconds, prompt_tokens, output_tokens, median(ttfts) if ttfts else None)


def run(bench: Bench, cells: list[Cell]) -> None:
    """Measure every program at every concurrency, in order and in the reverse order by turns; adds to the cells."""
    source = prompts(bench)
    with ExitStack() as stack:
        measures = start(bench, stack)
        for users, repeat in itertools.product(bench.concurrency, range(bench.repeats)):
            count = max(bench.requests, 2 * users if users > 1 else 0)
            requests = [Request(*prompt, bench.output_tokens) for prompt in itertools.islice(source, count)]
            for name in list(measures)[:: -1 if repeat % 2 else 1]:
                measures[name]([Request(*prompt, WARM_UP_TOKENS) for prompt in itertools.islice(source, users)], users)
                cell = replace(measures[name](requests, users), repeat=repeat)
                cells.append(cell)
                speed = f"{cell.tokens_per_second:.1f} tokens/s"
                print(f"{users} in flight, repeat {repeat}, {name}: {speed}", file=sys.stderr)


def compare(cells: Sequence[Cell], rung: str, peer: str, users: int) -> JSON:
    """The ratios of a rung to its peer, repeat by repeat; `same_work` says that all token counts were equal."""
    own, other = ({c.repeat: c for c in cells if (c.program, c.concurrency) == (n, users)} for n in (rung, peer))
    pairs = [(own[repeat], other[repeat]) for repeat in own if repeat in other]
    same = all((a.prompt_tokens, a.output_tokens) == (b.prompt_tokens, b.output_tokens) for a, b in pairs)
    figures: JSON = {"rung": rung, "peer": peer, "concurrency": users, "same_work": same}
    for name in ("tokens_per_second", "ttft_p50"):
        values = [(getattr(a, name), getattr(b, name)) for a, b in pairs]
        if values and all(None not in value for value in values):
            ratios = [a / b for a, b in values]
            figures[name] = {
                "rung": median(a for a, _ in values),
                "peer": median(b for _, b in values),
                "ratio": median(ratios),
                "range": [min(ratios), max(ratios)],
            }
    return figures


def table(comparisons: Sequence[JSON]) -> str:
    """The comparisons as text: tokens/s, and TTFT in milliseconds."""
    titles = ("tokens/s: rung, peer", "ratio (range)", "TTFT ms: rung, peer", "ratio (range)")
    lines = [f"{'rung':<22}{'peer':<10}{'in flight':>9} " + " ".join(f"{title:>20}" for title in titles)]
    for c in comparisons:
        line = f"{c['rung']:<22}{c['peer']:<10}{c['concurrency']:>9}"
        for name, scale in (("tokens_per_second", 1), ("ttft_p50", 1000)):
            line += _columns(c[name], scale) if name in c else f" {'-':>20} {'-':>20}"
        lines.append(line + ("" if c["same_work"] else "  NOT VALID: the token counts differ"))
    return "\n".join(lines)


def _columns(figures: JSON, scale: float) -> str:
    low, high = figures["range"]
    both = f"{figures['rung'] * scale:.1f}, {figures['peer'] * scale:.1f}"
    ratio = f"{figures['ratio']:.3f} ({low:.3f}-{high:.3f})"
    return f" {both:>20} {ratio:>20}"


def parse(arguments: Sequence[str]) -> tuple[Bench, Path | None]:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.hf_server", description=(__doc__ or "").partition("\n")[0])
    add = partial(parser.add_argument, metavar="...")
    add("--model", default="random:gpt2", help="a model with weights on disk")
    add("--concurrency", type=serving.numbers, default="1,16", help="requests in flight, one cell each")
    add("--requests", type=int, default=4, help="requests of a cell, at the least twice the concurrency above 1")
    add("--input-tokens", type=int, default=24, help="about how long a prompt is")
    add("--output-tokens", type=int, default=10, help="how long an output is")
    add("--repeats", type=int, default=4, help="how often each cell is measured; an even number is fair to both")
    some = "sequential,batch,batch-static,continuous"
    add("--rungs", type=partial(serving.names, allowed=PEERS), default=some, help=", ".join(PEERS))
    add("--out", type=serving.new_file, help="file for all figures, as JSON")
    given = vars(parser.parse_args(arguments))
    out, model = given.pop("out"), resolve(given.pop("model"))
    if not model.weights:
        raise ModelError(f"--model: {model.name!r} has no weights on disk, and `transformers serve` makes none")
    gpu = torch.cuda.is_available()
    threads = len(cpu_cores(None))
    return Bench(model, "cuda" if gpu else "cpu", "bfloat16" if gpu else "float32", threads, **given), out


def report(bench: Bench, cells: Sequence[Cell], out: Path | None) -> bool:
    """Print the comparisons of what was measured, and write it all to a file; True when the work was the same."""
    pairs = [(rung, peer, users) for users in bench.concurrency for rung in bench.rungs for peer in PEERS[rung]]
    comparisons = [compare(cells, *pair) for pair in pairs]
    print(table(comparisons))
    if out:
        found = serving.about(bench.device, bench.dtype) | {"options": asdict(bench), "commands": commands(bench)}
        rows = [asdict(cell) | {"tokens_per_second": cell.tokens_per_second} for cell in cells]
        text = json.dumps(found | {"comparisons": comparisons, "cells": rows}, indent=1) + "\n"
        out.write_text(text.replace(str(Path.home()), "~"))
    return all(comparison["same_work"] for comparison in comparisons)


def main() -> int:
    """Run the benchmark; 1 when a program fails or the work was not the same. What was measured before is reported."""
    cells: list[Cell] = []
    try:
        bench, out = parse(sys.argv[1:])
    except ModelError as error:
        print(f"benchmarks.hf_server: {error}", file=sys.stderr)
        return 1
    try:
        run(bench, cells)
    except RunError as error:
        print(f"benchmarks.hf_server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        same = report(bench, cells, out) if cells else False
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
