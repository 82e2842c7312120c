"""What live statistics are made of: distributions and counts that add up over seconds, targets and processes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, Self, get_args

from ddsketch import DDSketch
from ddsketch.pb.ddsketch_pb2 import DDSketch as Message
from ddsketch.pb.proto import DDSketchProto

from loadtest.records import Record

_PROTO: Any = DDSketchProto  # its functions have no types

RELATIVE_ERROR = 0.01
# The bins of the sketch: bin k holds the values in (GAMMA^(k-1), GAMMA^k] (Masson et al., VLDB 2019, section 2.1).
GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)

Metric = Literal["ttft", "tpot", "e2e", "response_time", "send_lateness"]
METRICS: tuple[Metric, ...] = get_args(Metric)


class Distribution:
    """Times in seconds whose percentiles are known to 1 %, however many there are and wherever they were added.

    A DDSketch (Masson et al., VLDB 2019): a bin per step of 2 %, so one that is merged from parts equals one that was
    given all values.
    """

    __slots__ = ("_sketch", "sum")

    def __init__(self) -> None:
        self._sketch = DDSketch(RELATIVE_ERROR)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """How many values it holds."""
        return int(self._sketch.count)

    def add(self, seconds: float) -> None:
        """Add one value, zero or more."""
        self._sketch.add(seconds)
        self.sum += seconds

    def merge(self, other: Self) -> None:
        """Add all values of another one."""
        self._sketch.merge(other._sketch)
        self.sum += other.sum

    def percentiles(self, *shares: float) -> list[float] | None:
        """Values in seconds below which the given shares (0..1) lie; None when it is empty."""
        return [self._sketch.get_quantile_value(share) or 0.0 for share in shares] if self.count else None

    def counts_up_to(self, bins: Sequence[int]) -> list[int]:
        """How many values are at most GAMMA^k, for each k of `bins`; exact, as these are bins' edges."""
        message = _PROTO.to_proto(self._sketch)
        store = message.positiveValues
        running = list(accumulate(store.contiguousBinCounts, initial=message.zeroCount))
        places = (k - store.contiguousBinIndexOffset + 1 for k in bins)
        return [int(running[min(max(place, 0), len(running) - 1)]) for place in places]

    def dump(self) -> tuple[bytes, float]:
        """What `load` makes the same distribution of, in the library's own wire format."""
        data: bytes = _PROTO.to_proto(self._sketch).SerializeToString()
        return data, self.sum

    @classmethod
    def load(cls, dumped: tuple[bytes, float]) -> Self:
        """The distribution that was dumped; raises DecodeError for other bytes."""
        loaded = cls()
        loaded._sketch = _PROTO.from_proto(Message.FromString(dumped[0]))
        loaded.sum = dumped[1]
        return loaded


class Tally:
    """What happened at one target in a stretch of time.

    `outcomes` counts requests that ended, by error kind or "ok"; `in_flight` is by how many the requests in flight have
    changed; tokens count when their request ends.
    """

    __slots__ = ("in_flight", "outcomes", "output_tokens", "prompt_tokens", "times")

    def __init__(self) -> None:
        self.in_flight = 0
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.times: dict[Metric, Distribution] = {}

    def end(self, record: Record) -> None:
        """Count a request that has ended."""
        self.in_flight -= 1
        self.outcomes[record.error or "ok"] += 1
        self.prompt_tokens += record.prompt_tokens or 0
        self.output_tokens += record.output_tokens or 0

    def observe(self, times: Mapping[Metric, float]) -> None:
        """Add a request's times in seconds."""
        for metric, seconds in times.items():
            distribution = self.times.get(metric)
            if distribution is None:
                distribution = self.times[metric] = Distribution()
            distribution.add(seconds)

    def merge(self, other: Self) -> None:
        """Add all of another one."""
        self.in_flight += other.in_flight
        self.outcomes.update(other.outcomes)
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        for metric, distribution in other.times.items():
            self.times.setdefault(metric, Distribution()).merge(distribution)

    def percentiles(self, metric: Metric, *shares: float) -> list[float] | None:
        """Percentiles of a metric in seconds; None where nothing was observed."""
        return self.times[metric].percentiles(*shares) if metric in self.times else None

    def dump(self) -> dict[str, Any]:
        """The tally as plain values and bytes, for a message to another process."""
        plain = {name: getattr(self, name) for name in ("in_flight", "prompt_tokens", "output_tokens")}
        times = {metric: distribution.dump() for metric, distribution in self.times.items()}
        return plain | {"outcomes": dict(self.outcomes), "times": times}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Self:
        """The tally that was dumped."""
        loaded = cls()
        for name in ("in_flight", "prompt_tokens", "output_tokens"):
            setattr(loaded, name, dumped[name])
        loaded.outcomes.update(dumped["outcomes"])
        loaded.times = {metric: Distribution.load(times) for metric, times in dumped["times"].items()}
        return loaded


def times_of(record: Record) -> dict[Metric, float]:
    """A request's times in seconds; those that it does not have, for one because it failed, are left out."""
    times: dict[Metric, float] = {}
    scheduled_ns = record.scheduled_ns
    if scheduled_ns is not None:
        times["send_lateness"] = max(0, record.sent_ns - scheduled_ns) / 1e9
    e2e = record.e2e_seconds
    if e2e is None:
        return times
    times["e2e"] = e2e
    if (ttft := record.ttft_seconds) is not None:
        times["ttft"] = ttft
    if (tpot := record.tpot_seconds) is not None:
        times["tpot"] = tpot
    if scheduled_ns is not None:
        times["response_time"] = e2e + (record.sent_ns - scheduled_ns) / 1e9
    return times
