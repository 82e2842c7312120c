"""All numbers of a summary as one long table, for a spreadsheet or a data frame: a row for each statistic."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from experiment.analysis.results import JSON

TEXTS = ("target", "metric", "statistic")
SCHEMA = pa.schema([("level", pa.float64()), *((name, pa.string()) for name in TEXTS), ("value", pa.float64())])
Row = tuple[float | None, str, str, str, float]


def write(folder: Path, summary: JSON) -> None:
    """Write summary.csv and summary.parquet; raises OSError."""
    columns = zip(*rows(summary), strict=True)
    table = pa.table([list(column) for column in columns] or [[] for _ in SCHEMA], schema=SCHEMA)
    pa.csv.write_csv(table, folder / "summary.csv")
    pq.write_table(table, folder / "summary.parquet")


def rows(summary: JSON) -> Iterator[Row]:
    """Yield level, target, metric, statistic and value, in base units: seconds, bytes, tokens, ratios from 0 to 1.

    Ratios to the baseline are the metrics that end in `_ratio`. What belongs to no level has none.
    """
    for level, target, metric, value in _parts(summary):
        for statistic, number in _numbers(value):
            yield level, target, metric, statistic, number


def _parts(summary: JSON) -> Iterator[tuple[float | None, str, str, object]]:
    """Everything that holds numbers, with the level, the target and the metric that it is of."""
    for level in summary["levels"]:
        for target, figures in level["targets"].items():
            yield from ((level["level"], target, metric, value) for metric, value in figures.items())
        for target, ratios in level["ratios"].items():
            yield from ((level["level"], target, f"{metric}_ratio", ratio) for metric, ratio in ratios.items())
    for target, found in (summary.get("saturation") or {}).items():
        yield None, target, "saturation", {"rate": found["rate"]}
        for cell in found["cells"]:
            yield cell["rate"], target, "saturation", {name: cell[name] for name in ("attainment", "goodput")}
    for step in summary.get("ladder") or []:
        yield step["level"], step["to"], f"ladder_from_{step['from']}", step["ratio"]


def _numbers(value: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested objects and lists with the names on the way to it, `value` for a number alone."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for place, inner in enumerate(value, 1):
            yield from _numbers(inner, f"{path}.{place}" if path else str(place))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path or "value", float(value)
