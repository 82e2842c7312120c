"""The layers of memory over time as one chart: a panel for each, on one time axis, with the cells marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import altair as alt
import numpy as np

from experiment.kv import REASONS
from experiment.live import Cache, Moments
from experiment.memory import GAP_NS, MAX_POINTS, Layer, Memory, Window, inside, runs, thin
from experiment.report.charts import COLORS, INK, NAMES, WIDTH, svg
from experiment.requests import Flags, Floats
from experiment.results import JSON

TITLES: dict[Layer, str] = {
    "device": "Device: what the GPU counts as used (NVML)",
    "process": "Process: GPU memory by server (NVML)",
    "host": "Process: host memory by server (PSS)",
    "allocator": "Allocator: torch in the HF server",
}
LINES = COLORS | {"allocated": "#d97706", "reserved": "#a8a29e", "used": "#0891b2"}
# What a KV cache is used for, from the bottom of its panel to the top.
PARTS = {
    "live": "#0d9488",
    "live or unused": "#86cfc6",
    "reserved": "#8b5cf6",
    "padding": "#db2777",
    "finished": "#78716c",
    "fragmentation": "#ef4444",
    "in use": "#64748b",
}
UNITS = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")]
HEIGHT = 110


def draw(memory: Memory, summary: JSON) -> dict[str, str]:
    """Draw the chart of memory, named `memory`, if there is a cell, and a sample in its time."""
    cells = summary["cells"]
    if not cells:
        return {}
    window = min(cell["start_ns"] for cell in cells), max(cell["end_ns"] for cell in cells)
    panels = [_lines(title, rows) for layer, title in TITLES.items() if (rows := list(_points(memory, layer, window)))]
    for target, cache in memory.caches.items():
        if (chosen := inside(cache.time_ns, [window])).any():
            panels.append(_areas(target, cache, chosen, window))
    if not panels:
        return {}
    layered = []
    for number, (title, parts) in enumerate(panels, 1):
        bands = _bands(cells, window, "seconds since the first cell began" if number == len(panels) else None)
        layered.append(alt.layer(*bands, *parts).properties(width=2 * WIDTH + 150, height=HEIGHT, title=_title(title)))
    # Room at the right: a page may draw letters wider than they are taken to be here.
    whole = alt.vconcat(*layered, spacing=14, padding={"left": 5, "top": 5, "right": 60, "bottom": 5})
    return {"memory": svg(whole.resolve_scale(x="shared", color="independent"))}


def _title(text: str) -> alt.TitleParams:
    return alt.TitleParams(text, anchor="start", color=INK, fontSize=12, fontWeight=600, offset=4)


def _bands(cells: Sequence[JSON], window: Window, title: str | None) -> Iterator[alt.Chart]:
    """What marks the cells in a panel: the colour of the server under load, and the requests in flight."""
    for target, name in NAMES.items():
        rows = [_band(cell, window) for cell in cells if cell["target"] == target]
        if rows:
            scale = alt.Scale(domain=[0, (window[1] - window[0]) / 1e9], nice=False)
            x = alt.X("from:Q", title=title, scale=scale)
            chart = alt.Chart(alt.Data(values=rows)).encode(x=x)
            rect = chart.mark_rect(fillOpacity=0.13, color=COLORS[name], stroke=COLORS[name], strokeOpacity=0.5)
            yield rect.encode(x2="to:Q")
            yield chart.mark_text(y=-9, fontSize=10, color=INK).encode(x="middle:Q", text="label:N")
    heading = alt.Chart(alt.Data(values=[{"text": "in flight"}]))
    yield heading.mark_text(x=-4, y=-9, align="right", fontSize=10, color=INK).encode(text="text:N")


def _band(cell: JSON, window: Window) -> JSON:
    start, end = ((cell[name] - window[0]) / 1e9 for name in ("start_ns", "end_ns"))
    # Narrow bands have no room for a label.
    wide = end - start > 0.03 * (window[1] - window[0]) / 1e9
    return {"from": start, "to": end, "middle": (start + end) / 2, "label": f"{cell['level']:g}" if wide else ""}


@dataclass(frozen=True)
class Steps:
    """What is drawn of a series: positions of samples, the second from which each is shown, and its run without a gap.

    The last sample of a run is there twice: it is shown for one period, and then there is a gap.
    """

    at: Moments
    seconds: list[float]
    run: list[int]


def _steps(time_ns: Moments, columns: Sequence[Floats], window: Window) -> Steps:
    """Choose so few samples that they can be drawn; the extremes of each column are among them."""
    run = runs(time_ns)
    last = np.flatnonzero(np.diff(run, append=run[-1] + 1))
    first = np.append(0, last[:-1] + 1)
    extremes = [thin(values, max(2, MAX_POINTS // len(columns))) for values in columns]
    at = np.sort(np.concatenate([np.unique(np.concatenate([first, last, *extremes])), last]))
    period_ns = min(GAP_NS, int(np.median(np.diff(time_ns)))) if len(time_ns) > 1 else GAP_NS
    again = np.append(False, at[1:] == at[:-1])
    shown_ns = np.minimum(time_ns[at] + period_ns * again, window[1]) - window[0]
    return Steps(at, (shown_ns / 1e9).round(3).tolist(), run[at].tolist())


def _points(memory: Memory, layer: Layer, window: Window) -> Iterator[JSON]:
    """The points of the lines of a layer."""
    chosen = [one for one in memory.series if one.layer == layer]
    several = len({one.gpu for one in chosen}) > 1
    for one in chosen:
        name = one.name if layer in ("device", "allocator") else NAMES.get(one.owner, one.owner)
        within = inside(one.time_ns, [window])
        times, values = one.time_ns[within], one.values[within]
        if not len(times):
            continue
        steps = _steps(times, [values], window)
        for second, run, value in zip(steps.seconds, steps.run, values[steps.at].tolist(), strict=True):
            label = f"{name}, GPU {one.gpu}" if several else name
            yield {"name": label, "run": run, "seconds": second, "value": value}


def _lines(title: str, rows: Sequence[JSON]) -> tuple[str, list[alt.Chart]]:
    scale, unit = _unit(max(row["value"] for row in rows))
    points = [row | {"value": row["value"] / scale} for row in rows]
    names = list(dict.fromkeys(row["name"] for row in rows))
    colors = [LINES.get(name.split(",")[0], INK) for name in names]
    lines = alt.Chart(alt.Data(values=points)).mark_line(strokeWidth=1.5, interpolate="step-after")
    y = alt.Y("value:Q", title=unit, axis=alt.Axis(tickCount=4))
    return title, [lines.encode(x="seconds:Q", y=y, detail="run:N", color=_color(names, colors, "stroke"))]


def _areas(target: str, cache: Cache, chosen: Flags, window: Window) -> tuple[str, list[alt.Chart]]:
    """What a KV cache is used for, one part upon the other."""
    parts = {part: counts[chosen] for part, counts in _parts(cache).items()}
    allocated = cache.counts["allocated"][chosen]
    steps = _steps(cache.time_ns[chosen], [allocated, *parts.values()], window)
    size = cache.token_bytes or 1
    scale, unit = _unit(allocated.max() * size) if cache.token_bytes else (1, cache.unit)
    below = np.zeros(len(steps.at))
    rows, used = [], []
    for part, counts in parts.items():
        above = below + counts[steps.at] * size / scale
        if (above > below).any() or part in ("live", "in use"):
            used.append(part)
            edges = zip(steps.seconds, steps.run, below.tolist(), above.tolist(), strict=True)
            rows += [{"name": part, "run": n, "seconds": at, "from": low, "to": high} for at, n, low, high in edges]
        below = above
    area = alt.Chart(alt.Data(values=rows)).mark_area(interpolate="step-after", opacity=0.9)
    y = alt.Y("from:Q", title=unit, axis=alt.Axis(tickCount=4))
    colors = [PARTS[part] for part in used]
    most = cache.counts["capacity"][chosen].max() * size
    held, (all_scale, all_unit) = "bytes" if cache.token_bytes else cache.unit, _unit(most)
    room = f"{most / all_scale:,.1f} {all_unit}" if cache.token_bytes else f"{most:,.0f} {cache.unit}"
    title = f"KV cache of {NAMES[target]}: what its allocated {held} hold (it may allocate {room})"
    areas = area.encode(x="seconds:Q", y=y, y2="to:Q", detail="run:N", color=_color(used, colors, "square"))
    return title, [areas, *_gaps(steps)]


def _gaps(steps: Steps) -> Iterator[alt.Chart]:
    """Mark where nothing was sampled, which an area of nothing would look like."""
    neighbours = zip(pairwise(steps.seconds), pairwise(steps.run), strict=True)
    rows = [{"gap": since, "until": until} for (since, until), (one, next_) in neighbours if one != next_]
    if rows:
        gaps = alt.Chart(alt.Data(values=[row | {"text": "no samples"} for row in rows]))
        yield gaps.mark_rule(color=INK, strokeDash=[2, 3], y=HEIGHT / 2).encode(x="gap:Q", x2="until:Q")
        middle = gaps.transform_calculate(middle="(datum.gap + datum.until) / 2")
        yield middle.mark_text(y=HEIGHT / 2 - 8, fontSize=10, color=INK).encode(x="middle:Q", text="text:N")


def _parts(cache: Cache) -> dict[str, Floats]:
    """Counts by what they are for; what the bounds leave open is a part of its own."""
    if cache.unit == "blocks":
        return {"in use": cache.counts["allocated"]}
    sure = {reason: cache.counts[f"{reason}_low"] for reason in REASONS if f"{reason}_low" in cache.counts}
    unknown = cache.counts["live_high"] - cache.counts["live_low"]
    return {"live": cache.counts["live_low"], "live or unused": unknown} | sure


def _color(names: Sequence[str], colors: Sequence[str], symbol: str) -> alt.Color:
    legend = alt.Legend(
        orient="top", offset=20, columnPadding=24, symbolType=symbol, symbolStrokeWidth=3, symbolOpacity=1
    )
    return alt.Color("name:N", title=None, scale=alt.Scale(domain=list(names), range=list(colors)), legend=legend)


def _unit(most: float) -> tuple[int, str]:
    """The largest unit of which there is at least one."""
    return next(((scale, unit) for scale, unit in UNITS if most >= scale), UNITS[-1])
