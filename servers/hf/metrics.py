"""Prometheus metrics, named like vLLM's where the meaning is the same."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Fine enough for a small model on a fast GPU; about 25 % apart at the low end.
BUCKETS = (
    *(0.001, 0.00125, 0.0016, 0.002, 0.0025, 0.0032, 0.004, 0.005, 0.0063, 0.008),
    *(0.01, 0.0125, 0.016, 0.02, 0.025, 0.032, 0.04, 0.05, 0.063, 0.08, 0.1, 0.16, 0.25, 0.4, 0.63),
    *(1.0, 1.6, 2.5, 4.0, 6.3, 10.0, 16.0, 25.0, 40.0, 63.0, 100.0),
)


class Metrics:
    """The server's metrics, in a registry that is passed in; times are in seconds."""

    def __init__(self, registry: CollectorRegistry, engine: str):
        labels = ["engine"]

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"hf:{name}_seconds", text, labels, registry=registry, buckets=BUCKETS).labels(engine)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"hf:{name}", text, labels, registry=registry).labels(engine)

        self._registry = registry
        self._engine = engine
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of the requests that were taken")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated")
        self.ttft = histogram("time_to_first_token", "From the request's arrival to its first token")
        self.itl = histogram("inter_token_latency", "Between one token and the next")
        self.e2e = histogram("e2e_request_latency", "From the request's arrival to its last token")
        self.finished = Counter(
            "hf:request", "Requests that ended, by outcome", [*labels, "outcome"], registry=registry
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Export a gauge that is read at scrape."""
        Gauge(f"hf:{name}", text, ["engine"], registry=self._registry).labels(self._engine).set_function(read)

    def end(self, outcome: str) -> None:
        """Count a request that ended: `stop`, `length`, `cancelled`, `error` or `rejected`."""
        self.finished.labels(self._engine, outcome).inc()
