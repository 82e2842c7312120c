"""What a comparison runs, defined once: the command line and the environment derive from it."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

TARGETS = ("hf", "vllm")


@dataclass(frozen=True)
class Cell:
    """One server under one load; the same `seed` means the same requests."""

    index: int
    target: str
    concurrency: int
    repeat: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return f"{self.index:02d}-{self.target}-c{self.concurrency}-r{self.repeat}"


class Plan(BaseSettings):
    """Start the HF server, vLLM and the monitor here, load each server in turn and write a report."""

    model_config = SettingsConfigDict(
        env_prefix="HEADROOM_",
        cli_prog_name="headroom compare",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        extra="forbid",
    )

    model: str = Field("random:tiny", description="a Hugging Face id, a folder, or random:SHAPE")
    concurrency: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        [1, 4, 16], min_length=1, description="levels: requests in flight, for example 1,4,16"
    )
    requests_per_user: int = Field(3, ge=1, description="measured requests for each one in flight")
    min_requests: int = Field(20, ge=2, description="measured requests in a cell, at least")
    repeats: int = Field(
        4, ge=1, le=20, description="pairs of cells at each level, in A B B A order; a verdict needs two or more"
    )
    workload: Literal["lognormal", "classic", "sharegpt", "alpaca"] = Field("lognormal", description="what is sent")
    input_mean: float = Field(64, ge=1, description="lognormal: mean prompt length in tokens")
    output_mean: float = Field(48, ge=1, description="lognormal: mean output length in tokens")
    sigma: float = Field(0.6, ge=0, le=3, description="lognormal: sigma of the lengths' logarithm")
    max_model_len: int | None = Field(None, ge=2, description="context of both servers; default: the model's own limit")
    seed: int = Field(1, ge=0, description="the same seed gives the same requests")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of both servers")
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1, description="share of a GPU for vLLM; HF is beside it")
    hf_args: str = Field("", description="more arguments for servers.hf, as one string")
    vllm_args: str = Field("", description="more arguments for servers.vllm, as one string")
    hf_port: int = Field(8000, ge=1, le=65535, description="port of the HF server")
    vllm_port: int = Field(8001, ge=1, le=65535, description="port of vLLM")
    monitor_port: int = Field(9400, ge=1, le=65535, description="port of the monitor")
    start_seconds: float = Field(900, gt=0, description="give up when a server is not healthy by then")
    cell_seconds: float = Field(900, gt=0, description="give up on a cell that takes longer")
    out: str = Field("results", description="folder in which the run makes a folder of its own")

    @field_validator("concurrency")
    @classmethod
    def _each_level_once(cls, levels: list[int]) -> list[int]:
        if len(set(levels)) != len(levels):
            raise ValueError("each level may be given once")
        return levels

    @field_validator("hf_args", "vllm_args")
    @classmethod
    def _is_a_command_line(cls, arguments: str) -> str:
        shlex.split(arguments)
        return arguments

    def requests(self, concurrency: int) -> int:
        """Measured requests in a cell."""
        return max(self.min_requests, self.requests_per_user * concurrency)

    def cells(self) -> Iterator[Cell]:
        """Yield the cells in the order in which they run: at each level A B, B A, A B, ..."""
        index = 0
        for level in self.concurrency:
            for repeat in range(self.repeats):
                order = TARGETS if repeat % 2 == 0 else TARGETS[::-1]
                for target in order:
                    index += 1
                    yield Cell(index, target, level, repeat + 1, self.seed + 1_000_000 * level + 10_000 * repeat)
