"""When requests are sent: seeded generators of offsets in seconds from zero. They read no clock and never sleep.

The same arguments and the same seed give the same offsets everywhere. To split them over n workers, worker r takes
those whose place in the list is r modulo n: together they are the whole process again.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, count, repeat

STAGE = re.compile(r"(?P<begin>[^x-]+)(-(?P<end>[^x-]+))?x(?P<seconds>[^x-]+)")


@dataclass(frozen=True)
class Stage:
    """A time during which the rate goes in a straight line from `begin` to `end` (requests/s)."""

    begin: float
    end: float
    seconds: float

    @property
    def arrivals(self) -> float:
        """How many arrivals are expected in it."""
        return (self.begin + self.end) / 2 * self.seconds

    def offset(self, arrivals: float) -> float:
        """Seconds from the start of the stage at which that many arrivals are expected: its cumulated rate, inverted.

        That rate is begin*t + (end - begin)*t**2 / (2*seconds); the root is in the form that loses no digits.
        """
        square = self.begin**2 + 2 * (self.end - self.begin) / self.seconds * arrivals
        # Rounding may take the last arrivals a hair past the end of the stage.
        return min(2 * arrivals / (self.begin + math.sqrt(max(0.0, square))), self.seconds) if arrivals else 0.0


def constant(rate: float) -> Iterator[float]:
    """Evenly spaced: i / rate, so that a long run does not drift; `rate` in requests/s, above 0."""
    return (place / rate for place in count())


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Poisson process: independent exponential gaps of mean 1 / rate."""
    return (unit / rate for unit in _units(1.0, rng))


def gamma(rate: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    """Independent gamma gaps of mean 1 / rate and coefficient of variation 1 / sqrt(burstiness).

    `burstiness` is the gamma's shape, as in `vllm bench serve`: 1 is Poisson, less comes in bursts, more is more even,
    inf is `constant`.
    """
    return (unit / rate for unit in _units(burstiness, rng))


def staged(stages: Iterable[Stage], burstiness: float, rng: random.Random) -> Iterator[float]:
    """Follow a rate that changes by stages, steps or ramps; ends with the last stage.

    Arrivals of rate 1 are put through the inverse of the cumulated rate, which for `burstiness` 1 is the
    non-homogeneous Poisson process exactly, without thinning (Cinlar, Introduction to Stochastic Processes, 1975,
    chapter 4). With inf they are evenly spaced inside each stage.
    """
    units = _units(burstiness, rng)
    unit = next(units)
    time = expected = 0.0
    for stage in stages:
        while unit < expected + stage.arrivals:
            yield time + stage.offset(unit - expected)
            unit = next(units)
        time, expected = time + stage.seconds, expected + stage.arrivals


def replay(offsets: Iterable[float], scale: float) -> Iterator[float]:
    """Play recorded offsets (s), each multiplied by `scale`: 0.5 is twice as fast."""
    return (offset * scale for offset in offsets)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Read "5x30,1-20x60": 30 s at 5 requests/s, then 60 s from 1 to 20; raises ValueError that names the bad stage."""
    stages = tuple(map(_stage, text.split(",")))
    if not sum(stage.arrivals for stage in stages):
        raise ValueError(f"{text!r} sends nothing: expected a rate above 0 in one stage at least")
    return stages


def _stage(text: str) -> Stage:
    found = STAGE.fullmatch(text.strip())
    try:
        if not found:
            raise ValueError("no match")
        begin, seconds = float(found["begin"]), float(found["seconds"])
        end = float(found["end"] or begin)
        if not (0 <= begin < math.inf and 0 <= end < math.inf and 0 < seconds < math.inf):
            raise ValueError("out of range")
    except ValueError:
        raise ValueError(
            f"stage {text.strip()!r}: expected RATExSECONDS or FROM-TOxSECONDS, such as 5x30 or 1-20x60"
        ) from None
    return Stage(begin, end, seconds)


def _units(burstiness: float, rng: random.Random) -> Iterator[float]:
    """Arrivals of rate 1: sums of gamma gaps of mean 1."""
    if math.isinf(burstiness):
        return map(float, count())
    if burstiness == 1:
        return accumulate(rng.expovariate(rate) for rate in repeat(1.0))
    return accumulate(rng.gammavariate(shape, 1 / shape) for shape in repeat(burstiness))
