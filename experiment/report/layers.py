"""The layers of memory over time as one chart: a panel for each, on one time axis, with the cells marked."""

from collections.abc import Iterator, Sequence

import altair as alt
import numpy as np

from experiment.kv import REASONS
from experiment.live import Cache, Flags, Moments
from experiment.memory import Layer, Memory, Window, inside, thin
from experiment.report.charts import COLORS, INK, NAMES, WIDTH, svg
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
            panels.append(_areas(target, cache, chosen, window[0]))
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
            yield chart.mark_rect(opacity=0.13, color=COLORS[name]).encode(x2="to:Q")
            yield chart.mark_text(y=-6, fontSize=10, color=INK).encode(x="middle:Q", text="label:N")


def _band(cell: JSON, window: Window) -> JSON:
    start, end = ((cell[name] - window[0]) / 1e9 for name in ("start_ns", "end_ns"))
    # Narrow bands have no room for a label.
    wide = end - start > 0.03 * (window[1] - window[0]) / 1e9
    return {"from": start, "to": end, "middle": (start + end) / 2, "label": str(cell["concurrency"]) if wide else ""}


def _points(memory: Memory, layer: Layer, window: Window) -> Iterator[JSON]:
    """The points of the lines of a layer."""
    chosen = [one for one in memory.series if one.layer == layer]
    several = len({one.gpu for one in chosen}) > 1
    for one in chosen:
        name = one.name if layer in ("device", "allocator") else NAMES.get(one.owner, one.owner)
        within = inside(one.time_ns, [window])
        times, values = one.time_ns[within], one.values[within]
        kept = thin(values)
        for second, value in zip(_seconds(times[kept], window[0]), values[kept].tolist(), strict=True):
            yield {"name": f"{name}, GPU {one.gpu}" if several else name, "seconds": second, "value": value}


def _lines(title: str, rows: Sequence[JSON]) -> tuple[str, list[alt.Chart]]:
    scale, unit = _unit(max(row["value"] for row in rows))
    points = [row | {"value": row["value"] / scale} for row in rows]
    names = list(dict.fromkeys(row["name"] for row in rows))
    colors = [LINES.get(name.split(",")[0], INK) for name in names]
    lines = alt.Chart(alt.Data(values=points)).mark_line(strokeWidth=1.5, interpolate="step-after")
    y = alt.Y("value:Q", title=unit, axis=alt.Axis(tickCount=4))
    return title, [lines.encode(x="seconds:Q", y=y, color=_color(names, colors, "stroke"))]


def _areas(target: str, cache: Cache, chosen: Flags, start_ns: int) -> tuple[str, list[alt.Chart]]:
    """What a KV cache is used for, one part upon the other."""
    kept = np.flatnonzero(chosen)[thin(cache.tokens["allocated"][chosen])]
    size = cache.token_bytes or 1
    scale, unit = _unit(cache.tokens["allocated"][kept].max() * size) if cache.token_bytes else (1, "tokens")
    seconds, below = _seconds(cache.time_ns[kept], start_ns), np.zeros(len(kept))
    rows, used = [], []
    for part, tokens in _parts(cache).items():
        above = below + tokens[kept] * size / scale
        if (above > below).any() or part == "live":
            used.append(part)
            edges = zip(seconds, below.tolist(), above.tolist(), strict=True)
            rows += [{"name": part, "seconds": second, "from": low, "to": high} for second, low, high in edges]
        below = above
    area = alt.Chart(alt.Data(values=rows)).mark_area(interpolate="step-after", opacity=0.9)
    y = alt.Y("from:Q", title=unit, axis=alt.Axis(tickCount=4))
    colors = [PARTS[part] for part in used]
    title = f"KV cache of {NAMES[target]}: what its allocated {'bytes' if cache.token_bytes else 'tokens'} hold"
    return title, [area.encode(x="seconds:Q", y=y, y2="to:Q", color=_color(used, colors, "square"))]


def _parts(cache: Cache) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Tokens by what they are for; what the bounds leave open is a part of its own."""
    sure = {reason: cache.tokens[f"{reason}_low"] for reason in REASONS if f"{reason}_low" in cache.tokens}
    unknown = cache.tokens["live_high"] - cache.tokens["live_low"]
    return {"live": cache.tokens["live_low"], "live or unused": unknown} | sure


def _color(names: Sequence[str], colors: Sequence[str], symbol: str) -> alt.Color:
    legend = alt.Legend(
        orient="top", offset=16, columnPadding=24, symbolType=symbol, symbolStrokeWidth=3, symbolOpacity=1
    )
    return alt.Color("name:N", title=None, scale=alt.Scale(domain=list(names), range=list(colors)), legend=legend)


def _seconds(time_ns: Moments, start_ns: int) -> list[float]:
    return [round(second, 3) for second in ((time_ns - start_ns) / 1e9).tolist()]


def _unit(most: float) -> tuple[int, str]:
    """The largest unit of which there is at least one."""
    return next(((scale, unit) for scale, unit in UNITS if most >= scale), UNITS[-1])
