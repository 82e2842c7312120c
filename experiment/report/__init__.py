"""The report of a run: tables as Parquet, figures as JSON and one HTML page. It renders and computes nothing."""

import json
import shlex
from pathlib import Path
from typing import Any

import jinja2

from experiment.report import charts
from experiment.results import JSON, Results, analyse, damage_named, load, write_tables

NAMES = {"hf": "HF", "vllm": "vLLM"}
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
    environment.filters.update(ms=_ms, number=_number, gib=_gib)
    return environment.get_template("page.html.j2").render(
        summary=summary,
        plan=results.plan,
        environment=results.environment,
        folder=results.folder.name,
        charts=charts.draw(results, summary),
        command=_command(results.plan),
        names=NAMES,
        metrics=METRICS,
    )


def _command(plan: JSON) -> str:
    """The command that repeats the run."""
    parts = ["headroom", "compare"]
    for name, value in plan.items():
        if value not in (None, ""):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(f"--{name.replace('_', '-')}={text}")
    return shlex.join(parts)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"


def _number(value: Any, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _gib(value: float) -> str:
    return f"{value / 2**30:.1f}"
