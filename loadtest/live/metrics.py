"""The live statistics as Prometheus metrics."""

from collections.abc import Callable, Iterator

import gevent
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from loadtest.live.statistics import Live
from loadtest.live.tally import GAMMA, METRICS, Distribution
from loadtest.live.tally import Metric as TimeMetric

PREFIX = "headroom_loadtest_"
# Every eleventh edge of the sketch's bins from 0.1 ms to 1,000 s: about ten buckets a decade, with exact counts.
BOUNDS = range(-462, 353, 11)
LABELS = [f"{GAMMA**k:.6g}" for k in BOUNDS]

# Tokens in flight are not known: chunks are not tokens, and streams are read when they have ended.
AT_END = "; counted when the request ends"
HELP: dict[TimeMetric, str] = {
    "ttft": "Time from send to the first output token of measured requests",
    "tpot": "Time per output token after the first of measured requests",
    "e2e": "Time from send to the last output token of measured requests",
    "response_time": "Time from schedule to the last output token of measured requests, open loop only",
    "send_lateness": "Time from schedule to send of measured requests, open loop only",
}


class LiveCollector(Collector):
    """Answers a scrape from live statistics; `users` says how many of Locust's users run."""

    def __init__(self, live: Live, users: Callable[[], int], registry: CollectorRegistry) -> None:
        self._live = live
        self._users = users
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield a family per metric; counters start at zero with every test."""
        yield GaugeMetricFamily(f"{PREFIX}users", "Users of Locust that run", value=self._users())
        yield from self._counts()
        yield from self._clients()
        for metric in METRICS:
            gevent.sleep(0)  # the load goes on between two histograms
            family = HistogramMetricFamily(f"{PREFIX}{metric}_seconds", f"{HELP[metric]}{AT_END}", labels=["server"])
            for server, tally in self._live.run.items():
                if metric in tally.times:
                    _add(family, server, tally.times[metric])
            yield family

    def _counts(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            f"{PREFIX}requests", 'Requests that ended, by error kind or "ok"', labels=["server", "kind"]
        )
        prompt = CounterMetricFamily(
            f"{PREFIX}prompt_tokens", "Prompt tokens, counted when their request ends", labels=["server"]
        )
        output = CounterMetricFamily(
            f"{PREFIX}output_tokens",
            "Output tokens, counted when their request ends, not while they stream",
            labels=["server"],
        )
        in_flight = GaugeMetricFamily(f"{PREFIX}requests_in_flight", "Requests sent and not ended", labels=["server"])
        for server, tally in self._live.run.items():
            for kind, count in tally.outcomes.items():
                requests.add_metric([server, kind], count)
            prompt.add_metric([server], tally.prompt_tokens)
            output.add_metric([server], tally.output_tokens)
            in_flight.add_metric([server], tally.in_flight)
        yield from (requests, prompt, output, in_flight)

    def _clients(self) -> Iterator[Metric]:
        cpu = GaugeMetricFamily(
            f"{PREFIX}client_cpu_ratio", "Share of a core that the load generator's process takes", labels=["process"]
        )
        lag = GaugeMetricFamily(
            f"{PREFIX}client_loop_lag_seconds", "Lag of the process's event loop, 99th percentile", labels=["process"]
        )
        for process, client in self._live.clients.items():
            cpu.add_metric([process], client.cpu_share)
            lag.add_metric([process], client.lag_p99_seconds)
        yield from (cpu, lag)


def _add(family: HistogramMetricFamily, server: str, times: Distribution) -> None:
    counts = [*times.counts_up_to(BOUNDS), times.count]
    family.add_metric([server], list(zip([*LABELS, "+Inf"], counts, strict=True)), sum_value=times.sum)
