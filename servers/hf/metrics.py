"""Prometheus metrics, named like vLLM's where the meaning is the same."""

import asyncio
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from servers.hf.engine import Engine, State

# Fine enough for a small model on a fast GPU; about 25 % apart at the low end.
BUCKETS = (
    *(0.001, 0.00125, 0.0016, 0.002, 0.0025, 0.0032, 0.004, 0.005, 0.0063, 0.008),
    *(0.01, 0.0125, 0.016, 0.02, 0.025, 0.032, 0.04, 0.05, 0.063, 0.08, 0.1, 0.16, 0.25, 0.4, 0.63),
    *(1.0, 1.6, 2.5, 4.0, 6.3, 10.0, 16.0, 25.0, 40.0, 63.0, 100.0),
)

# Less than the 10 s after which Prometheus gives up; more than the step in which a large prompt is read.
ANSWER_SECONDS = 5

#: How a request can end. `rejected`: with a 4xx; `unavailable`: not taken, since the server ends or has failed; `oom`:
#: the memory did not suffice; `cancelled`: the client went away.
OUTCOMES = ("stop", "length", "cancelled", "rejected", "unavailable", "oom", "error")


class Metrics:
    """The server's metrics, in a registry that is passed in; times are in seconds."""

    def __init__(self, registry: CollectorRegistry, engine: str):
        labels = ["engine"]

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"hf:{name}_seconds", text, labels, registry=registry, buckets=BUCKETS).labels(engine)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"hf:{name}", text, labels, registry=registry).labels(engine)

        self._engine = engine
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of the requests that began")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated")
        self.ttft = histogram("time_to_first_token", "From the request's arrival to its first token")
        self.queue = histogram("request_queue_time", "From the request's arrival to its start in the engine")
        self.itl = histogram("inter_token_latency", "Between one token and the next")
        self.e2e = histogram("e2e_request_latency", "From the request's arrival to its last token")
        self.finished = Counter(
            "hf:request", "Requests that ended, by outcome", [*labels, "outcome"], registry=registry
        )
        for outcome in OUTCOMES:
            self.finished.labels(engine, outcome)

    def end(self, outcome: str) -> None:
        """Count a request that ended: one of OUTCOMES."""
        self.finished.labels(self._engine, outcome).inc()


class StateCollector(Collector):
    """Exports the state of an engine that was last read."""

    def __init__(self, engine: Engine, bytes_per_token: int):
        self._engine = engine
        self._bytes_per_token = bytes_per_token
        self._state: State | None = State()

    async def read(self) -> None:
        """Read the state once, so that all gauges of a scrape are of one moment; absent while the engine hangs."""
        try:
            self._state = await asyncio.wait_for(self._engine.state(), ANSWER_SECONDS)
        except TimeoutError:
            self._state = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Called by the registry."""
        if not self._state:
            return
        state, held = self._state, self._state.held
        yield self._gauge("num_requests_running", "Requests being generated", state.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for their turn", state.waiting)
        for unit, size in (("tokens", 1), ("bytes", self._bytes_per_token)):
            yield self._gauge(f"kv_capacity_{unit}", "The most that may be set aside", self._engine.capacity * size)
            yield self._gauge(f"kv_allocated_{unit}", "Set aside for sequences now", held.allocated * size)
            yield self._gauge(f"kv_live_{unit}", "Holds tokens that running requests need", held.live * size)
            waste = GaugeMetricFamily(f"hf:kv_waste_{unit}", "Set aside but not live", labels=["engine", "reason"])
            for reason, slots in held.waste.items():
                waste.add_metric([self._engine.name, reason], slots * size)
            yield waste
        if state.allocator:
            yield from self._allocator(*state.allocator)

    def _allocator(self, allocated: int, reserved: int) -> Iterator[GaugeMetricFamily]:
        yield self._gauge("torch_allocated_bytes", "Held by tensors", allocated)
        yield self._gauge("torch_reserved_bytes", "Taken from the driver by torch's allocator", reserved)
        share = (reserved - allocated) / reserved if reserved else 0.0
        yield self._gauge("torch_fragmentation_ratio", "Share of the reserved bytes that no tensor holds", share)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"hf:{name}", text, labels=["engine"])
        gauge.add_metric([self._engine.name], value)
        return gauge
