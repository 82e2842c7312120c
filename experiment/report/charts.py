"""Charts as SVG text: one grammar (Vega-Lite), drawn without a browser."""

from collections.abc import Iterator, Sequence

import altair as alt
import vl_convert

from experiment import memory
from experiment.results import JSON, Results

Chart = alt.LayerChart | alt.FacetChart

NAMES = {"hf": "HF", "vllm": "vLLM"}
COLORS = {"HF": "#d97706", "vLLM": "#2563eb"}
# Readable on a light and on a dark page.
INK, GRID = "#7d8590", "#7d859040"
WIDTH = 300


def draw(results: Results, summary: JSON) -> dict[str, str]:
    """Draw every chart for which there are data; the keys are the names the page uses."""
    charts = {
        "throughput": _throughput(summary),
        "ttft": _latency(summary, "ttft_seconds", "TTFT, ms"),
        "tpot": _latency(summary, "tpot_seconds", "TPOT, ms"),
        "e2e": _latency(summary, "e2e_seconds", "E2E, ms"),
    }
    if results.timeline is not None and results.timeline.num_rows:
        start_ns = results.timeline["time_ns"].to_numpy().min()
        charts["host_memory"] = _memory(memory.host_series(results.timeline, start_ns), summary, start_ns)
        charts["gpu_memory"] = _memory(memory.gpu_series(results.timeline, start_ns), summary, start_ns)
    return {name: _svg(chart) for name, chart in charts.items() if chart is not None}


def _throughput(summary: JSON) -> Chart | None:
    rows = [
        {"server": NAMES[target], "concurrency": level["concurrency"], "value": value}
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
        {"server": NAMES[target], "concurrency": level["concurrency"]}
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


def _color(domain: Sequence[str] = ("HF", "vLLM")) -> alt.Color:
    colors = [COLORS.get(name.split(",")[0], INK) for name in domain]
    return alt.Color(
        "server:N",
        title=None,
        scale=alt.Scale(domain=list(domain), range=colors),
        legend=alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1),
    )


def _memory(series: Sequence[memory.Series], summary: JSON, start_ns: int) -> Chart | None:
    """Lines of memory over time, above bands that mark the cells."""
    rows = list(_points(series))
    if not rows:
        return None
    owners = list(dict.fromkeys(row["server"] for row in rows))
    span = max(row["seconds"] for row in rows)
    cells = [
        {
            "server": NAMES[cell["target"]],
            "from": (cell["start_ns"] - start_ns) / 1e9,
            "to": (cell["end_ns"] - start_ns) / 1e9,
            "middle": (cell["start_ns"] + cell["end_ns"] - 2 * start_ns) / 2e9,
            # Narrow bands have no room for a label.
            "label": str(cell["concurrency"]) if cell["end_ns"] - cell["start_ns"] > 0.03e9 * span else "",
        }
        for cell in summary["cells"]
    ]
    bands = alt.Chart(alt.Data(values=cells)).encode(x=alt.X("from:Q", title="seconds since the monitor started"))
    color = _color(owners if set(owners) >= set(COLORS) else [*COLORS, *(o for o in owners if o not in COLORS)])
    lines = alt.Chart(alt.Data(values=rows)).mark_line(strokeWidth=1.5, interpolate="step-after")
    return alt.layer(
        bands.mark_rect(opacity=0.13).encode(x2="to:Q", color=color),
        bands.mark_text(y=-6, fontSize=10, color=INK).encode(x="middle:Q", text="label:N"),
        lines.encode(x="seconds:Q", y=alt.Y("gib:Q", title="GiB"), color=color),
    ).properties(width=2 * WIDTH + 80, height=240)


def _points(series: Sequence[memory.Series]) -> Iterator[JSON]:
    for one in series:
        name, _, rest = one.owner.partition(",")
        label = NAMES.get(name, name) + (f",{rest}" if rest else "")
        for second, value in zip(one.seconds, one.values, strict=True):
            yield {"server": label, "seconds": round(float(second), 3), "gib": float(value) / 2**30}


def _svg(chart: Chart) -> str:
    drawn = chart.configure(background="transparent", font="system-ui, sans-serif").configure_view(stroke=None)
    drawn = drawn.configure_axis(
        labelColor=INK, titleColor=INK, gridColor=GRID, domainColor=INK, tickColor=INK, titleFontWeight="normal"
    )
    drawn = drawn.configure_legend(labelColor=INK, labelFontSize=12)
    return str(vl_convert.vegalite_to_svg(drawn.to_dict()))
