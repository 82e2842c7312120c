"""What Prometheus is told of a run."""

import pytest
from prometheus_client import CollectorRegistry

from loadtest.live.metrics import LABELS, LiveCollector
from loadtest.live.statistics import Live
from loadtest.live.tally import METRICS
from loadtest.records import ErrorKind, Record

# Far apart enough that each is in a bucket of its own, the first below all and the last above all.
TTFTS = [0.00005, 0.0002, 0.02, 0.5, 3.0, 5000.0]


def record(target: str, ttft: float, error: ErrorKind | None = None) -> Record:
    first = int(ttft * 1e9)
    return Record(
        index=0, target=target, phase="measured", max_tokens=5, sent_ns=0, end_ns=first, error=error,
        prompt_tokens=3, output_tokens=5, chunk_ns=[first, first + 400_000_000],
    )  # fmt: skip


@pytest.fixture
def live() -> Live:
    live = Live()
    for ttft in TTFTS:
        live.begin("hf")
        live.add(record("hf", ttft))
    live.begin("vllm")
    live.begin("vllm")
    live.add(record("vllm", 0, "reset"))
    live.client(0.25, 0.002)
    return live


@pytest.fixture
def registry(live: Live) -> CollectorRegistry:
    registry = CollectorRegistry()
    LiveCollector(live, lambda: 12, registry)
    return registry


def test_counters_and_gauges_tell_what_happened_by_server(registry: CollectorRegistry) -> None:
    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"headroom_loadtest_{name}", labels)

    assert value("users") == 12
    assert value("requests_total", server="hf", kind="ok") == 6
    assert value("requests_total", server="vllm", kind="reset") == 1
    assert value("requests_total", server="vllm", kind="ok") is None
    assert value("prompt_tokens_total", server="hf") == 18
    assert value("output_tokens_total", server="hf") == 30
    assert value("requests_in_flight", server="hf") == 0
    assert value("requests_in_flight", server="vllm") == 1
    assert value("client_cpu_ratio", process="local") == 0.25
    assert value("client_loop_lag_seconds", process="local") == 0.002


def test_what_is_counted_only_when_a_request_ends_says_so(registry: CollectorRegistry) -> None:
    help_of = {family.name.removeprefix("headroom_loadtest_"): family.documentation for family in registry.collect()}
    late = {"prompt_tokens", "output_tokens", *(f"{metric}_seconds" for metric in METRICS)}
    assert {name for name, text in help_of.items() if " ends" in text} == late


def test_a_bucket_counts_the_times_up_to_its_bound(registry: CollectorRegistry) -> None:
    name = "headroom_loadtest_ttft_seconds"
    for bound in [*LABELS, "+Inf"]:
        counted = registry.get_sample_value(f"{name}_bucket", {"server": "hf", "le": bound})
        assert counted == sum(ttft <= float(bound) for ttft in TTFTS)
    assert registry.get_sample_value(f"{name}_count", {"server": "hf"}) == len(TTFTS)
    assert registry.get_sample_value(f"{name}_sum", {"server": "hf"}) == pytest.approx(sum(TTFTS))


def test_buckets_are_about_ten_a_decade_from_a_tenth_of_a_millisecond_to_a_thousand_seconds() -> None:
    bounds = [float(label) for label in LABELS]
    assert bounds[0] == pytest.approx(1e-4, rel=0.05)
    assert bounds[-1] == pytest.approx(1000, rel=0.25)
    assert len(bounds) == pytest.approx(7 * 10, rel=0.1)


def test_failed_requests_are_in_no_histogram(registry: CollectorRegistry) -> None:
    assert registry.get_sample_value("headroom_loadtest_ttft_seconds_count", {"server": "vllm"}) is None
