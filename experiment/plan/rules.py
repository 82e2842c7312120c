"""What `headroom gate` holds a run against: the part of a plan under `gate`, and the metrics that it may name."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from experiment.analysis.stats import LATENCIES

STATISTICS = ("mean", "p50", "p90", "p99")
# Of these more is better; of latencies less is.
RATES = {"output_throughput": "tokens/s", "goodput": "requests/s"}
METRICS = (*RATES, *(f"{latency}.{statistic}" for latency in LATENCIES for statistic in STATISTICS))


class Checked(BaseModel):
    """Keys of a plan: none that is not known, and no boolean where none is meant, which `yes` is in YAML."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = cls.model_fields[info.field_name or ""].annotation
        if (
            wanted is not bool
            and (found := next((one for one in _leaves(value) if isinstance(one, bool)), None)) is not None
        ):
            raise ValueError(f"expected no boolean, got {str(found).lower()}; in YAML yes, no, on and off are booleans")
        return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        yield from value.values() if isinstance(value, dict) else value
    else:
        yield value


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"expected one of {', '.join(METRICS)}")
    return metric


Metric = Annotated[str, AfterValidator(_known)]


class Rules(Checked):
    """What a run must keep to, beside a baseline run and for itself.

    A regression is the share by which a metric is worse than the baseline's. `limits` are per metric: the most of a
    latency in seconds, the least of a rate in tokens or requests per second. Without `targets` they are for all but the
    first, or for that one where it is alone.
    """

    allowed_regression: float = Field(0.05, ge=0, lt=1, description="how much worse than the baseline: 0.05 is 5 %")
    metrics: list[Metric] = Field(
        ["output_throughput", "ttft_seconds.mean", "tpot_seconds.mean"], description="what may regress no further"
    )
    limits: dict[Metric, Annotated[float, Field(gt=0)]] = Field(
        {}, description="bounds of figures over all requests, such as ttft_seconds.p99: 0.5"
    )
    targets: list[str] = Field([], description="which are judged; none: all but the first, or it where it is alone")
