"""The load test's options, defined once: the command line, the environment and the web form derive from them."""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loadtest.work.arrivals import parse_stages

Arrival = Literal["closed", "constant", "poisson", "gamma", "steps", "ramp", "trace"]
Workload = Literal["lognormal", "classic", "sharegpt", "alpaca", "synthetic", "dataset", "trace"]
Lengths = Literal["lognormal", "constant", "uniform", "normal", "zipf", "empirical"]
# Of the environment variable of each option.
PREFIX = "HEADROOM_LOADTEST_"


class Options(BaseModel):
    """What a run sends, when, and where; lengths are in tokens, times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    arrival: Arrival = Field("closed", description="when requests are sent; closed: when a user's last one has ended")
    rate: float = Field(
        0.0, ge=0, le=1e6, description="constant, poisson, gamma: requests, or conversations, a second to each server"
    )
    burstiness: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="gamma, steps, ramp: shape of the gaps; 1: Poisson, inf: even"
    )
    stages: str = Field("", description="steps: RATExSECONDS,... such as 5x30,10x30; ramp: also FROM-TOxSECONDS")
    duration: float = Field(0.0, ge=0, le=1e7, description="seconds after which no request is sent; 0: no limit")
    trace: str = Field("", description="trace file: Azure LLM inference or BurstGPT (CSV), Mooncake (JSONL)")
    time_scale: float = Field(1.0, gt=0, le=1e6, description="trace: times are multiplied by this; 0.5: twice as fast")
    workload: Workload = Field("lognormal", description="what is sent")
    input_lengths: Lengths = Field("lognormal", description="synthetic: distribution of the prompt lengths")
    output_lengths: Lengths = Field("lognormal", description="synthetic: distribution of the output lengths")
    input_mean: float = Field(64.0, ge=1, description="lognormal, synthetic: mean prompt length in tokens")
    output_mean: float = Field(48.0, ge=1, description="lognormal, synthetic: mean output length; files: default")
    sigma: float = Field(
        0.6, ge=0, le=3, description="spread: sigma of the lengths' logarithm; normal, uniform: share of the mean"
    )
    input_histogram: str = Field("", description="empirical: CSV file of length,count for prompts")
    output_histogram: str = Field("", description="empirical: CSV file of length,count for outputs")
    prefix_groups: int = Field(0, ge=0, description="synthetic prompts share one of so many prefixes; 0: none")
    prefix_tokens: int = Field(0, ge=0, description="length of a shared prefix in tokens, before the prompt's own")
    turns: int = Field(1, ge=1, le=1000, description="turns of a synthetic conversation; each waits for an answer")
    dataset: str = Field("", description="file or folder of real prompts: .json, .jsonl, .parquet, .arrow")
    tokenizer: str = Field("", description="tokenizer's id or folder; needed for chats and to count answers in tokens")
    skip_bad_lines: bool = Field(
        False, description="pass over bad lines of a file and count them; in a trace also lines earlier than one above"
    )
    endpoint: Literal["completions", "chat"] = Field("completions", description="API that requests are sent to")
    max_context: int = Field(2048, ge=16, description="prompt + output tokens never exceed this")
    requests: int = Field(0, ge=0, description="measured requests to each server; 0: until stopped")
    min_seconds: float = Field(
        0.0, ge=0, le=86400, description="closed: with requests, go on with more of them for so long at least"
    )
    until_file: str = Field("", description="with min_seconds, go on until this file is there as well")
    warmup: int = Field(0, ge=0, description="requests sent before the measured ones and left out of statistics")
    drain: int = Field(0, ge=0, description="requests sent after the measured ones, to keep the load up until they end")
    seed: int = Field(0, ge=0, description="the same seed gives the same requests")
    timeout: float = Field(600.0, gt=0, le=86400, description="seconds until a request without its last token fails")
    token_timeout: float = Field(0.0, ge=0, le=86400, description="seconds without data until a stream fails; 0: off")
    retries: int = Field(0, ge=0, le=10, description="times that a failed request is sent again")
    stamps: Literal["auto", "kernel", "user"] = Field("auto", description="clock that stamps what is received")
    hf_url: str = Field("http://127.0.0.1:8000", pattern="^https?://", description="the HF server")
    vllm_url: str = Field("http://127.0.0.1:8001", pattern="^https?://", description="the vLLM server")
    model: str = Field("", description="model name to ask for; empty: the first one that the server offers")
    records: str = Field("", description="new file for the records; empty: results/<time>-locust/records.arrow")

    @property
    def total(self) -> int | None:
        """Requests to each server, at least, those of warm-up and drain included; None: until stopped."""
        return self.warmup + self.requests + self.drain if self.requests else None

    @field_validator("hf_url", "vllm_url")
    @classmethod
    def _names_a_server(cls, url: str) -> str:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:
            raise ValueError("expected http://HOST[:PORT] or https://HOST[:PORT]")
        if "@" in parts.netloc:
            raise ValueError("expected no user or password; keys come from HEADROOM_HF_API_KEY, HEADROOM_VLLM_API_KEY")
        if parts.query or parts.fragment:
            raise ValueError("expected nothing after the path")
        # Many programs are given the address with it; all paths that are asked for here begin with it.
        return url.rstrip("/").removesuffix("/v1") if parts.path.rstrip("/").endswith("/v1") else url

    @field_validator("stages")
    @classmethod
    def _can_be_read(cls, stages: str) -> str:
        if stages:
            parse_stages(stages)
        return stages

    @model_validator(mode="after")
    def _fit_together(self) -> "Options":
        problems = [
            f"{name}: {getattr(self, name)!r}: {expected}"
            for name, expected in (*_arrival_problems(self), *_length_problems(self), *_prompt_problems(self))
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


Problems = Iterator[tuple[str, str]]


# An option that the arrivals or the workload chosen would not read is an error: a rate without an arrival is a closed
# loop by mistake.
READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "arrival": {
        "rate": ("constant", "poisson", "gamma"),
        "burstiness": ("gamma", "steps", "ramp"),
        "duration": ("constant", "poisson", "gamma", "steps", "ramp", "trace"),
        "stages": ("steps", "ramp"),
        "min_seconds": ("closed",),
        "time_scale": ("trace",),
    },
    "workload": {
        "input_lengths": ("synthetic",),
        "output_lengths": ("synthetic",),
        "input_mean": ("lognormal", "synthetic"),
        "output_mean": ("lognormal", "synthetic", "dataset"),
        "sigma": ("lognormal", "synthetic"),
        "input_histogram": ("synthetic",),
        "output_histogram": ("synthetic",),
    },
}


def _given(options: Options, name: str) -> bool:
    return bool(getattr(options, name) != Options.model_fields[name].default)


def _unread(options: Options, by: str) -> Problems:
    chosen = getattr(options, by)
    for name, readers in READ_BY[by].items():
        if chosen not in readers and _given(options, name):
            yield name, f"is not read by {by} {chosen}; expected {by} {' or '.join(readers)}"


def _arrival_problems(options: Options) -> Problems:
    arrival = options.arrival
    yield from _unread(options, "arrival")
    if options.drain and not options.requests:
        yield "drain", "is not read without requests, which it follows"
    if options.min_seconds and not options.requests:
        yield "min_seconds", "is not read without requests, which it makes more of"
    if options.until_file and not options.min_seconds:
        yield "until_file", "is not read without min_seconds, after which it is waited for"
    if options.min_seconds and options.turns > 1:
        yield "min_seconds", f"needs turns 1, not {options.turns}"
    if arrival in ("constant", "poisson", "gamma") and not options.rate:
        yield "rate", f"arrival {arrival} needs a rate above 0 requests per second"
    if arrival in ("steps", "ramp") and not options.stages:
        yield "stages", f"arrival {arrival} needs stages such as {'5x30,10x30' if arrival == 'steps' else '1-20x60'}"
    if arrival == "steps" and any(stage.begin != stage.end for stage in parse_stages(options.stages or "1x1")):
        yield "stages", "a rate that changes inside a stage needs arrival ramp"
    if "trace" in (arrival, options.workload) and not options.trace:
        yield "trace", f"{'arrival' if arrival == 'trace' else 'workload'} trace needs a trace file"
    elif options.trace and "trace" not in (arrival, options.workload):
        yield "trace", "is read by arrival trace and workload trace alone"


def _length_problems(options: Options) -> Problems:
    # Prompts of a file that gives them no output length get the mean.
    yield from (one for one in _unread(options, "workload") if one[0] != "output_mean" or not options.dataset)
    if options.workload != "synthetic":
        return
    for side in ("input", "output"):
        lengths = getattr(options, f"{side}_lengths")
        if lengths == "empirical" and not getattr(options, f"{side}_histogram"):
            yield f"{side}_histogram", f"{side}_lengths empirical needs a CSV file of length,count"
        unread = f"{side}_mean" if lengths == "empirical" else f"{side}_histogram"
        if _given(options, unread):
            yield unread, f"is not read by {side}_lengths {lengths}"


def _prompt_problems(options: Options) -> Problems:
    workload = options.workload
    from_file = workload == "dataset" or bool(options.dataset and workload in ("sharegpt", "alpaca"))
    made = workload != "classic" and not from_file
    if bool(options.prefix_groups) != bool(options.prefix_tokens):
        missing = "prefix_tokens" if options.prefix_groups else "prefix_groups"
        yield missing, "prefix_groups and prefix_tokens need each other"
    for name, value, off in (("turns", options.turns, 1), ("prefix_groups", options.prefix_groups, 0)):
        if value != off and (not made or workload == "trace"):
            yield name, f"needs synthetic prompts, not workload {workload}"
    if workload == "dataset" and not options.dataset:
        yield "dataset", "workload dataset needs a file or folder"
    if options.dataset and not from_file:
        yield "dataset", f"is not read by workload {workload}; expected dataset, sharegpt or alpaca"
    if options.endpoint == "chat" and made and not options.tokenizer:
        yield "tokenizer", f"endpoint chat needs one, to make text of exact length for workload {workload}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option to Locust's parser; not in a group, whose options its web form would leave out."""
    for name, info in Options.model_fields.items():
        kind: Any = info.annotation
        choices = list(get_args(kind)) if get_origin(kind) is Literal else None
        reads: dict[str, Any] = {"type": str if choices else kind, "choices": choices}
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=info.default,
            env_var=_variable(name),
            help=info.description,
            **({"action": "store_true"} if kind is bool else reads),
        )


def _variable(name: str) -> str:
    """The environment variable of an option."""
    return f"{PREFIX}{name.upper()}"


def check_variables(names: Iterable[str]) -> None:
    """Raise ValueError for environment variables that look like options and are none; names the closest that is one."""
    known = [_variable(name) for name in Options.model_fields]
    unknown = [name for name in sorted(names) if name.startswith(PREFIX) and name not in known]
    if unknown:
        raise ValueError(
            "; ".join(f"{name}: is no option; expected {get_close_matches(name, known, 1, 0)[0]}" for name in unknown)
        )


def check(given: Mapping[str, Any]) -> Options:
    """Pick our options out of all that Locust has; raises ValueError that names field, value and what is allowed."""
    try:
        return Options(**{name: given[name] for name in Options.model_fields if name in given})
    except ValidationError as error:
        # Those of a whole set of options name their fields themselves.
        problems = (
            (f"{p['loc'][0]}: {_shown(p['input'])}: " if p["loc"] else "") + p["msg"].removeprefix("Value error, ")
            for p in error.errors()
        )
        raise ValueError("; ".join(problems)) from None


def _shown(value: object) -> str:
    """A value without the password that an address may have."""
    return re.sub(r"//.*@", "//***@", repr(value))
