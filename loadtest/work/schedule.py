"""From options to the times at which requests are sent."""

import random
from collections.abc import Callable, Iterator
from itertools import takewhile

from loadtest.options import Options
from loadtest.work import traces
from loadtest.work.arrivals import constant, gamma, parse_stages, poisson, replay, staged


def schedule(options: Options) -> Iterator[float] | None:
    """Offsets in seconds at which requests are sent to each server, in order; None in a closed loop.

    The i-th offset is that of the i-th request of the workload. They end with the stages, the trace or `duration`.
    Raises ValueError for a trace that cannot be read.
    """
    if options.arrival == "closed":
        return None
    rng = random.Random(f"{options.seed}:arrivals")  # noqa: S311 - load, not secrets
    offsets = ARRIVALS[options.arrival](options, rng)
    return takewhile(lambda offset: offset < options.duration, offsets) if options.duration else offsets


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
