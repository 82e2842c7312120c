"""`python -m benchmarks.published docs/results/h200`: the tables of that folder's page, from the data beside it.

The folder has what `make gpu-proof` collected of some of its steps, by their names. What the PagedAttention paper (Kwon
et al., SOSP'23), vLLM's launch post (2023-06-20) and the experiment that this project grew out of measured stands
beside it.
"""

import argparse
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from experiment.analysis.stats import ratio_of_pairs
from experiment.analysis.steady import has_mean
from experiment.report.caches import PAPER
from experiment.run.stack import joined

JSON = dict[str, Any]
#: Sequences held at once, of OPT-13B with ShareGPT at 2 requests/s (Fig. 13 of the paper).
PAPER_HELD = {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "vLLM": 30.42}
POST = "14 to 24"
#: Seconds for the four inputs: Transformers one after another, vLLM all at once.
ORIGINAL = (0.91, 0.09)
# The runs of which each table of latency at rising rates is made.
CURVES = {"paper": ("paper", "paper-vllm"), "paper-13b": ("paper-13b-static", "paper-13b-paged", "paper-13b-vllm")}


def times(ratio: JSON) -> str:
    """A ratio with its interval, which one repeat does not have."""
    interval = "" if ratio["low"] is None else f" ({ratio['low']:,.2f} to {ratio['high']:,.2f})"
    return f"{ratio['value']:,.2f}{interval}"


def row(*cells: object) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def table(*head: str) -> Iterator[str]:
    """The head of a table in Markdown, after an empty line."""
    yield from ("", row(*head), row(*["---"] * len(head)))


def speed(summary: JSON, plan: JSON) -> Iterator[str]:
    """What each target is, and its throughput and latency at each level of a closed loop."""
    yield from options(plan)
    yield from table(
        "in flight",
        "server",
        "tokens/s",
        f"times {summary['baseline']}",
        "TTFT p50",
        "TPOT p50",
        "GPU busy",
        "steady for",
    )
    for level, target, figures in each(summary):
        ratio = level["ratios"].get(target, {}).get("output_throughput")
        windows = [
            (cell["window_ns"][1] - cell["window_ns"][0]) / 1e9
            for cell in summary["cells"]
            if (cell["target"], cell["level"]) == (target, level["level"])
        ]
        yield row(
            level["level"],
            target,
            f"{figures['output_throughput_mean']:,.0f}",
            times(ratio) if ratio else "",
            f"{figures['ttft_seconds']['p50']:.3f} s",
            f"{figures['tpot_seconds']['p50'] * 1e3:.1f} ms",
            ", ".join(f"{gpu['utilization']['mean']:.0%}" for gpu in figures["gpus"].values() if "utilization" in gpu),
            f"{min(windows):.1f} to {max(windows):.1f} s",
        )


def options(*plans: JSON) -> Iterator[str]:
    """What each server was started with, after an empty line."""
    without = {"hf": "no options, so one request at a time", "vllm": "no options of its own"}
    said = {}
    for of, one in ((plan, one) for plan in plans for one in plan["targets"]):
        args = shlex.join(joined(of.get(f"{one['kind']}_args", ""), one["args"]))
        said[one["name"]] = "it ran already" if one["url"] else f"`{args}`" if args else without[one["kind"]]
    yield from ("", f"Servers: {'; '.join(f'`{name}`: {what}' for name, what in said.items())}.")


def client(runs: Mapping[str, JSON]) -> Iterator[str]:
    """How busy the load generator was in the worst cell of each run, and vLLM's GPUs at the last level.

    And how late it sent what had a schedule, and how often the monitor read the memory of the GPUs.
    """
    limits = ("of a core at most", "loop lag p99 at most", "sent late p99 at most")
    yield from table("run", *limits, "GPU busy under vLLM at the highest level", "memory read")
    for name, summary in runs.items():
        clients = [cell["client"] for cell in summary["cells"]]
        # Neither is known of a cell shorter than a second.
        known = [one for one in clients if one["cpu_share"] is not None and one["loop_lag_p99_seconds"] is not None]
        share, lag = (max((one[n] for one in known), default=math.nan) for n in ("cpu_share", "loop_lag_p99_seconds"))
        late = [one["send_lateness_p99_seconds"] for one in clients if one["send_lateness_p99_seconds"] is not None]
        sampled = {round(hz) for cell in summary["cells"] if (hz := cell["memory_samples_per_second"]) is not None}
        targets = summary["levels"][-1]["targets"]
        busy = [
            gpu["utilization"]["mean"]
            for target, figures in targets.items()
            for gpu in figures["gpus"].values()
            if target.startswith("vllm") and "utilization" in gpu
        ]
        worst = (f"{lag * 1e3:.1f} ms", f"{max(late) * 1e3:.1f} ms" if late else "")
        often = f"{' to '.join(f'{hz}' for hz in sorted({min(sampled), max(sampled)}))} Hz" if sampled else ""
        yield row(name, f"{share:.0%}", *worst, ", ".join(f"{one:.0%}" for one in busy), often)


def rates(plans: Sequence[JSON], summaries: Sequence[JSON]) -> Iterator[str]:
    """Normalized latency against the rate of arrivals, which is what the paper's Fig. 12 shows.

    Where a queue grew, or the cell was too short for what waited in it, there is no mean.
    """
    yield from options(*plans)
    yield from table(
        *("requests/s", "that came", "server", "normalized latency", "TTFT p50", "tokens/s"),
        *("running, sampled: mean, most", "KV cache set aside at most"),
    )
    for level, target, figures in (one for summary in summaries for one in each(summary)):
        known, kv = has_mean(figures), figures["memory"]["kv"]
        yield row(
            f"{level['level']:g}",
            f"{figures['offered_rate']:.2f}",
            target,
            f"{figures['normalized_latency'] * 1e3:.1f} ms/token" if known else "no mean",
            f"{figures['ttft_seconds']['p50']:.3f} s" if known else "no median",
            f"{figures['output_throughput_mean']:,.0f}",
            f"{kv['running']['mean']:.1f}, {kv['running']['max']:.0f}",
            f"{kv['allocated']['max'] / 2**30:.1f} of {kv['capacity']['max'] / 2**30:.1f} GiB",
        )


def each(summary: JSON) -> Iterator[tuple[JSON, str, JSON]]:
    """Each level with each target and its figures."""
    for level in summary["levels"]:
        for target, figures in level["targets"].items():
            yield level, target, figures


def spread(summary: JSON) -> Iterator[str]:
    """Each server on two GPUs held against itself on one, and what it holds on each."""
    yield from table("in flight", "server", "times the tokens/s of one GPU", "holds on GPU 0", "on GPU 1")
    for level, target, figures in each(summary):
        if not target.endswith("-2-gpus"):
            continue
        one = level["targets"][target.replace("-2-gpus", "-1-gpu")]
        held = [figures["memory"]["process"][f"GPU {gpu} held"]["mean"] / 1e9 for gpu in (0, 1)]
        yield row(level["level"], target, over(one, figures), *(f"{size:.2f} GB" for size in held))


def over(first: JSON, second: JSON) -> str:
    """The throughput of the second over that of the first, repeat by repeat."""
    pairs = zip(first["output_throughput"], second["output_throughput"], strict=True)
    return times(asdict(ratio_of_pairs([theirs / ours for ours, theirs in pairs])))


def interference(alone: JSON, together: JSON) -> Iterator[str]:
    """Each server under load while the other is too, held against itself alone."""
    yield from table("server", "tokens/s alone", "together", "together over alone")
    for (_, target, one), (_, _, both) in zip(each(alone), each(together), strict=True):
        means = (f"{figures['output_throughput_mean']:,.0f}" for figures in (one, both))
        yield row(target, *means, over(one, both))
    (share,) = (gate["found"][0]["share"] for gate in together["gates"] if gate["id"] == "together")
    yield ""
    yield f"In the worst cell both were under load, and measured, for {share:.0%} of its time."


def sampling(monitor: JSON) -> Iterator[str]:
    """What the monitor takes, beside bare loops and nvidia-smi, which read the memory alone, and another exporter."""
    shares = ("cpu_share", "gpu_sampling_cpu_share", "gpu_memory_cpu_share")
    yield from table(
        "program", "asked", "samples/s", "of a core", "to read GPUs", "their memory", "late p99", "scrape p99"
    )
    for one in monitor["monitor"]:
        late, scrape = (f"{one[name]['p99'] * 1e3:.2f} ms" for name in ("lateness_seconds", "scrape_seconds"))
        taken = (f"{one[name]:.2%}" for name in shares)
        yield row("monitor", f"{one['hz']} Hz", f"{one['samples_per_second']:.0f}", *taken, late, scrape)
    beside = {"bare_loop": "a loop that reads the memory alone", "c_loop": "the same in C", "nvidia_smi": "nvidia-smi"}
    for key, name in beside.items():
        for one in monitor[key]:
            share = f"{one['cpu_share']:.2%}"
            if "waking_cpu_share" in one:
                share += f" (waking up alone: {one['waking_cpu_share']:.2%})"
            yield row(name, f"{one['hz']} Hz", f"{one['samples_per_second']:.0f}", share, "", "", "", "")
    if one := monitor["exporter"]:
        scrape = f"{one['scrape_seconds']['p99'] * 1e3:.2f} ms"
        yield row(one["exporter"], "", "", f"{one['cpu_share']:.2%}", "", "", "", scrape)
    threads = [one["thread_cpu_shares"] for one in monitor["monitor"]]
    yield from table("thread of the monitor", *(f"of a core at {one['hz']} Hz" for one in monitor["monitor"]))
    for thread in sorted(threads[0], key=threads[0].__getitem__, reverse=True):
        yield row(f"`{thread}`", *(f"{one[thread]:.2%}" for one in threads))
    yield ""
    for gpu, held in monitor["monitor"][-1]["memory"].items():
        share = held["parts"]["unattributed"] / held["used"]
        yield f"Of the {held['used'] / 1e9:.2f} GB in use on GPU {gpu} (by its count), {share:.2%} are of no server."


def slowdown(measured: Sequence[JSON], what: str) -> Iterator[str]:
    """Throughput of servers with and without something that watches them."""
    yield from table("server", f"tokens/s without {what}", "with", "with over without", "pairs", "lowest", "highest")
    for one in measured:
        means = (f"{fmean(one['tokens_per_second'][name]):,.0f}" for name in ("without", "with"))
        at = f" ({one['hz']} Hz)" if "hz" in one else ""
        ratios = one["ratios"]
        yield row(
            one["server"] + at, *means, times(one), len(ratios), *(f"{end:.2f}" for end in (min(ratios), max(ratios)))
        )


def agreement(first: Path, second: Path) -> Iterator[str]:
    """The verdicts on throughput of the runs that two folders have both; raises OSError when a file is missing."""
    yield from table("run", "in flight", "compared", first.name, second.name, "verdicts agree")
    for name in sorted(names(first) & names(second)):
        found = [verdicts(read(folder / name / "summary.json")) for folder in (first, second)]
        for key, one in found[0].items():
            if other := found[1].get(key):
                same = "yes" if one["verdict"] == other["verdict"] else f"{one['verdict']}, {other['verdict']}"
                yield row(name, *key, times(one), times(other), same)


def names(folder: Path) -> set[str]:
    """The runs that a folder has."""
    return {path.parent.name for path in folder.glob("*/summary.json")}


def verdicts(summary: JSON) -> dict[tuple[float, str], JSON]:
    """The ratio of throughput of each comparison and of each step between rungs, by level and names."""
    found = {
        (level["level"], f"{target} over {summary['baseline']}"): ratios["output_throughput"]
        for level in summary["levels"]
        for target, ratios in level["ratios"].items()
    }
    steps = {(step["level"], f"{step['to']} over {step['from']}"): step["ratio"] for step in summary["ladder"]}
    return found | steps


def steps(ladder: JSON, same: JSON) -> Iterator[str]:
    """What each rung adds, in both runs."""
    yield from table("from", "to", "what is added", "in flight", "KV cache", "times the tokens/s")
    for summary in (ladder, same):
        for step in summary["ladder"]:
            budget = f"{summary['kv_budget'] / 2**30:g} GiB"
            yield row(step["from"], step["to"], step["adds"], step["level"], budget, times(step["ratio"]))


def cache(same: JSON) -> Iterator[str]:
    """What the allocated bytes held and how many sequences, beside the paper."""
    yield from table("system", "live", "sequences held at once", "most at once")
    for name, parts in PAPER.items():
        yield row(f"paper, Fig. 2 and 13: {name}", f"{parts['live']:.1%}", f"{PAPER_HELD[name]:.1f}", "")
    for target, figures in same["levels"][-1]["targets"].items():
        kv = figures["memory"]["kv"]
        low, high = kv["parts"]["live"]["share"]
        share = f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"
        yield row(target, share, f"{kv['running']['mean']:.1f}", f"{kv['running']['max']:.0f}")


def claims(ladder: JSON, same: JSON, classics: Sequence[JSON]) -> Iterator[str]:
    """The launch post's and the original experiment's figures beside ours; of the experiment ours may be several."""
    high = ladder["levels"][-1]
    yield from table("claim", "theirs", "here")
    of_all = high["ratios"]["vllm"]["output_throughput"]
    yield row(
        "launch post: vLLM over Transformers", POST, f"{times(of_all)} of `sequential`, {high['level']} in flight"
    )
    of_batch = over(high["targets"]["batch"], high["targets"]["vllm"])
    yield row("", "", f"{of_batch} of `batch`, {high['level']} in flight")
    last = same["levels"][-1]
    ratio = last["ratios"]["vllm"]["output_throughput"]
    yield row("", "", f"{times(ratio)} of `batch` in the same bytes, {last['level']} in flight")
    before, after = ORIGINAL
    claim = ("four inputs, one after another against at once", f"{before} s against {after} s: {before / after:.1f}")
    for number, classic in enumerate(classics):
        found = {finding["key"]: finding["figures"] for finding in classic["findings"]}
        took, split = found["faster"], found["split"]
        ours = f"{took['hf']:.2f} s against {took['together']:.2f} s: {took['times']:.1f}"
        yield row(*(("", "") if number else claim), ours)
        yield row("", "", f"{split['batching']:.1f} by taking them at once x {split['engine']:.1f} by all else")


def page(folder: Path) -> str:
    """The tables of all that a folder has; raises OSError when a file cannot be read."""
    runs = {path.parent.name: read(path) for path in sorted(folder.glob("*/summary.json"))}
    plans = {name: read(folder / name / "plan.json") for name in runs}
    files = {path.stem: read(path) for path in folder.glob("*.json")}
    curves = {title: [name for name in these if name in runs] for title, these in CURVES.items()}
    drawn = {name for these in curves.values() for name in these}
    parts = {f"Speed: {name}": speed(summary, plans[name]) for name, summary in runs.items() if name not in drawn}
    for title, these in curves.items():
        if these:
            found = ([of[name] for name in these] for of in (plans, runs))
            parts[f"Latency at rising rates: {title}"] = rates(*found)
    parts["Whether the load generator was fast enough"] = client(runs)
    if {"ladder", "same-memory"} <= {*runs}:
        ladder, same = runs["ladder"], runs["same-memory"]
        parts["What each rung adds"] = steps(ladder, same)
        parts["KV cache: same-memory beside the paper"] = cache(same)
    classics = [files[name] for name in sorted(files) if name.startswith("classic")]
    if {"ladder", "same-memory"} <= {*runs} and classics:
        parts["Beside other claims"] = claims(runs["ladder"], runs["same-memory"], classics)
    if "two-gpus" in runs:
        parts["One server on two GPUs"] = spread(runs["two-gpus"])
    if {"own-gpus-alone", "own-gpus-together"} <= {*runs}:
        parts["Two servers, each on a GPU of its own"] = interference(runs["own-gpus-alone"], runs["own-gpus-together"])
    if "monitor" in files:
        parts["What the monitor takes"] = sampling(files["monitor"])
        parts["Servers beside the monitor"] = slowdown(files["monitor"]["slowdown"], "the monitor")
    sampled = [one for name in sorted(files) if name.startswith("kv-sampling") for one in files[name]["results"]]
    if sampled:
        parts["Servers whose KV cache is sampled"] = slowdown(sampled, "sampling")
    return "\n".join("\n".join((f"### {title}", *lines, "")) for title, lines in parts.items())


def read(path: Path) -> JSON:
    """What a file holds."""
    found: JSON = json.loads(path.read_text())
    return found


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.published", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the data")
    parser.add_argument("--against", type=Path, help="folder of another run, whose verdicts are compared with these")
    given = parser.parse_args()
    runs = {folder: names(folder) for folder in (given.folder, given.against) if folder}
    for folder, found in runs.items():
        if not found:
            parser.error(f"{folder}: expected a folder with results, such as {folder}/quick/summary.json")
    if not set.intersection(*runs.values()):
        parser.error(f"{given.folder} and {given.against}: expected a run of the same name in both")
    print("\n".join(agreement(given.folder, given.against)) if given.against else page(given.folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
