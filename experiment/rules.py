"""What `headroom gate` holds a run against: the part of a plan under `gate`, and the metrics that it may name."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from experiment.stats import LATENCIES

STATISTICS = ("mean", "p50", "p90", "p99")
THROUGHPUT = "output_throughput"
METRICS = (THROUGHPUT, *(f"{latency}_{statistic}" for latency in LATENCIES for statistic in STATISTICS))


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"{metric!r}: unknown metric; known: {', '.join(METRICS)}")
    return metric


Metric = Annotated[str, AfterValidator(_known)]


def more_is_better(metric: str) -> bool:
    """Whether a larger value is the better one: of a throughput it is, of a latency it is not."""
    return metric == THROUGHPUT


class Rules(BaseModel):
    """What a run must keep to, beside a baseline run and for itself.

    A regression is the share by which a metric is worse than the baseline's. `limits` are per metric: the most of a
    latency in seconds, the least of a throughput in tokens per second. Without `targets` they are for all but the
    first, or for that one where it is alone.
    """

    model_config = ConfigDict(extra="forbid")

    allowed_regression: float = Field(0.05, ge=0, lt=1)
    metrics: list[Metric] = Field(default=[THROUGHPUT, "ttft_seconds_mean", "tpot_seconds_mean", "e2e_seconds_mean"])
    limits: dict[Metric, Annotated[float, Field(gt=0)]] = Field(default={})
    targets: list[str] = Field(default=[])
