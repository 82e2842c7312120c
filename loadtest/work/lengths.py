"""How long prompts and outputs are: distributions of whole numbers of tokens with an exact mean."""

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist

import numpy as np

from loadtest.work.lines import CsvLine, FieldError, csv_lines, csv_row, entries, whole

# Draws one length, from 1 to the longest allowed.
Length = Callable[[random.Random], int]


def constant(mean: float, _sigma: float, longest: int) -> Length:
    """Every length is the mean, rounded."""
    length = _cut(mean, longest)
    return lambda _: length


def uniform(mean: float, sigma: float, longest: int) -> Length:
    """Equally likely from mean * (1 - sigma) to mean * (1 + sigma); narrower where that leaves 1 to `longest`."""
    half_width = min(sigma * mean, mean - 1, longest - mean)
    return lambda rng: _cut(rng.uniform(mean - half_width, mean + half_width), longest)


def normal(mean: float, sigma: float, longest: int) -> Length:
    """Normal of standard deviation sigma * mean before it is cut to 1 and `longest`; cut, it has the mean."""
    spread = sigma * mean

    def mean_when_cut(mu: float) -> float:
        return _normal_mean_when_cut(mu, spread, longest)

    mu = _solve(mean_when_cut, mean, 1 - 40 * (spread + 1), longest + 40 * (spread + 1))
    return lambda rng: _cut(rng.gauss(mu, spread), longest)


def lognormal(mean: float, sigma: float, longest: int) -> Length:
    """Log-normal, sigma being that of the logarithm, before it is cut to 1 and `longest`; cut, it has the mean."""

    def mean_when_cut(mu: float) -> float:
        return _lognormal_mean_when_cut(mu, sigma, longest)

    reach = 10 * (sigma + 1)
    mu = _solve(mean_when_cut, mean, math.log(mean) - reach, math.log(longest) + reach)
    return lambda rng: _cut(rng.lognormvariate(mu, sigma), longest)


def zipf(mean: float, _sigma: float, longest: int) -> Length:
    """Length k is as likely as k**-s, k from 1 to `longest`; s is the one that gives the mean.

    Raises ValueError for a mean above that of s = 0, where all lengths are equally likely.
    """
    if mean > (longest + 1) / 2:
        raise ValueError(f"a mean length of {mean:g} tokens is too much for zipf: at most {(longest + 1) / 2:g}")
    values = np.arange(1.0, longest + 1)

    def mean_of(power: float) -> float:
        weights = values**power
        return float(values @ weights / weights.sum())

    cumulated: list[float] = np.cumsum(values ** _solve(mean_of, mean, -60.0, 0.0)).tolist()
    return lambda rng: rng.choices(range(1, longest + 1), cum_weights=cumulated)[0]


DISTRIBUTIONS: dict[str, Callable[[float, float, int], Length]] = {
    "constant": constant,
    "uniform": uniform,
    "normal": normal,
    "lognormal": lognormal,
    "zipf": zipf,
}


def empirical(path: Path, longest: int, skip_bad_lines: bool, skipped: Counter[str]) -> Length:
    """Lengths as often as a CSV file with the columns length and count has them.

    Raises ValueError with file, line and field for a bad line, a length above `longest` being one, and for a file
    without any count.
    """

    def parse(line: CsvLine) -> tuple[int, int]:
        row = csv_row(line)
        length = whole(row, "length", least=1)
        if length > longest:
            raise FieldError("length", row["length"], f"at most {longest} (what max_context leaves)")
        return length, whole(row, "count")

    pairs = list(entries(path, csv_lines(path), parse, skip_bad_lines, skipped))
    cumulated = list(accumulate(count for _, count in pairs))
    if not cumulated or not cumulated[-1]:
        raise ValueError(f"{path}: expected lines of length,count with a count above 0")
    values = [length for length, _ in pairs]
    return lambda rng: rng.choices(values, cum_weights=cumulated)[0]


def _cut(length: float, longest: int) -> int:
    return max(1, min(longest, round(length)))


def _solve(rising: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Find where a rising function has a value, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > value else (middle, high)
    return low


def _normal_mean_when_cut(mu: float, spread: float, longest: int) -> float:
    """Mean of max(1, min(X, longest)) for a normal X (from its partial expectation)."""
    if spread == 0:
        return max(1.0, min(mu, longest))
    standard = NormalDist()
    low, high = (1 - mu) / spread, (longest - mu) / spread
    inside = standard.cdf(high) - standard.cdf(low)
    between = mu * inside - spread * (standard.pdf(high) - standard.pdf(low))
    return standard.cdf(low) + between + longest * (1 - standard.cdf(high))


def _lognormal_mean_when_cut(mu: float, sigma: float, longest: int) -> float:
    """Mean of max(1, min(X, longest)) for a log-normal X (from its partial expectation)."""
    if sigma == 0:
        return max(1, min(math.exp(mu), longest))
    below = NormalDist().cdf
    low, high = -mu / sigma, (math.log(longest) - mu) / sigma
    between = math.exp(mu + sigma**2 / 2) * (below(high - sigma) - below(low - sigma))
    return below(low) + between + longest * (1 - below(high))
