"""The load test's options, defined once: the command line, the environment and the web form derive from them."""

import argparse
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Workload = Literal["lognormal", "classic", "sharegpt", "alpaca"]


class Options(BaseModel):
    """What a run sends, and where; lengths are in tokens, times in seconds."""

    model_config = ConfigDict(extra="forbid")

    workload: Workload = Field("lognormal", description="what is sent")
    input_mean: float = Field(64, ge=1, description="lognormal: mean prompt length in tokens")
    output_mean: float = Field(48, ge=1, description="lognormal: mean output length in tokens")
    sigma: float = Field(0.6, ge=0, le=3, description="spread of the lengths: sigma of their logarithm")
    max_context: int = Field(2048, ge=16, description="prompt + output tokens never exceed this")
    requests: int = Field(0, ge=0, description="measured requests to each server; 0: until stopped")
    warmup: int = Field(0, ge=0, description="requests sent before the measured ones and left out of statistics")
    drain: int = Field(0, ge=0, description="requests sent after the measured ones, to keep the load up until they end")
    seed: int = Field(0, ge=0, description="the same seed gives the same requests")
    timeout: float = Field(600, gt=0, le=86400, description="seconds until a request without its last token fails")
    hf_url: str = Field("http://127.0.0.1:8000", pattern="^https?://", description="the HF server")
    vllm_url: str = Field("http://127.0.0.1:8001", pattern="^https?://", description="the vLLM server")
    model: str = Field("", description="model name to ask for; empty: the first one that the server offers")
    records: str = Field("", description="new file for the records; empty: results/<time>-locust/records.jsonl")

    @field_validator("hf_url", "vllm_url")
    @classmethod
    def _names_a_server(cls, url: str) -> str:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:
            raise ValueError("expected http://HOST[:PORT] or https://HOST[:PORT]")
        return url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option to Locust's parser; not in a group, whose options its web form would leave out."""
    for name, info in Options.model_fields.items():
        kind: Any = info.annotation
        choices = list(get_args(kind)) if get_origin(kind) is Literal else None
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=str if choices else kind,
            choices=choices,
            default=info.default,
            env_var=f"HEADROOM_LOADTEST_{name.upper()}",
            help=info.description,
        )


def check(given: Mapping[str, Any]) -> Options:
    """Pick our options out of all that Locust has; raises ValueError that names field, value and what is allowed."""
    try:
        return Options(**{name: given[name] for name in Options.model_fields if name in given})
    except ValidationError as error:
        problems = (f"{p['loc'][0]}: {p['input']!r}: {p['msg']}" for p in error.errors())
        raise ValueError("; ".join(problems)) from None
