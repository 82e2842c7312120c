"""The report of a run: tables as Parquet, figures as JSON and one HTML page. It renders and computes nothing."""

import json
import shlex
from pathlib import Path
from typing import Any

import jinja2

from experiment.analysis import analyse
from experiment.report import charts, layers
from experiment.report.charts import NAMES
from experiment.results import JSON, Results, damage_named, load, write_tables

LAYERS = {"device": "device", "process": "process", "host": "host, PSS", "allocator": "torch"}
REASONS = ("reserved", "padding", "finished", "fragmentation")
METRICS = {
    "ttft_seconds": "time to first token (TTFT)",
    "tpot_seconds": "time per output token (TPOT)",
    "e2e_seconds": "end-to-end latency (E2E)",
}


def write(folder: Path) -> JSON:
    """Analyse the run in `folder` and write summary.json, report.html and the Parquet tables beside its records.

    Returns the summary; raises ResultError, OSError.
    """
    results = load(folder)
    with damage_named(folder):
        summary = analyse(results)
        html = page(results, summary)
        text = json.dumps(summary, indent=2, allow_nan=False)
    write_tables(results)
    (folder / "summary.json").write_text(text + "\n")
    (folder / "report.html").write_text(html, encoding="utf-8")
    return summary


def page(results: Results, summary: JSON) -> str:
    """Render the page; everything it needs is inside, so that it opens without a network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiment.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(ms=_ms, number=_number, gib=_gib, amount=_amount, share=_share)
    return environment.get_template("page.html.j2").render(
        summary=summary,
        plan=results.plan,
        environment=results.environment,
        folder=results.folder.name,
        charts=charts.draw(summary) | layers.draw(results.memory, summary),
        command=_command(results.folder),
        names=NAMES,
        metrics=METRICS,
        reasons=REASONS,
        columns=_columns(summary),
        sources=_sources(summary),
    )


def _columns(summary: JSON) -> dict[tuple[str, str], str]:
    """The layers of memory that were sampled, and how the page names them."""
    kept = [figures["memory"] for level in summary["levels"] for figures in level["targets"].values()]
    found = {(layer, name): None for layer in LAYERS for memory in kept for name in memory.get(layer, {})}
    return {(layer, name): LAYERS[layer] if name == "held" else f"{LAYERS[layer]}: {name}" for layer, name in found}


def _sources(summary: JSON) -> JSON:
    """The figures of a KV cache of each server that has some, for where its live tokens come from."""
    found = [(t, f["memory"].get("kv")) for level in summary["levels"] for t, f in level["targets"].items()]
    return {target: figures for target, figures in found if figures}


def _command(folder: Path) -> str:
    """The command that repeats the run."""
    return shlex.join(["headroom", "compare", str(folder / "plan.json")])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"


def _number(value: Any, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _gib(value: float) -> str:
    return f"{value / 2**30:.1f}"


def _amount(value: float, unit: str) -> str:
    """Bytes in the largest unit of which there is at least one, or a count of tokens or blocks."""
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    scale, name = next(((s, n) for s, n in ((2**30, "GiB"), (2**20, "MiB")) if value >= s), (2**10, "KiB"))
    return f"{value / scale:,.1f} {name}"


def _share(ends: tuple[float | None, float | None]) -> str:
    """A share in percent, or the bounds between which it is."""
    texts = [_number(None if end is None else end * 100, 1) for end in ends]
    return " to ".join(dict.fromkeys(texts))
