"""How every chart looks: sizes, inks, a colour and a shape for each target, and how it becomes SVG."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import altair as alt
import vl_convert

from experiment.analysis.results import JSON
from experiment.words import Words, name_of

Chart = alt.LayerChart | alt.FacetChart | alt.VConcatChart

# A chart is as wide as the screen of a phone.
WIDTH, HEIGHT = 356, 240
# What a page lightens where it is dark: style.css knows these colours.
INK, GRID, PAPER = "#59636e", "#d8dee4", "#ffffff"
# Okabe and Ito's colours and two more, which the colour-blind tell apart too, without those of the parts of a KV cache;
# shapes tell targets apart in grey.
COLORS = ("#d55e00", "#0072b2", "#cc79a7", "#8c510a", "#24292f", "#7f7f00", "#56b4e9")
# The places of our own servers among the colours, and the order in which other ones take what is left.
OWN = {"hf": 0, "vllm": 1, "sequential": 0, "batch": 2, "batch-static": 3, "continuous": 4}
SPARE = (5, 6, 2, 3, 4, 0, 1)
NO_TARGET = "#6e7781"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
CONFIG: JSON = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "aria": False,
    "padding": 4,
    "view": {"stroke": None},
    "axis": {
        **{f"{part}Color": INK for part in ("label", "title", "domain", "tick")},
        "gridColor": GRID,
        "titleFontWeight": "normal",
    },
    "legend": {"labelColor": INK, "labelFontSize": 12},
}


@dataclass(frozen=True)
class Frame:
    """What all charts and tables of a report share: the texts, the targets in their order, and what a level is."""

    words: Words
    targets: Sequence[str]
    closed: bool

    def name(self, target: str) -> str:
        """What the report calls a target."""
        return name_of(target)

    def slot(self, target: str) -> int:
        """The place of a target's colour: our own servers have the same in every report, the others by their order."""
        return _slots(tuple(self.targets))[target]

    def color(self, target: str) -> str:
        """The colour of a target, and of what is of none."""
        return COLORS[self.slot(target)] if target in self.targets else NO_TARGET

    def level(self, level: float) -> str:
        """A level in words: requests in flight, or requests a second."""
        return self.words.level(level, closed=self.closed)

    def by_target(self, field: str = "target:N") -> dict[str, Any]:
        """Encode the target as colour and shape, with one legend for both."""
        names = [self.name(target) for target in self.targets]
        shapes = [SHAPES[self.slot(target) % len(SHAPES)] for target in self.targets]
        colors = [self.color(target) for target in self.targets]
        legend = legend_on_top(columns=min(3, columns(names, WIDTH - 30)))
        return {
            "color": alt.Color(field, title=None, scale=alt.Scale(domain=names, range=colors), legend=legend),
            "shape": alt.Shape(field, title=None, scale=alt.Scale(domain=names, range=shapes), legend=legend),
        }

    def x_level(self, levels: Sequence[float], *, titled: bool = True) -> alt.X:
        """The axis of levels, with a mark at each: by doublings of requests in flight, or linear from no request."""
        title = self.words("axis.closed" if self.closed else "axis.open") if titled else None
        shown = sorted(set(levels))
        # On a linear axis a `format` would be given as many digits as its steps need: 20 would be 2e+1.
        axis = alt.Axis(values=shown, labelExpr="format(datum.value, '~g')", labelOverlap="greedy", grid=False)
        if self.closed:
            scale = alt.Scale(type="log", base=2, padding=12)
            return alt.X("level:Q", title=title, scale=scale, axis=axis)
        return alt.X("level:Q", title=title, scale=alt.Scale(zero=True, padding=6), axis=axis)


@cache
def _slots(targets: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for target in sorted(targets, key=lambda name: name not in OWN):
        free = [slot for slot in SPARE if slot not in found.values()] or [SPARE[len(found) % len(SPARE)]]
        own = OWN.get(target, free[0])
        found[target] = own if own not in found.values() else free[0]
    return found


def table(rows: Sequence[JSON]) -> alt.Chart:
    """A chart that has rows for its data and nothing else yet.

    They are one text, because Altair copies lists and dicts again and again.
    """
    return alt.Chart(alt.InlineData(values=json.dumps(rows), format=alt.JsonDataFormat()))


def legend_on_top(**options: Any) -> alt.Legend:
    """A legend over the plot, of lines thick enough to tell their colours."""
    symbol: Any = {"symbolSize": 70, "symbolStrokeWidth": 2.5, "symbolOpacity": 1}
    # The longest name that a target may have is whole.
    return alt.Legend(orient="top", labelLimit=300, columnPadding=18, **symbol, **options)


def heading(text: str) -> alt.TitleParams:
    """The title of a chart: what its vertical axis counts."""
    return alt.TitleParams(text, anchor="start", frame="group", color=INK, fontSize=12, fontWeight=600, offset=6)


def log_axis(field: str, values: Sequence[float]) -> alt.Y:
    """A logarithmic vertical axis with few marks; values are above 0."""
    low, high = min(values) / 1.25, max(values) * 1.25
    axis = alt.Axis(values=log_ticks(low, high), format=",~f", labelOverlap="greedy")
    return alt.Y(field, title=None, axis=axis, scale=alt.Scale(type="log", domain=[low, high], nice=False))


def columns(labels: Iterable[str], width: float) -> int:
    """How many columns of a legend fit into a width."""
    return max(1, int(width // (room_for(list(labels)) + 34)))


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two ends: the most that are not more than `most`, of 1 to 9, of 1, 2, 5 or of 1 alone."""
    found: list[float] = []
    for steps in (range(1, 10), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) <= most:
            break
    return found if len(found) > 1 else [float(f"{end:.2g}") for end in (low * 1.02, high * 0.98)]


def in_unit(words: Words, seconds: Sequence[float]) -> tuple[float, str]:
    """What to multiply times with, and their unit: milliseconds while all are under ten seconds."""
    return (1e3, words("unit.ms")) if max(seconds) < 10 else (1.0, words("unit.s"))


def room_for(labels: Sequence[str]) -> float:
    """Pixels that the longest of some labels takes in a wide font, at the size of an axis."""
    return max(sum(6.4 if letter.isascii() else 11 for letter in label) for label in labels) + 6


def chosen(levels: Sequence[JSON], most: int = 3) -> list[JSON]:
    """So few levels that a chart has room for each: the last, the first, and those evenly between."""
    if len(levels) <= most or most < 2:
        return list(levels[-most:])
    return [levels[round(place * (len(levels) - 1) / (most - 1))] for place in range(most)]


def svg(chart: Chart, name: str) -> str:
    """Draw a chart as SVG; `name` keeps its ids apart from those of the other charts of a page."""
    spec = chart.to_dict(validate=False)
    text = str(vl_convert.vegalite_to_svg(spec | {"config": spec.get("config", {}) | CONFIG}))
    # A tenth of a pixel is enough.
    text = re.sub(r' (?:d|transform|x|y|x2|y2)="[^"]*"', lambda place: re.sub(r"(\.\d)\d+", r"\1", place[0]), text)
    return re.sub(r'(id="|url\(#)', rf"\g<1>{name}-", text)


def png(text: str) -> bytes:
    """An SVG chart as a picture on white, twice as large."""
    opaque = re.sub(r"(<svg[^>]*>)", rf'\1<rect width="100%" height="100%" fill="{PAPER}"/>', text, count=1)
    return bytes(vl_convert.svg_to_png(opaque, scale=2))
