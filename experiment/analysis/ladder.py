"""What each rung of the ladder adds, from one request at a time up to vLLM: the gain taken apart.

Static batching alone is a rung of its own. Continuous batching and paging come together in Transformers, so that one
ratio holds both. From there to vLLM everything else changes at once: its kernels, its scheduler, its sampler.
"""

import math
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise

from experiment.analysis import stats
from experiment.analysis.results import JSON, CellResult

# The main rungs in their order, and what is new in each.
MAIN = {
    "sequential": "",
    "batch": "batching",
    "continuous": "continuous batching and paging",
    "vllm": "kernels and scheduling",
}
# Side rungs: each differs in one thing from the rung that it leaves.
SIDES = (
    ("sequential", "sequential-compile", "compile"),
    ("batch", "batch-static", "cache reserved for the maximum length"),
    ("batch-static", "batch-static-compile", "compile"),
)


def steps(targets: Sequence[JSON]) -> Iterator[tuple[str, str, str]]:
    """Yield the steps between targets of a plan as from, to and what the second adds.

    There are none unless some step adds one thing alone: sequential against vLLM takes nothing apart.
    """
    by_rung: dict[str, str] = {}
    for target in targets:
        if found := rung(target):
            by_rung.setdefault(found, target["name"])
    mains = [name for name in MAIN if name in by_rung]
    main = [(low, up, _between(low, up)) for low, up in pairwise(mains)]
    sides = [side for side in SIDES if side[0] in by_rung and side[1] in by_rung]
    if sides or len(mains) > 2:
        yield from ((by_rung[low], by_rung[up], adds) for low, up, adds in [*main, *sides])


def _between(low: str, up: str) -> str:
    """What all rungs above `low` up to `up` add."""
    order = list(MAIN)
    return " + ".join(MAIN[name] for name in order[order.index(low) + 1 : order.index(up) + 1])


def shared(cells: Sequence[CellResult], rungs: Collection[str]) -> list[CellResult]:
    """The cells of a level in the repeats that all of these rungs ran: their steps multiply to the whole gain."""
    ran: dict[int, set[str]] = {}
    for cell in cells:
        ran.setdefault(cell.repeat, set()).add(cell.target)
    return [cell for cell in cells if ran[cell.repeat].issuperset(rungs)]


def product(steps: Sequence[JSON]) -> JSON | None:
    """The main way at the highest level as factors of one gain with its interval.

    `steps` are those of a summary. None unless two steps or more follow each other, over the same repeats: the
    geometric means of these multiply to that of the whole.
    """
    last = max((step["level"] for step in steps), default=None)
    way: list[JSON] = []
    for step in steps:
        if step["level"] == last and not (way and step["from"] != way[-1]["to"]):
            way.append(step)
    repeats = [step["ratio"]["repeats"] for step in way]
    if len(way) < 2 or len(set(map(len, repeats))) > 1:
        return None
    whole = asdict(stats.ratio_of_pairs([math.prod(factors) for factors in zip(*repeats, strict=True)]))
    if any(step["ratio"]["verdict"] == "invalid" for step in way):
        whole["verdict"] = "invalid"
    factors = [{"value": step["ratio"]["value"], "adds": step["adds"]} for step in way]
    return {"level": last, "from": way[0]["from"], "to": way[-1]["to"], "factors": factors, **whole}


def rung(target: JSON) -> str | None:
    """The rung that a target of a plan is; None for a server that is known by its URL alone."""
    if target["kind"] == "vllm":
        return "vllm"
    if target["kind"] != "hf":
        return None
    words = shlex.split(str(target.get("args") or "").replace("=", " "))
    options = {name: value for name, value in pairwise([*words, ""]) if name.startswith("--")}
    engine = options.get("--engine", "sequential")
    compiled = options.get("--compile", "false").lower() not in ("false", "0", "no")
    # What is compiled has a static cache, of one row where requests run one at a time.
    static = options.get("--cache") == "static" or (compiled and engine == "batch")
    return f"{engine}{'-static' if static else ''}{'-compile' if compiled else ''}"
