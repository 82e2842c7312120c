"""The report of a run: one HTML page in two languages, charts as files, tables and figures. It computes nothing."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import yaml

from experiment.analysis.analyse import analyse
from experiment.analysis.results import JSON, Results, damage_named, load, write_tables
from experiment.analysis.steady import has_mean
from experiment.report import caches, charts, layers, look, sentence, tables
from experiment.report.formats import filters
from experiment.report.look import Frame
from experiment.report.paging import sketch
from experiment.report.quantiles import quantiles
from experiment.run.kv import REASONS
from experiment.words import LANGUAGES, Words, findings

Drawn = dict[str, dict[str, str]]


def write(folder: Path) -> JSON:
    """Analyse the run in `folder` and write its report, charts, tables and summary beside its records.

    Returns the summary; raises ResultError, OSError.
    """
    results = load(folder)
    with damage_named(folder):
        figures = analyse(results)
        summary = {"headline": sentence.verdict(frame_of(figures, "en"), figures), **figures}
        text = json.dumps(summary, indent=2, allow_nan=False)
        drawn = draw(results, summary)
        html = page(results, summary, drawn)
    write_tables(results)
    tables.write(folder, summary)
    write_charts(folder / "charts", drawn)
    (folder / "summary.json").write_text(text + "\n")
    (folder / "report.html").write_text(html, encoding="utf-8")
    return summary


def frame_of(summary: JSON, language: str) -> Frame:
    """What all charts and tables in a language share."""
    return Frame(Words(language), summary["targets"], summary["arrival"] == "closed")


def draw(results: Results, summary: JSON) -> Drawn:
    """All charts as SVG by language and name."""
    rows = list(quantiles(results))
    attainment = results.plan.get("attainment")
    return {language: _draw(results, summary, rows, frame_of(summary, language), attainment) for language in LANGUAGES}


def _draw(
    results: Results, summary: JSON, rows: Sequence[JSON], frame: Frame, attainment: float | None
) -> dict[str, str]:
    found = charts.draw(frame, summary, rows, attainment) | caches.draw(frame, summary)
    return found | layers.draw(frame, results.memory, summary)


def write_charts(folder: Path, drawn: Drawn) -> None:
    """Write every chart as SVG in each language, and as PNG in English, whose letters every machine has."""
    for language, named in drawn.items():
        (folder / language).mkdir(parents=True, exist_ok=True)
        for name, text in named.items():
            (folder / language / f"{name}.svg").write_text(text, encoding="utf-8")
            if language == "en":
                (folder / language / f"{name}.png").write_bytes(look.png(text))


def page(results: Results, summary: JSON, drawn: Drawn) -> str:
    """Render the page; everything it needs is inside, so that it opens without a network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiment.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters())
    told = (findings.rule, findings.found, findings.search_end, findings.adds)
    environment.globals.update({function.__name__: function for function in told})
    known, shown = _known(summary), list(_sampled(summary))
    frames = {language: frame_of(summary, language) for language in LANGUAGES}
    return environment.get_template("page.html.j2").render(
        languages=LANGUAGES,
        frames=frames,
        headlines={language: sentence.verdict(frame, summary) for language, frame in frames.items()},
        all_details={language: sentence.details(frame, summary) for language, frame in frames.items()},
        lead=charts.lead(frames["en"], summary, drawn["en"]),
        limited=_limited(frames["en"], summary),
        full=caches.limited_by("memory", frames["en"], summary),
        no_mean=[] if frames["en"].closed else _no_mean(summary),
        all_charts=drawn,
        summary=summary,
        plan=results.plan,
        plan_yaml=yaml.safe_dump(results.plan, sort_keys=False, allow_unicode=True).strip(),
        environment=results.environment,
        folder=results.folder.name,
        known=known,
        latencies={name: metric for name, metric in charts.LATENCIES.items() if metric in known},
        drawn_latencies=charts.shown(frames["en"]),
        sections=_sections(summary),
        sketch=sketch(),
        reasons=REASONS,
        columns=list(dict.fromkeys((layer, name) for layer, _, name in shown)),
        gpus=list(dict.fromkeys(gpu for _, gpu, _ in shown if gpu)),
        sources=_sources(summary, results.plan),
        no_bytes=_no_bytes(summary),
        no_allocator=_no_allocator(summary),
        sampled=results.timeline is not None or bool(results.memory.caches),
    )


def _known(summary: JSON) -> set[str]:
    """The metrics of which any target has a figure at any level."""
    kept = [figures for level in summary["levels"] for figures in level["targets"].values()]
    return {metric for figures in kept for metric, value in figures.items() if value is not None}


def _sections(summary: JSON) -> list[str]:
    """What the page has, in its order."""
    found = [name for name in ("saturation", "ladder") if summary.get(name)]
    return ["latency", "tradeoff", *found, "memory", "paging", "kv", "figures", "gates", "cells", "repeat"]


def _sampled(summary: JSON) -> Iterator[tuple[str, str, str]]:
    """What was sampled of memory, but for the KV cache: the layer, the GPU or "", and what was sampled in it."""
    kept = [figures["memory"] for level in summary["levels"] for figures in level["targets"].values()]
    for layer, of_gpu in (("device", True), ("process", True), ("host", False), ("allocator", False)):
        for name in dict.fromkeys(name for memory in kept for name in memory.get(layer, {})):
            yield (layer, *name.split(" ", 2)[1:]) if of_gpu else (layer, "", name)


def _no_mean(summary: JSON) -> list[tuple[float, str]]:
    """The levels and targets whose latencies have no mean."""
    levels = summary["levels"]
    return [(one["level"], name) for one in levels for name, own in one["targets"].items() if not has_mean(own)]


def _limited(frame: Frame, summary: JSON) -> dict[str, list[str]]:
    """The servers that held so many sequences for another reason than their memory, by that reason."""
    return {limit: own for limit in ("load", "other") if (own := caches.limited_by(limit, frame, summary))}


def _sources(summary: JSON, plan: JSON) -> dict[tuple[str, int | None], list[str]]:
    """The servers whose live tokens come from the same source, by it and the size of a block.

    `tokens` are those of which the bytes of a token are not known, `tokens_at_url` those that ran already.
    """
    at_url = {target["name"] for target in plan["targets"] if target.get("url")}
    found: dict[tuple[str, int | None], list[str]] = {}
    kept = {t: kv for level in summary["levels"] for t, f in level["targets"].items() if (kv := f["memory"].get("kv"))}
    for target, kv in kept.items():
        found.setdefault((kv["live_source"], kv["block_size"]), []).append(target)
    for target in (target for target, kv in kept.items() if kv["unit"] == "tokens"):
        found.setdefault(("tokens_at_url" if target in at_url else "tokens", None), []).append(target)
    return found


def _no_bytes(summary: JSON) -> list[str]:
    """The servers whose KV cache is known in tokens or blocks alone, so that a chart of bytes leaves them out."""
    kept = [(t, f["memory"].get("kv")) for level in summary["levels"] for t, f in level["targets"].items()]
    return list(dict.fromkeys(target for target, kv in kept if kv and kv["unit"] != "bytes"))


def _no_allocator(summary: JSON) -> list[str]:
    """The servers that say nothing of their allocator, where another one does."""
    memories = [(t, f["memory"]) for level in summary["levels"] for t, f in level["targets"].items()]
    known = {target for target, memory in memories if "allocator" in memory}
    return list(dict.fromkeys(target for target, _ in memories if target not in known)) if known else []
