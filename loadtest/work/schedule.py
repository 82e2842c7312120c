"""From options to the times at which requests are sent."""

import math
import random
from collections.abc import Callable, Iterator
from itertools import islice, takewhile

from loadtest.options import Options
from loadtest.work import traces
from loadtest.work.arrivals import constant, gamma, parse_stages, poisson, replay, staged

# So many random gaps have their mean to within 0.3 %.
MOST = 1_000_000


def schedule(options: Options) -> Iterator[float] | None:
    """Offsets in seconds at which requests are sent to each server, in order; None in a closed loop.

    The i-th offset is that of the i-th request of the workload. They end with the stages, the trace or `duration`.
    Where it is known how many come at random at one rate, they come at that rate: the last when it is expected. Raises
    ValueError for a trace that cannot be read.
    """
    if options.arrival == "closed":
        return None
    scale = _scale(options)
    offsets = (offset * scale for offset in _seeded(options))
    return takewhile(lambda offset: offset < options.duration, offsets) if options.duration else offsets


def _seeded(options: Options) -> Iterator[float]:
    rng = random.Random(f"{options.seed}:arrivals")  # noqa: S311 - load, not secrets
    return ARRIVALS[options.arrival](options, rng)


def _scale(options: Options) -> float:
    """What the gaps are multiplied by: a few hundred of mean 1 / rate may come to a fifth more or less than expected.

    Gaps scaled so are those of the same process given when its last arrival comes; `vllm bench serve` does the same.
    """
    at_random = options.arrival == "poisson" or (options.arrival == "gamma" and math.isfinite(options.burstiness))
    if not at_random or options.total is None or options.min_seconds:
        return 1.0
    count = -(-options.total // options.turns)
    if count > MOST:
        return 1.0
    (last,) = islice(_seeded(options), count - 1, count)
    return count / options.rate / last


def _staged(options: Options, rng: random.Random) -> Iterator[float]:
    return staged(parse_stages(options.stages), options.burstiness, rng)


ARRIVALS: dict[str, Callable[[Options, random.Random], Iterator[float]]] = {
    "constant": lambda options, _: constant(options.rate),
    "poisson": lambda options, rng: poisson(options.rate, rng),
    "gamma": lambda options, rng: gamma(options.rate, options.burstiness, rng),
    "steps": _staged,
    "ramp": _staged,
    "trace": lambda options, _: replay(traces.read(options).seconds, options.time_scale),
}
