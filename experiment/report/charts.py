"""The charts of speed: throughput, latencies and their distributions, goodput, saturation and the ladder."""

from collections.abc import Collection, Iterator, Sequence

import altair as alt

from experiment.analysis.results import JSON
from experiment.analysis.steady import has_mean
from experiment.report.bars import bars
from experiment.report.caches import limited_by
from experiment.report.look import (
    HEIGHT,
    INK,
    WIDTH,
    Chart,
    Frame,
    chosen,
    heading,
    in_unit,
    log_axis,
    log_ticks,
    room_for,
    svg,
    table,
)

LATENCIES = {
    "ttft": "ttft_seconds",
    "tpot": "tpot_seconds",
    "e2e": "e2e_seconds",
    "response": "response_seconds",
}
NO_MEAN = "\N{UPWARDS ARROW}"
# Where the axes of charts with several panels stand, so that the panels are in line.
EXTENT, PANEL = 46, WIDTH - 66


def draw(frame: Frame, summary: JSON, quantiles: Sequence[JSON], attainment: float | None) -> dict[str, str]:
    """Draw every chart of speed for which there are data; the keys are the names that the page uses.

    `quantiles` are rows of level, target, metric, share and value; `attainment` is the share of requests that must
    meet the limits.
    """
    levels = summary["levels"]
    found: dict[str, Chart | None] = {
        "throughput": _throughput(frame, levels),
        "latency": _latency_pair(frame, levels),
        **{name: _latency(frame, levels, name) for name in shown(frame)},
        **{f"cdf-{name}": _cdf(frame, levels, quantiles, name) for name in shown(frame)},
        "tradeoff": _tradeoff(frame, summary),
        "normalized": None if frame.closed else _normalized(frame, levels),
        "goodput": _goodput(frame, levels),
        "saturation": _saturation(frame, summary.get("saturation") or {}, attainment),
        "ladder": _ladder(frame, summary.get("ladder") or []),
    }
    return {name: svg(chart, f"{frame.words.language}-{name}") for name, chart in found.items() if chart is not None}


def lead(frame: Frame, summary: JSON, drawn: Collection[str]) -> list[str]:
    """The three charts that carry the verdict, by what was asked: a search, a schedule, a budget or a ladder."""
    if summary.get("saturation"):
        own = ["saturation", "tradeoff", "goodput"]
    elif not frame.closed:
        own = ["normalized", "response", "throughput"]
    elif len(limited_by("memory", frame, summary)) > 1:
        own = ["held", "waste", "throughput"]
    elif summary.get("ladder"):
        own = ["ladder", "throughput", "kv"]
    else:
        own = []
    order = dict.fromkeys([*own, "throughput", "latency", "kv"])
    return [name for name in order if name in drawn][:3]


def shown(frame: Frame) -> tuple[str, str, str]:
    """The latencies that have charts: for a whole answer, the one from when it was due where there is a schedule."""
    return "ttft", "tpot", "e2e" if frame.closed else "response"


def _figures(frame: Frame, levels: Sequence[JSON]) -> Iterator[tuple[JSON, JSON]]:
    """What a row of a chart begins with, and the figures of its target and level.

    `mark` is put over a latency that has no mean, as what waited would have waited longer in a longer run.
    """
    for level in levels:
        for target, figures in level["targets"].items():
            mark = "" if frame.closed or has_mean(figures) else NO_MEAN
            yield {"level": level["level"], "target": frame.name(target), "mark": mark}, figures


def _by_level(frame: Frame, rows: Sequence[JSON], *, titled: bool = True) -> alt.Chart:
    return table(rows).encode(x=frame.x_level([row["level"] for row in rows], titled=titled), **frame.by_target())


def _fit(title: str, *parts: alt.Chart, height: int = HEIGHT) -> Chart:
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    return alt.layer(*parts).properties(width=WIDTH, height=height, autosize=fit, title=heading(title))


def _throughput(frame: Frame, levels: Sequence[JSON]) -> Chart | None:
    rows = [
        row | {"value": value}
        for row, figures in _figures(frame, levels)
        for value in figures["output_throughput"]
        if value is not None
    ]
    if not rows:
        return None
    if len(levels) == 1:
        means = [(row, figures["output_throughput_mean"]) for row, figures in _figures(frame, levels)]
        known = [row | {"value": mean, "label": f"{mean:,.0f}"} for row, mean in means if mean is not None]
        return bars(frame, known, frame.words("axis.throughput"), rows)
    base, y = _by_level(frame, rows), alt.Axis(tickCount=5, format=",~f")
    line = base.mark_line().encode(y=alt.Y("mean(value):Q", title=None, axis=y))
    points = base.mark_point(filled=True, size=45, opacity=1).encode(y="value:Q")
    return _fit(frame.words("axis.throughput"), line, points, height=HEIGHT + 26)


def _percentiles(frame: Frame, levels: Sequence[JSON], metric: str) -> tuple[list[JSON], str]:
    """Rows of the median and the 99th percentile of a latency, and their unit."""
    known = [(row, figures[metric]) for row, figures in _figures(frame, levels) if figures.get(metric)]
    # A logarithmic axis has no place for a time of zero, which an output in one chunk has for TPOT.
    known = [(row, found) for row, found in known if found["p50"] > 0]
    if not known:
        return [], ""
    scale, unit = in_unit(frame.words, [found["p50"] for _, found in known])
    return [row | {name: found[name] * scale for name in ("p50", "p99")} for row, found in known], unit


def _lines(frame: Frame, rows: Sequence[JSON], *, titled: bool = True) -> list[alt.Chart]:
    """The median as a line, the 99th percentile as a dashed one."""
    base = _by_level(frame, rows, titled=titled)
    y = log_axis("p50:Q", [row[name] for row in rows for name in ("p50", "p99")])
    median = base.mark_line(point={"filled": True, "size": 45}).encode(y=y)
    tail = base.mark_line(strokeDash=[4, 3], point={"filled": False, "fill": "transparent", "size": 30})
    return [median, tail.encode(y="p99:Q"), *_marks(frame, rows, "p50")]


def _marks(frame: Frame, rows: Sequence[JSON], field: str) -> Iterator[alt.Chart]:
    """What is put over values that have no mean."""
    if marked := [row for row in rows if row["mark"]]:
        color = frame.by_target()["color"]
        text = table(marked).mark_text(dy=-11, fontSize=14, fontWeight=700)
        yield text.encode(x="level:Q", y=f"{field}:Q", text="mark:N", color=color)


def _latency(frame: Frame, levels: Sequence[JSON], name: str) -> Chart | None:
    rows, unit = _percentiles(frame, levels, LATENCIES[name])
    if rows and len(levels) == 1:
        return _percentile_bars(frame, rows, name, unit)
    return _fit(frame.words("axis.log", what=frame.words(name), unit=unit), *_lines(frame, rows)) if rows else None


def _percentile_bars(frame: Frame, rows: Sequence[JSON], name: str, unit: str) -> Chart:
    """The median as a bar, the 99th percentile as a stroke."""
    ends = [
        row | {"value": row["p50"], "most": row["p99"], "label": f"{row['p50']:,.1f} / {row['p99']:,.1f}"}
        for row in rows
    ]
    return bars(frame, ends, frame.words("axis.plain", what=frame.words(name), unit=unit))


def _latency_pair(frame: Frame, levels: Sequence[JSON]) -> Chart | None:
    """TTFT over TPOT on one axis of levels."""
    panels = []
    for name in ("ttft", "tpot"):
        rows, unit = _percentiles(frame, levels, LATENCIES[name])
        if rows and len(levels) == 1:
            panels.append(_percentile_bars(frame, rows, name, unit))
            panels[-1].autosize = alt.Undefined
            panels[-1].width = WIDTH - room_for([row["target"] for row in rows]) - 24
        elif rows:
            title = heading(frame.words("axis.log", what=frame.words(name), unit=unit))
            panels.append(alt.layer(*_lines(frame, rows)).properties(width=PANEL, height=75, title=title))
    if len(levels) == 1:
        return alt.vconcat(*panels, spacing=8) if panels else None
    return _stack(panels) if panels else None


def _stack(panels: Sequence[Chart]) -> Chart:
    """Panels one above the other, with one legend and their axes in line."""
    for panel in panels:
        for layer in panel.layer:
            if isinstance(layer.encoding.y, alt.Y) and isinstance(layer.encoding.y.axis, alt.Axis):
                layer.encoding.y.axis.minExtent = layer.encoding.y.axis.maxExtent = EXTENT
    stacked: Chart = alt.vconcat(*panels, spacing=8).resolve_scale(color="shared", shape="shared")
    return stacked


def _cdf(frame: Frame, levels: Sequence[JSON], quantiles: Sequence[JSON], name: str) -> Chart | None:
    """The share of requests that took at most so long: a panel for each of the chosen levels, on one axis of time."""
    shown = [level["level"] for level in chosen(levels)]
    rows = [row for row in quantiles if row["metric"] == LATENCIES[name] and row["level"] in shown and row["value"] > 0]
    if not rows:
        return None
    scale, unit = in_unit(frame.words, [row["value"] for row in rows])
    values = [row | {"value": row["value"] * scale, "target": frame.name(row["target"])} for row in rows]
    domain = [min(row["value"] for row in values), max(row["value"] for row in values)]
    panels = []
    for level in shown:
        own = [row for row in values if row["level"] == level]
        if own:
            last = level == max(row["level"] for row in values)
            title = frame.words("axis.log", what=frame.words(name), unit=unit) if last else None
            axis = alt.Axis(values=log_ticks(*domain), format=",~f", labels=last, labelOverlap="greedy")
            x = alt.X("value:Q", title=title, axis=axis, scale=alt.Scale(type="log", domain=domain, nice=False))
            y = alt.Y("share:Q", title=None, axis=alt.Axis(format="%", tickCount=2), scale=alt.Scale(domain=[0, 1]))
            line = table(own).mark_line(interpolate="step-after").encode(x=x, y=y, color=frame.by_target()["color"])
            panels.append(alt.layer(line).properties(width=PANEL, height=70, title=heading(frame.level(level))))
    return _stack(panels)


def _tradeoff(frame: Frame, summary: JSON) -> Chart | None:
    """Latency over throughput: one line a target, one point a level, and where each saturates."""
    metric = "e2e_seconds" if frame.closed else "response_seconds"
    known = [
        (row, figures)
        for row, figures in _figures(frame, summary["levels"])
        if figures.get(metric) and figures["output_throughput_mean"] is not None
    ]
    if not known:
        return None
    scale, unit = in_unit(frame.words, [figures[metric]["p50"] for _, figures in known])
    rows = [
        row | {"x": figures["output_throughput_mean"], "y": figures[metric]["p50"] * scale} for row, figures in known
    ]
    ends = _saturation_ends(frame, summary)
    axis, most = alt.Axis(tickCount=5, format=",~f"), max(row["x"] for row in [*rows, *ends])
    x = alt.X("x:Q", title=frame.words("axis.throughput"), axis=axis, scale=alt.Scale(domain=[0, 1.1 * most]))
    base = table(rows).encode(x=x, y=log_axis("y:Q", [row["y"] for row in rows]), **frame.by_target())
    line = base.mark_line().encode(order="level:Q")
    points = base.mark_point(filled=True, size=50, opacity=1)
    named = [level["level"] for level in chosen(summary["levels"], 4)]
    labels = table([row for row in rows if row["level"] in named]).mark_text(dx=6, dy=-6, align="left", fontSize=10)
    labels = labels.encode(x=x, y="y:Q", text="level:N", color=frame.by_target()["color"])
    marks = table(ends).mark_rule(strokeDash=[2, 3], strokeWidth=1.5)
    marks = marks.encode(x="x:Q", color=frame.by_target()["color"])
    what = frame.words("e2e" if frame.closed else "response")
    title = frame.words("axis.median_log", what=what, unit=unit)
    return _fit(title, line, points, labels, *([marks] if ends else []), height=HEIGHT + 30)


def _saturation_ends(frame: Frame, summary: JSON) -> list[JSON]:
    """The throughput of each target in the cell with the highest rate that met the limits."""
    rates = {target: found["rate"] for target, found in (summary.get("saturation") or {}).items()}
    return [
        {"x": cell["output_throughput"], "target": frame.name(cell["target"])}
        for cell in summary["cells"]
        if cell["search"] and cell["output_throughput"] and rates.get(cell["target"]) == cell["level"]
    ]


def _normalized(frame: Frame, levels: Sequence[JSON]) -> Chart | None:
    known = [(row, value) for row, figures in _figures(frame, levels) if (value := figures.get("normalized_latency"))]
    if not known:
        return None
    scale, unit = in_unit(frame.words, [value for _, value in known])
    rows = [row | {"value": value * scale} for row, value in known]
    if len(levels) == 1:
        own = [row | {"label": f"{row['value']:,.1f}"} for row in rows]
        return bars(frame, own, frame.words("axis.normalized_plain", unit=unit))
    y = log_axis("value:Q", [row["value"] for row in rows])
    line = _by_level(frame, rows).mark_line(point={"filled": True, "size": 45}).encode(y=y)
    return _fit(frame.words("axis.normalized", unit=unit), line, *_marks(frame, rows, "value"))


def _goodput(frame: Frame, levels: Sequence[JSON]) -> Chart | None:
    rows = [
        row | {"value": figures["goodput"]}
        for row, figures in _figures(frame, levels)
        if figures.get("goodput") is not None
    ]
    if not rows:
        return None
    if len(levels) == 1:
        own = [row | {"label": f"{row['value']:,.2f}"} for row in rows]
        return bars(frame, own, frame.words("axis.goodput"))
    y = alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=5), scale=alt.Scale(zero=True))
    parts = [_by_level(frame, rows).mark_line(point={"filled": True, "size": 45}).encode(y=y)]
    if not frame.closed:
        most = max(row["level"] for row in rows)
        offered = table([{"level": 0, "value": 0}, {"level": most, "value": most}])
        parts.insert(0, offered.mark_line(color=INK, strokeDash=[2, 3], strokeWidth=1).encode(x="level:Q", y="value:Q"))
    return _fit(frame.words("axis.goodput"), *parts)


def _saturation(frame: Frame, saturation: JSON, attainment: float | None) -> Chart | None:
    """What each cell of the search found: the share of requests that met the limits, by rate."""
    rows = [
        {"rate": cell["rate"], "value": cell["attainment"], "target": frame.name(target), "met": bool(cell["met"])}
        for target, found in saturation.items()
        for cell in found["cells"]
        if cell["attainment"] is not None
    ]
    if not rows:
        return None
    rates = [row["rate"] for row in rows]
    ticks = log_ticks(min(rates) / 1.01, max(rates) * 1.01)
    axis = alt.Axis(values=ticks, format=",~f", labelOverlap="greedy", grid=False)
    x = alt.X("rate:Q", title=frame.words("axis.open_log"), axis=axis, scale=alt.Scale(type="log", padding=12))
    y = alt.Y("value:Q", title=None, axis=alt.Axis(format="%", tickCount=4), scale=alt.Scale(domain=[0, 1]))
    base = table(rows).encode(x=x, y=y, **frame.by_target())
    met = base.transform_filter("datum.met").mark_point(filled=True, size=55, opacity=1)
    missed = base.transform_filter("!datum.met").mark_point(filled=False, size=45, fill="transparent")
    parts = [met, missed]
    ends = [
        {"rate": found["rate"], "target": frame.name(target)}
        for target, found in saturation.items()
        if found["rate"] is not None
    ]
    if ends:
        rule = table(ends).mark_rule(strokeDash=[2, 3], strokeWidth=1.5)
        parts.append(rule.encode(x="rate:Q", color=frame.by_target()["color"]))
    if attainment is not None:
        parts.append(table([{"value": attainment}]).mark_rule(color=INK, strokeWidth=1).encode(y="value:Q"))
    return _fit(frame.words("axis.attainment"), *parts)


def _ladder(frame: Frame, steps: Sequence[JSON]) -> Chart | None:
    """One row a step: how many times better the next rung is, with the interval."""
    rows = [
        {"step": f"{frame.name(step['from'])} → {frame.name(step['to'])}", "low": None, "high": None}
        | {name: step["ratio"][name] for name in ("value", "low", "high")}
        | {"label": f"{step['ratio']['value']:.2f}"}
        for step in _last_level(steps)
        if step["ratio"]
    ]
    if not rows:
        return None
    values = [row[name] for row in rows for name in ("value", "low", "high") if row[name]]
    ends = min([1.0, *values]) / 1.3, max([1.0, *values]) * 1.3
    axis = alt.Axis(values=log_ticks(*ends), format="~g", labelOverlap="greedy")
    scale = alt.Scale(type="log", domain=list(ends), nice=False)
    x = alt.X("value:Q", title=frame.words("axis.times"), axis=axis, scale=scale)
    order = [row["step"] for row in rows]
    y = alt.Y("step:N", title=None, sort=order, axis=alt.Axis(labelLimit=190, domain=False, minExtent=room_for(order)))
    base = table(rows).encode(y=y)
    one = table([{"one": 1}]).mark_rule(color=INK, strokeWidth=1).encode(x="one:Q")
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=4, color=INK, opacity=0.35)
    bars = bars.encode(x="low:Q", x2="high:Q")
    points = base.mark_point(filled=True, size=70, color=INK, opacity=1).encode(x=x)
    labels = base.mark_text(dy=-10, fontSize=11, color=INK).encode(x=x, text="label:N")
    return _fit(frame.words("axis.ladder"), one, bars, points, labels, height=70 + 34 * len(rows))


def _last_level(steps: Sequence[JSON]) -> list[JSON]:
    """The steps at the highest level for which there are any."""
    last = max((step["level"] for step in steps), default=None)
    return [step for step in steps if step["level"] == last]
