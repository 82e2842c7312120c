"""The layers of memory over time as one chart: a panel for each, on one time axis, with the cells marked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import altair as alt
import numpy as np

from experiment.analysis.live import Cache, Moments
from experiment.analysis.memory import GAP_NS, MAX_POINTS, Layer, Memory, Series, Window, inside, runs, thin
from experiment.analysis.requests import Flags, Floats
from experiment.analysis.results import JSON
from experiment.report.look import INK, Frame, columns, heading, legend_on_top, room_for, svg, table
from experiment.run.kv import REASONS
from experiment.words import Words

# What is drawn of the device and the allocator.
LINES = {"allocated": "#e69f00", "reserved": "#8c959f", "used": "#8c959f", "reserved by the driver": "#e69f00"}
# What a KV cache is used for, from the bottom of its panel to the top.
PARTS = {
    "live": "#009e73",
    "live or unused": "#99d8c7",
    "reserved": "#785ef0",
    "padding": "#dc267f",
    "finished": "#8c959f",
    "fragmentation": "#ffb000",
    "in use": "#6e7781",
}
UNITS = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")]
HEIGHT = 110
# A page shows the first on a phone, the other elsewhere.
POINTS = 2400
WIDTHS = {"memory-narrow": 290, "memory": 1080}


def draw(frame: Frame, memory: Memory, summary: JSON) -> dict[str, str]:
    """Draw the chart of memory, if there is a cell and a sample in its time, in each of `WIDTHS`."""
    cells = _groups(summary["cells"]) if summary["together"] else summary["cells"]
    if not cells:
        return {}
    window = min(cell["start_ns"] for cell in cells), max(cell["end_ns"] for cell in cells)
    series = [one for one in memory.series if inside(one.time_ns, [window]).any()]
    caches = {target: cache for target, cache in memory.caches.items() if inside(cache.time_ns, [window]).any()}
    panels = len(_panels(series)) + len(caches)
    if not panels:
        return {}
    sampled = Memory(series, dict(sorted(caches.items(), key=lambda item: frame.slot(item[0]))))
    return {name: _draw(Drawing(frame, window, name, panels), sampled, cells) for name in WIDTHS}


def _groups(cells: Sequence[JSON]) -> list[JSON]:
    """Cells that ran at the same time as one that is of no target."""
    found: dict[tuple[float, int], JSON] = {}
    for cell in cells:
        one = found.setdefault((cell["level"], cell["repeat"]), cell | {"target": ""})
        one["start_ns"] = min(one["start_ns"], cell["start_ns"])
        one["end_ns"] = max(one["end_ns"], cell["end_ns"])
    return list(found.values())


@dataclass(frozen=True)
class Drawing:
    """One of the charts: what all its panels share."""

    frame: Frame
    window: Window
    name: str
    panels: int

    @property
    def width(self) -> int:
        """Width of a panel in pixels."""
        return WIDTHS[self.name]

    @property
    def points(self) -> int:
        """How many points are drawn of each series: no more than can be told apart, and fewer in many panels."""
        return min(MAX_POINTS, self.width // 2, max(100, POINTS // self.panels))


def _draw(drawing: Drawing, memory: Memory, cells: Sequence[JSON]) -> str:
    words = drawing.frame.words
    several = len({one.gpu for one in memory.series if one.gpu}) > 1
    panels = []
    for (layer, gpu), own in _panels(memory.series).items():
        title = words(f"layer.{layer}", gpu=f"GPU {gpu}" if several else "GPU")
        panels.append(_lines(drawing, title, list(_points(drawing, own))))
    for target, cache in memory.caches.items():
        panels.append(_areas(drawing, target, cache, inside(cache.time_ns, [drawing.window])))
    layered = []
    for number, (title, parts) in enumerate(panels, 1):
        bands = _bands(drawing, cells, words("axis.time") if number == len(panels) else None)
        layered.append(alt.layer(*bands, *parts).properties(width=drawing.width, height=HEIGHT, title=heading(title)))
    whole = alt.vconcat(*layered, spacing=14).resolve_scale(x="shared", color="independent", strokeDash="independent")
    return svg(whole, f"{words.language}-{drawing.name}")


def _panels(series: Sequence[Series]) -> dict[tuple[Layer, str], list[Series]]:
    """What each panel shows, by layer and GPU: what is on several GPUs could not be told apart in one."""
    found: dict[tuple[Layer, str], list[Series]] = {}
    for one in sorted(series, key=lambda one: get_args(Layer).index(one.layer)):
        found.setdefault((one.layer, one.gpu), []).append(one)
    return found


def _bands(drawing: Drawing, cells: Sequence[JSON], title: str | None) -> Iterator[alt.Chart]:
    """What marks the cells in a panel: the colour of the server under load, and its level."""
    frame, window = drawing.frame, drawing.window
    for target in dict.fromkeys(cell["target"] for cell in cells):
        rows = [_band(cell, drawing) for cell in cells if cell["target"] == target]
        scale = alt.Scale(domain=[0, (window[1] - window[0]) / 1e9], nice=False)
        x = alt.X("from:Q", title=title, scale=scale, axis=alt.Axis(grid=False, tickCount=drawing.width // 70))
        chart = table(rows).encode(x=x)
        color = frame.color(target)
        rect = chart.mark_rect(fillOpacity=0.13, color=color, stroke=color, strokeOpacity=0.5)
        yield rect.encode(x2="to:Q")
        yield chart.mark_text(y=-7, fontSize=10, color=INK).encode(x="middle:Q", text="label:N")


def _band(cell: JSON, drawing: Drawing) -> JSON:
    begin, finish = drawing.window
    start, end = ((cell[name] - begin) / 1e9 for name in ("start_ns", "end_ns"))
    label = f"{cell['level']:g}"
    # Narrow bands have no room for a label.
    wide = (end - start) / ((finish - begin) / 1e9) * drawing.width > 7 * len(label) + 2
    return {"from": start, "to": end, "middle": (start + end) / 2, "label": label if wide else ""}


@dataclass(frozen=True)
class Steps:
    """What is drawn of a series: positions of samples, the second from which each is shown, and its run without a gap.

    The last sample of a run is there twice: it is shown for one period, and then there is a gap.
    """

    at: Moments
    seconds: list[float]
    run: list[int]


def _steps(time_ns: Moments, columns: Sequence[Floats], window: Window, points: int = MAX_POINTS) -> Steps:
    """Choose so few samples that they can be drawn: most by the first column, and the extremes of all others."""
    # A shorter gap could not be seen, and each run costs a group of marks.
    run = runs(time_ns, max(GAP_NS, (window[1] - window[0]) * 4 // points))
    last = np.flatnonzero(np.diff(run, append=run[-1] + 1))
    first = np.append(0, last[:-1] + 1)
    coarse = max(3, points // 2 // max(1, len(columns) - 1))
    extremes = np.concatenate([last, *(thin(time_ns, values, coarse) for values in columns[1:])])
    # An extreme is not shown for longer than it lasted.
    after = np.minimum(extremes + 1, len(time_ns) - 1)
    shown = np.unique(np.concatenate([first, last, thin(time_ns, columns[0], points), extremes, after]))
    at = np.sort(np.concatenate([shown, last]))
    period_ns = min(GAP_NS, int(np.median(np.diff(time_ns)))) if len(time_ns) > 1 else GAP_NS
    again = np.append(False, at[1:] == at[:-1])
    shown_ns = np.minimum(time_ns[at] + period_ns * again, window[1]) - window[0]
    return Steps(at, (shown_ns / 1e9).round(3).tolist(), run[at].tolist())


def _points(drawing: Drawing, own: Sequence[Series]) -> Iterator[JSON]:
    """The points of the lines of a panel."""
    frame, window = drawing.frame, drawing.window
    owners = len({one.owner for one in own}) > 1
    for one in own:
        within = inside(one.time_ns, [window])
        times, values = one.time_ns[within], one.values[within]
        steps = _steps(times, [values], window, drawing.points)
        what = frame.words.named("line", one.name)
        name = frame.words.named("line", frame.name(one.owner))
        label = {"device": what, "allocator": f"{name}: {what}" if owners else what}.get(one.layer, name)
        color = LINES[one.name] if one.layer in ("device", "allocator") and not owners else frame.color(one.owner)
        for second, run, value in zip(steps.seconds, steps.run, values[steps.at].tolist(), strict=True):
            yield {
                "name": label,
                "color": color,
                "dashed": one.layer == "allocator" and one.name == "reserved",
                "run": run,
                "seconds": second,
                "value": value,
            }


def _lines(drawing: Drawing, title: str, rows: Sequence[JSON]) -> tuple[str, list[alt.Chart]]:
    scale, unit = unit_of(max(row["value"] for row in rows))
    colors = {row["name"]: row["color"] for row in rows}
    dashes = {row["name"]: [4, 3] if row["dashed"] else [1, 0] for row in rows}
    points = [
        {name: row[name] for name in ("name", "run", "seconds")} | {"value": row["value"] / scale} for row in rows
    ]
    lines = table(points).mark_line(strokeWidth=1.5, interpolate="step-after")
    y = alt.Y("value:Q", title=drawing.frame.words.named("unit", unit), axis=alt.Axis(tickCount=4))
    # With the same legend both are one.
    color = alt.Color("name:N", **_by_name(drawing, colors, "stroke"))
    dash = alt.StrokeDash("name:N", **_by_name(drawing, dashes, "stroke"))
    return title, [lines.encode(x="seconds:Q", y=y, detail="run:N", color=color, strokeDash=dash)]


def _areas(drawing: Drawing, target: str, cache: Cache, sampled: Flags) -> tuple[str, list[alt.Chart]]:
    """What a KV cache is used for, one part upon the other."""
    words = drawing.frame.words
    parts = {part: counts[sampled] for part, counts in _parts(cache).items()}
    allocated = cache.counts["allocated"][sampled]
    steps = _steps(cache.time_ns[sampled], [allocated, *parts.values()], drawing.window, drawing.points)
    size = cache.token_bytes or 1
    scale, unit = unit_of(allocated.max() * size) if cache.token_bytes else (1, cache.unit)
    below = np.zeros(len(steps.at))
    rows, used = [], {}
    for part, counts in parts.items():
        above = below + counts[steps.at] * size / scale
        if (above > below).any() or part in ("live", "in use"):
            name = words(f"part.{part}")
            used[name] = PARTS[part]
            edges = zip(steps.seconds, steps.run, below.tolist(), above.tolist(), strict=True)
            rows += [{"name": name, "run": n, "seconds": at, "from": low, "to": high} for at, n, low, high in edges]
        below = above
    area = table(rows).mark_area(interpolate="step-after", opacity=0.9)
    y = alt.Y("from:Q", title=words.named("unit", unit), axis=alt.Axis(tickCount=4))
    room = amount(words, cache.counts["capacity"][sampled].max() * size, "bytes" if cache.token_bytes else cache.unit)
    key = "layer.kv" if drawing.name == "memory" else "layer.kv_short"
    title = words(key, target=drawing.frame.name(target), room=room)
    color = alt.Color("name:N", **_by_name(drawing, used, "square"))
    areas = area.encode(x="seconds:Q", y=y, y2="to:Q", detail="run:N", color=color)
    return title, [areas, *_gaps(drawing, steps)]


def amount(words: Words, value: float, unit: str) -> str:
    """Bytes in the largest unit of which there is at least one, or a count of tokens or blocks."""
    if unit != "bytes":
        return f"{value:,.0f} {words.named('unit', unit)}"
    scale, name = unit_of(max(abs(value), 2**10))
    return f"{value / scale:,.1f} {name}"


def _gaps(drawing: Drawing, steps: Steps) -> Iterator[alt.Chart]:
    """Mark where nothing was sampled, which an area of nothing would look like."""
    neighbours = zip(pairwise(steps.seconds), pairwise(steps.run), strict=True)
    rows = [{"gap": since, "until": until} for (since, until), (one, next_) in neighbours if one != next_]
    if not rows:
        return
    yield table(rows).mark_rule(color=INK, strokeDash=[2, 3], y=HEIGHT / 2).encode(x="gap:Q", x2="until:Q")
    # Where there is room for it, in words.
    text = drawing.frame.words("no_samples")
    second = drawing.width / ((drawing.window[1] - drawing.window[0]) / 1e9)
    middles = [
        (row["gap"] + row["until"]) / 2 for row in rows if (row["until"] - row["gap"]) * second > room_for([text])
    ]
    if middles:
        words = table([{"middle": middle, "text": text} for middle in middles])
        yield words.mark_text(y=HEIGHT / 2 - 8, fontSize=10, color=INK).encode(x="middle:Q", text="text:N")


def _parts(cache: Cache) -> dict[str, Floats]:
    """Counts by what they are for; what the bounds leave open is a part of its own."""
    if cache.unit == "blocks":
        return {"in use": cache.counts["allocated"]}
    sure = {reason: cache.counts[f"{reason}_low"] for reason in REASONS if f"{reason}_low" in cache.counts}
    unknown = cache.counts["live_high"] - cache.counts["live_low"]
    return {"live": cache.counts["live_low"], "live or unused": unknown} | sure


def _by_name(drawing: Drawing, looks: Mapping[str, Any], symbol: str) -> JSON:
    """Scale and legend of a channel that tells names apart."""
    legend = legend_on_top(offset=18, symbolType=symbol, columns=columns(looks, drawing.width))
    return {"title": None, "scale": alt.Scale(domain=list(looks), range=list(looks.values())), "legend": legend}


def unit_of(most: float) -> tuple[int, str]:
    """The largest unit of which there is at least one."""
    return next(((scale, unit) for scale, unit in UNITS if most >= scale), UNITS[-1])
