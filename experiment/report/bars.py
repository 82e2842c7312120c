"""Bars by server: what is drawn of one level, where a line would join nothing."""

from collections.abc import Sequence

import altair as alt

from experiment.analysis.results import JSON
from experiment.report.look import INK, PAPER, WIDTH, Chart, Frame, heading, room_for, table

BAR = 26


def bars(frame: Frame, rows: Sequence[JSON], title: str, points: Sequence[JSON] = ()) -> Chart:
    """A bar to the `value` of each row, a stroke at its `most` where it has one, its `label` beside, and `points`.

    Rows and points have the `target` as the report calls it; points have a `value`.
    """
    order = [row["target"] for row in rows]
    farthest = {
        name: max(point["value"] for point in points if point["target"] == name)
        for name in {point["target"] for point in points}
    }
    ends = [row | {"end": max(row["value"], row.get("most", 0), farthest.get(row["target"], 0))} for row in rows]
    axis = alt.Axis(domain=False, ticks=False, labelLimit=170, minExtent=room_for(order))
    y = alt.Y("target:N", sort=order, title=None, axis=axis)
    color = frame.by_target()["color"].copy()
    color.legend = None
    # To the right of the longest there is room for its label.
    width = WIDTH - room_for(order)
    longest = max(row["end"] for row in ends)
    domain = [0, longest * width / max(width / 3, width - room_for([row["label"] for row in rows]) - 8)]
    x = alt.X(
        "value:Q", title=None, axis=alt.Axis(tickCount=4, format=",~f"), scale=alt.Scale(domain=domain, nice=False)
    )
    base = table(ends).encode(y=y)
    parts = [base.mark_bar(height={"band": 0.7}).encode(x=x, color=color)]
    if "most" in rows[0]:
        parts.append(base.mark_tick(thickness=2, color=INK, height={"band": 0.7}).encode(x="most:Q"))
    if points:
        dots = table(list(points)).mark_point(fill=INK, stroke=PAPER, strokeWidth=1, size=35, opacity=1)
        parts.append(dots.encode(x="value:Q", y=y))
    parts.append(base.mark_text(align="left", dx=5, color=INK, fontSize=11).encode(x="end:Q", text="label:N"))
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    height = 60 + BAR * len(order)
    return alt.layer(*parts).properties(width=WIDTH, height=height, autosize=fit, title=heading(title))
