"""Distributions of latencies, thinned so that a page can hold them however many requests there were."""

from collections.abc import Iterator

import numpy as np

from experiment.analysis import stats
from experiment.analysis.requests import Floats
from experiment.analysis.results import JSON, CellResult, Results

# Quantiles of each distribution.
POINTS = 200


def quantiles(results: Results) -> Iterator[JSON]:
    """Yield rows of level, target, metric, share of the requests, and the value that they do not exceed, in seconds.

    The cells of a search are left out, as they belong to no level.
    """
    groups: dict[tuple[float, str], list[CellResult]] = {}
    for cell in results.cells:
        if cell.complete and not cell.search:
            groups.setdefault((cell.level, cell.target), []).append(cell)
    for (level, target), cells in sorted(groups.items()):
        for metric, read in stats.LATENCIES.items():
            values = np.concatenate([read(cell.requests)[cell.requests.measured] for cell in cells])
            for share, value in thinned(values[~np.isnan(values)]):
                yield {"level": level, "target": target, "metric": metric, "share": share, "value": value}


def thinned(values: Floats) -> list[tuple[float, float]]:
    """At most `POINTS` pairs of a share and the value that this share of the values does not exceed, ascending."""
    count = min(POINTS, len(values))
    if not count:
        return []
    shares = np.arange(1, count + 1) / count
    found = np.quantile(values, shares, method="inverted_cdf")
    return [(round(float(share), 4), float(value)) for share, value in zip(shares, found, strict=True)]
