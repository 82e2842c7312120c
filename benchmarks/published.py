"""`python -m benchmarks.published docs/results/h200`: the tables of that folder's page, from the data beside it.

The folder has what `make gpu-proof` collected of the presets ladder and same-memory and of classic. What the
PagedAttention paper (Kwon et al., SOSP'23), vLLM's launch post (2023-06-20) and the experiment that this project grew
out of measured stands beside it.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiment.analysis.stats import ratio_of_pairs
from experiment.report.caches import PAPER

JSON = dict[str, Any]
#: Sequences held at once, of OPT-13B with ShareGPT at 2 requests/s (Fig. 13 of the paper).
PAPER_HELD = {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "vLLM": 30.42}
POST = "14 to 24"
#: Seconds for the four inputs: Transformers one after another, vLLM all at once.
ORIGINAL = (0.91, 0.09)


def times(ratio: JSON) -> str:
    """A ratio with its interval."""
    return f"{ratio['value']:,.2f} ({ratio['low']:,.2f} to {ratio['high']:,.2f})"


def row(*cells: object) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def table(*head: str) -> Iterator[str]:
    """The head of a table in Markdown, after an empty line."""
    yield from ("", row(*head), row(*["---"] * len(head)))


def speed(summary: JSON) -> Iterator[str]:
    """Throughput and latency of each target at each level."""
    yield from table(
        "in flight",
        "rung",
        "tokens/s",
        f"times {summary['baseline']}",
        "TTFT p50",
        "TPOT p50",
        "GPU busy",
        "steady for",
    )
    for level in summary["levels"]:
        for target, figures in level["targets"].items():
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
                ", ".join(f"{gpu['utilization']['mean']:.0%}" for gpu in figures["gpus"].values()),
                f"{min(windows):.1f} to {max(windows):.1f} s",
            )


def steps(ladder: JSON, same: JSON) -> Iterator[str]:
    """What each rung adds, in both runs."""
    yield from table("from", "to", "what is added", "in flight", "KV cache", "times the tokens/s")
    for summary in (ladder, same):
        for step in summary["ladder"]:
            budget = f"{summary['kv_budget'] / 2**30:g} GiB"
            yield row(step["from"], step["to"], step["adds"], step["level"], budget, times(step["ratio"]))


def cache(same: JSON) -> Iterator[str]:
    """What the allocated bytes held and how many sequences, beside the paper."""
    yield from table("system", "live", "sequences held at once", "most")
    for name, parts in PAPER.items():
        yield row(f"paper: {name}", f"{parts['live']:.1%}", f"{PAPER_HELD[name]:.1f}", "")
    for target, figures in same["levels"][-1]["targets"].items():
        kv = figures["memory"]["kv"]
        low, high = kv["parts"]["live"]["share"]
        share = f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"
        yield row(target, share, f"{kv['running']['mean']:.1f}", f"{kv['running']['max']:.0f}")


def claims(ladder: JSON, same: JSON, classic: JSON) -> Iterator[str]:
    """The launch post's and the original experiment's figures beside ours."""
    high = ladder["levels"][-1]
    found = {finding["key"]: finding["figures"] for finding in classic["findings"]}
    took = found["faster"]
    yield from table("claim", "theirs", "here")
    of_all = high["ratios"]["vllm"]["output_throughput"]
    yield row(
        "launch post: vLLM over Transformers", POST, f"{times(of_all)} of `sequential`, {high['level']} in flight"
    )
    batch, vllm = (high["targets"][name]["output_throughput"] for name in ("batch", "vllm"))
    of_batch = asdict(ratio_of_pairs([ours / theirs for theirs, ours in zip(batch, vllm, strict=True)]))
    yield row("", "", f"{times(of_batch)} of `batch`, {high['level']} in flight")
    last = same["levels"][-1]
    ratio = last["ratios"]["vllm"]["output_throughput"]
    yield row("", "", f"{times(ratio)} of `batch` in the same bytes, {last['level']} in flight")
    before, after = ORIGINAL
    yield row(
        "four inputs, one after another against at once",
        f"{before} s against {after} s: {before / after:.1f}",
        f"{took['hf']:.2f} s against {took['together']:.2f} s: {took['times']:.1f}",
    )
    split = found["split"]
    yield row("", "", f"{split['batching']:.1f} by taking them at once x {split['engine']:.1f} by all else")


def page(folder: Path) -> str:
    """All tables; raises OSError when a file is missing."""
    ladder, same = (json.loads((folder / name / "summary.json").read_text()) for name in ("ladder", "same-memory"))
    classic = json.loads((folder / "classic.json").read_text())
    parts = {
        "Speed: ladder": speed(ladder),
        "Speed: same-memory": speed(same),
        "What each rung adds": steps(ladder, same),
        "KV cache: same-memory beside the paper": cache(same),
        "Beside other claims": claims(ladder, same, classic),
    }
    return "\n".join("\n".join((f"### {title}", *lines, "")) for title, lines in parts.items())


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.published", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the data")
    print(page(parser.parse_args().folder), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
