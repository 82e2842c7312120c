"""Live statistics of a run: fed as requests end, merged over Locust's workers, read by the page and by Prometheus.

It knows no web server and draws nothing; exact statistics come from the records afterwards.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import gevent

from loadtest.live.tally import METRICS, Distribution, Metric, Tally, times_of
from loadtest.records import Record

HISTORY_SECONDS = 120
WINDOW_SECONDS = 5
SHARES = (0.5, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Client:
    """What a process of the load generator last measured of itself: ratios of one core, seconds."""

    cpu_share: float
    lag_p99_seconds: float
    send_lateness_p99_seconds: float | None


@dataclass(frozen=True, slots=True)
class TargetPoint:
    """A target at one second: means and percentiles (50, 95, 99) of the last seconds, in seconds and per second."""

    output_tokens_per_second: float
    requests_per_second: float
    failed_per_second: dict[str, float]
    in_flight: int
    times: dict[Metric, list[float] | None]


@dataclass(frozen=True, slots=True)
class Point:
    """All targets at one second since the start of the test, and the CPU share of each process of the client."""

    second: int
    targets: dict[str, TargetPoint]
    cpu_shares: dict[str, float]


class Live:
    """The statistics of one process, or on Locust's master of all.

    `name` is this process's; `delay_seconds` is how long a second's numbers may take to get here. `run` holds a tally
    of the whole test per target: all requests, but the times of measured ones only. Not for threads.
    """

    def __init__(self, name: str = "local", delay_seconds: int = 0, clock: Callable[[], float] = time.monotonic):
        self.name = name
        self._delay = delay_seconds
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Forget everything: a test starts."""
        self.run: defaultdict[str, Tally] = defaultdict(Tally)
        self.clients: dict[str, Client] = {}
        self.started = math.floor(self._clock())
        self._seconds: defaultdict[int, defaultdict[str, Tally]] = defaultdict(lambda: defaultdict(Tally))
        self._cpu_shares: defaultdict[int, dict[str, float]] = defaultdict(dict)
        self._points: deque[Point] = deque(maxlen=HISTORY_SECONDS)
        self._next_second = self.started
        self._open: defaultdict[str, int] = defaultdict(int)  # in flight here, by target
        self._open_elsewhere: dict[str, dict[str, int]] = {}  # in flight by process and target
        self._shifts: dict[str, int] = {}

    def begin(self, target: str) -> None:
        """A request is sent to the target."""
        self._second()[target].in_flight += 1
        self.run[target].in_flight += 1
        self._open[target] += 1

    def add(self, record: Record) -> None:
        """A request that was begun has ended."""
        times = times_of(record)
        second, run = self._second()[record.target], self.run[record.target]
        second.end(record)
        second.observe(times)
        run.end(record)
        self._open[record.target] -= 1
        if record.phase == "measured":
            run.observe(times)

    def client(self, cpu_share: float, lag_p99: float) -> None:
        """Take what this process measured of itself: share of a core, lag of its event loop in seconds."""
        lateness = Distribution()
        for tallies in self._window(math.floor(self._clock())):
            for tally in tallies.values():
                if "send_lateness" in tally.times:
                    lateness.merge(tally.times["send_lateness"])
        p99 = lateness.percentiles(0.99)
        self._keep_client(self.name, Client(cpu_share, lag_p99, p99[0] if p99 else None))

    def report(self) -> dict[str, Any]:
        """What has come in since the last report, for `merge` in another process; plain values and bytes."""
        report = {
            "now": math.floor(self._clock()),
            "in_flight": dict(self._open),
            "seconds": {second: _dump(tallies) for second, tallies in self._seconds.items()},
            "run": _dump(self.run),
            "client": asdict(self.clients[self.name]) if self.name in self.clients else None,
        }
        self._seconds.clear()
        self.run.clear()
        return report

    def merge(self, name: str, report: Mapping[str, Any]) -> None:
        """Add the report of the process of that name."""
        # Whole seconds, settled once: a process on another host has another clock.
        shift = self._shifts.setdefault(name, math.floor(self._clock()) - report["now"])
        for second, dumped in report["seconds"].items():
            _merge(self._seconds[second + shift], dumped)
        _merge(self.run, report["run"])
        known = self._open_elsewhere.setdefault(name, {})
        for target, count in report["in_flight"].items():
            # Not zero when the process was taken for lost and is back.
            change = report["run"].get(target, {"in_flight": 0})["in_flight"]
            self._correct(target, count - known.get(target, 0) - change)
            known[target] = count
        if report["client"]:
            self._keep_client(name, Client(**report["client"]))
        self._prune()

    def forget(self, name: str) -> None:
        """A process is lost, and the requests that it had in flight with it."""
        for target, count in self._open_elsewhere.pop(name, {}).items():
            self._correct(target, -count)
        self.clients.pop(name, None)

    def processes(self) -> set[str]:
        """Names of all processes that have told of themselves and are not lost."""
        return {*self.clients, *self._open_elsewhere}

    def points(self, since: int, running: bool) -> list[Point]:
        """The points after second `since` of the test; once it has ended they stop at its last request.

        Gives way to other greenlets between the points that it has to compute.
        """
        until = math.floor(self._clock()) - 1 - self._delay
        if not running:
            until = min(until, max(self._seconds, default=self.started - 1))
        self._next_second = max(self._next_second, until + 1 - HISTORY_SECONDS)
        while self._next_second <= until:
            second, self._next_second = self._next_second, self._next_second + 1
            self._points.append(self._point(second))
            gevent.sleep(0)
        return [point for point in self._points if point.second > since]

    def _point(self, second: int) -> Point:
        length = min(WINDOW_SECONDS, second + 1 - self.started)
        targets = {target: self._target_point(target, second, length) for target in sorted(self.run)}
        shares: dict[str, float] = {}
        for earlier in range(second + 1 - WINDOW_SECONDS, second + 1):
            shares |= self._cpu_shares.get(earlier, {})
        return Point(second - self.started, targets, shares)

    def _target_point(self, target: str, second: int, length: int) -> TargetPoint:
        window = Tally()
        for tallies in self._window(second):
            if target in tallies:
                window.merge(tallies[target])
        failed = {kind: count / length for kind, count in sorted(window.outcomes.items()) if kind != "ok"}
        later = sum(
            tallies[target].in_flight for s, tallies in self._seconds.items() if s > second and target in tallies
        )
        return TargetPoint(
            output_tokens_per_second=window.output_tokens / length,
            requests_per_second=window.outcomes["ok"] / length,
            failed_per_second=failed,
            in_flight=self.run[target].in_flight - later,
            times={metric: window.percentiles(metric, *SHARES) for metric in METRICS},
        )

    def _window(self, second: int) -> list[defaultdict[str, Tally]]:
        return [self._seconds[s] for s in range(second + 1 - WINDOW_SECONDS, second + 1) if s in self._seconds]

    def _second(self) -> defaultdict[str, Tally]:
        now = math.floor(self._clock())
        if now not in self._seconds:
            self._prune()
        return self._seconds[now]

    def _correct(self, target: str, change: int) -> None:
        if change:
            self._second()[target].in_flight += change
            self.run[target].in_flight += change

    def _prune(self) -> None:
        oldest = math.floor(self._clock()) - HISTORY_SECONDS - WINDOW_SECONDS - self._delay
        for kept in (self._seconds, self._cpu_shares):
            for second in [s for s in kept if s < oldest]:
                del kept[second]

    def _keep_client(self, name: str, client: Client) -> None:
        self.clients[name] = client
        self._cpu_shares[math.floor(self._clock())][name] = client.cpu_share


def _dump(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    return {target: tally.dump() for target, tally in tallies.items()}


def _merge(tallies: defaultdict[str, Tally], dumped: Mapping[str, Mapping[str, Any]]) -> None:
    for target, tally in dumped.items():
        tallies[target].merge(Tally.load(tally))
