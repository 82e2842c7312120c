"""Charts as SVG text: one grammar (Vega-Lite), drawn without a browser."""

from collections.abc import Sequence

import altair as alt
import vl_convert

from experiment.results import JSON

Chart = alt.LayerChart | alt.FacetChart


class Names(dict[str, str]):
    """How the page calls a target: by its own name, where it has no better one."""

    def __missing__(self, target: str) -> str:
        return target


NAMES = Names(hf="HF", vllm="vLLM")
COLORS = {"HF": "#d97706", "vLLM": "#2563eb"}
# Readable on a light and on a dark page.
INK, GRID = "#7d8590", "#7d859040"
WIDTH = 300


def draw(summary: JSON) -> dict[str, str]:
    """Draw every chart of speed for which there are data; the keys are the names the page uses."""
    charts = {
        "throughput": _throughput(summary),
        "ttft": _latency(summary, "ttft_seconds", "TTFT, ms"),
        "tpot": _latency(summary, "tpot_seconds", "TPOT, ms"),
        "e2e": _latency(summary, "e2e_seconds", "E2E, ms"),
    }
    return {name: svg(chart) for name, chart in charts.items() if chart is not None}


def _throughput(summary: JSON) -> Chart | None:
    rows = [
        {"server": NAMES[target], "concurrency": level["level"], "value": value}
        for level in summary["levels"]
        for target, figures in level["targets"].items()
        for value in figures["output_throughput"]
        if value is not None
    ]
    if not rows:
        return None
    base = _base(rows)
    line = base.mark_line().encode(y=alt.Y("mean(value):Q", title="output tokens/s"))
    return alt.layer(line, base.mark_point(filled=True, size=45).encode(y="value:Q"))


def _latency(summary: JSON, metric: str, title: str) -> Chart | None:
    rows = [
        {"server": NAMES[target], "concurrency": level["level"]}
        | {name: figures[metric][name] * 1e3 for name in ("p50", "p99")}
        for level in summary["levels"]
        for target, figures in level["targets"].items()
        if figures[metric]
    ]
    if not rows:
        return None
    base = _base(rows)
    scale = alt.Scale(type="log", nice=True)
    median = base.mark_line(point=True).encode(y=alt.Y("p50:Q", title=f"{title} (log)", scale=scale))
    tail = base.mark_line(strokeDash=[4, 3], point={"filled": False, "fill": "transparent"}).encode(y="p99:Q")
    return alt.layer(median, tail)


def _base(rows: Sequence[JSON]) -> alt.Chart:
    levels = sorted({row["concurrency"] for row in rows})
    return (
        alt.Chart(alt.Data(values=list(rows)))
        .encode(
            x=alt.X(
                "concurrency:Q",
                title="requests in flight (log)",
                scale=alt.Scale(type="log", base=2),
                axis=alt.Axis(values=levels, format="d"),
            ),
            color=_color(),
        )
        .properties(width=WIDTH, height=200)
    )


def _color() -> alt.Color:
    return alt.Color(
        "server:N",
        title=None,
        scale=alt.Scale(domain=list(COLORS), range=list(COLORS.values())),
        legend=alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1),
    )


def svg(chart: Chart | alt.VConcatChart) -> str:
    """Draw a chart so that it is readable on a light and on a dark page."""
    drawn = chart.configure(background="transparent", font="system-ui, sans-serif").configure_view(stroke=None)
    drawn = drawn.configure_axis(
        labelColor=INK, titleColor=INK, gridColor=GRID, domainColor=INK, tickColor=INK, titleFontWeight="normal"
    )
    drawn = drawn.configure_legend(labelColor=INK, labelFontSize=12)
    return str(vl_convert.vegalite_to_svg(drawn.to_dict()))
