"""The charts of KV caches at their load: what was allocated by level, and the shares of it that were live or waste."""

import math
from collections.abc import Iterator, Sequence

import altair as alt

from experiment.analysis.results import JSON
from experiment.report.bars import bars
from experiment.report.layers import PARTS, unit_of
from experiment.report.look import WIDTH, Chart, Frame, chosen, heading, legend_on_top, room_for, svg, table
from experiment.run.kv import REASONS

# Shares of the KV memory: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
# PagedAttention", SOSP'23, Fig. 2. What it calls token states is live, and internal fragmentation is fragmentation; the
# rest is external fragmentation and others, or is not split here.
PAPER = {
    "Orca (Max)": {"live": 0.204, "reserved": 0.133, "fragmentation": 0.573},
    "Orca (Pow2)": {"live": 0.268},
    "Orca (Oracle)": {"live": 0.382},
    "vLLM": {"live": 0.963},
}
# The height of a bar, and how many there are at most where there are several levels.
BAR, BARS = 20, 8
# A cache of which so much was allocated at some moment had no room for one more sequence.
FULL = 0.9


def draw(frame: Frame, summary: JSON) -> dict[str, str]:
    """Draw the allocated bytes, `kv`, the shares of them, `waste`, and the sequences `held`, if a cache was sampled."""
    most = max(1, BARS // max(1, len(frame.targets)))
    rows = list(_rows(frame, chosen(summary["levels"], min(3, most))))
    in_bytes = [row for row in rows if row["unit"] == "bytes"]
    shares = [row for row in rows if row["part"] != "in use"]
    found: dict[str, Chart | None] = {
        "kv": _allocated(frame, in_bytes) if in_bytes else None,
        "waste": _waste(frame, shares) if shares else None,
        "held": _held(frame, summary["levels"]),
    }
    return {name: svg(chart, f"{frame.words.language}-{name}") for name, chart in found.items() if chart is not None}


def _rows(frame: Frame, levels: Sequence[JSON]) -> Iterator[JSON]:
    """A row for each part of each bar: how many bytes, and what share of the allocated."""
    for level in levels:
        for target, figures in level["targets"].items():
            cache = figures["memory"].get("kv")
            if not cache or not cache["allocated"]["mean"]:
                continue
            bar = {"bar": f"{frame.name(target)}, {level['level']:g}", "unit": cache["unit"]}
            allocated = cache["allocated"]["mean"]
            for part, value in _parts(cache):
                yield bar | {"part": part, "value": value, "share": value / allocated}


def _parts(cache: JSON) -> Iterator[tuple[str, float]]:
    """The mean of each part, from the left of a bar to its right; what the bounds of live leave open is one of them."""
    parts = cache["parts"]
    if "live" not in parts:
        yield "in use", cache["allocated"]["mean"]
        return
    low, high = (parts["live"][end]["mean"] for end in ("low", "high"))
    yield "live", low
    yield "live or unused", high - low
    for reason in REASONS:
        if reason in parts:
            yield reason, parts[reason]["low"]["mean"]


def _bars(frame: Frame, rows: Sequence[JSON], x: alt.X, title: str) -> Chart:
    order = list(dict.fromkeys(row["bar"] for row in rows))
    used = [part for part in PARTS if any(row["part"] == part and row["value"] > 0 for row in rows)]
    used += ["other"] if any(row["part"] == "other" for row in rows) else []
    colors = {frame.words(f"part.{part}"): (PARTS | {"other": "#d0d7de"})[part] for part in used}
    values = [
        {"bar": row["bar"], "value": row["value"], "part": frame.words(f"part.{row['part']}"), "place": place}
        for place, row in enumerate(rows)
        if row["part"] in used
    ]
    legend = legend_on_top(symbolType="square", columns=2)
    color = alt.Color(
        "part:N", title=None, legend=legend, scale=alt.Scale(domain=list(colors), range=list(colors.values()))
    )
    y = alt.Y(
        "bar:N",
        sort=order,
        title=None,
        axis=alt.Axis(domain=False, ticks=False, labelLimit=170, minExtent=room_for(order)),
    )
    bars = table(values).mark_bar(height={"band": 0.8})
    bars = bars.encode(x=x, y=y, color=color, order="place:Q")
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    height = 90 + BAR * len(order)
    return alt.layer(bars).properties(width=WIDTH, height=max(height, 266), autosize=fit, title=heading(title))


def _allocated(frame: Frame, rows: Sequence[JSON]) -> Chart:
    whole: dict[str, float] = {}
    for row in rows:
        whole[row["bar"]] = whole.get(row["bar"], 0) + row["value"]
    scale, unit = unit_of(max(whole.values()))
    x = alt.X("value:Q", title=None, axis=alt.Axis(tickCount=4, format=",~f", labelOverlap="greedy"))
    title = frame.words("axis.kv", unit=frame.words.named("unit", unit))
    return _bars(frame, [row | {"value": row["value"] / scale} for row in rows], x, title)


def _waste(frame: Frame, rows: Sequence[JSON]) -> Chart:
    shares = [row | {"value": row["share"]} for row in rows]
    for name, parts in PAPER.items():
        bar = {"bar": frame.words("paper", name=name)}
        rest = {"other": 1 - sum(parts.values())}
        shares += [bar | {"part": part, "value": value} for part, value in (parts | rest).items()]
    x = alt.X("value:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", tickCount=5))
    return _bars(frame, shares, x, frame.words("axis.waste"))


def held(levels: Sequence[JSON]) -> dict[str, JSON]:
    """Mean and maximum of the sequences that each server held at once at the last level, the most first."""
    figures = levels[-1]["targets"] if levels else {}
    known = {target: kv["running"] for target, one in figures.items() if (kv := one["memory"].get("kv"))}
    return dict(sorted(known.items(), key=lambda one: -one[1]["mean"]))


def limits(frame: Frame, summary: JSON) -> dict[str, str]:
    """What limited the sequences that each server held at the last level, where there was a budget for the KV cache.

    It is the `load` where all requests in flight were held, `memory` where the cache was full, else `other`: the server
    stopped at fewer by itself. That of a server without samples is not known.
    """
    if not summary["kv_budget"] or not summary["levels"]:
        return {}
    last = summary["levels"][-1]
    known = {target: kv for target, figures in last["targets"].items() if (kv := figures["memory"].get("kv"))}
    return {target: _limit(kv, last["level"] if frame.closed else math.inf) for target, kv in known.items()}


def limited_by(limit: str, frame: Frame, summary: JSON) -> list[str]:
    """The servers whose sequences were limited by that."""
    return [target for target, found in limits(frame, summary).items() if found == limit]


def _limit(cache: JSON, offered: float) -> str:
    if cache["running"]["max"] >= offered:
        return "load"
    return "memory" if cache["allocated"]["max"] >= FULL * cache["capacity"]["max"] else "other"


def _held(frame: Frame, levels: Sequence[JSON]) -> Chart | None:
    """A bar to the mean of the sequences that each server held at once, and a stroke at the maximum."""
    found = held(levels)
    if len(found) < 2:
        return None
    rows = [
        {"target": frame.name(target), "value": one["mean"], "most": one["max"]}
        | {"label": f"{one['mean']:,.1f} / {one['max']:,.0f}"}
        for target, one in found.items()
    ]
    return bars(frame, rows, frame.words("axis.held", level=frame.level(levels[-1]["level"])))
