"""What a comparison runs, defined once: plan.yaml, the command line and the environment derive from it."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from experiment.plan.rules import Checked, Rules

# What a target's name cannot be: other programs and layers of memory are called so.
RESERVED = ("monitor", "unattributed")
Limit = Literal["ttft_seconds", "tpot_seconds", "e2e_seconds"]
Arrival = Literal["closed", "poisson", "constant"]


@dataclass(frozen=True)
class Cell:
    """One server under one load; the same `seed` means the same requests at the same times.

    `level` is how many requests are in flight, or in an open loop the requests per second.
    """

    index: int
    target: str
    level: float
    repeat: int
    seed: int
    arrival: Arrival = "closed"
    search: bool = False

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return f"{self.index:02d}-{self.target}-{'c' if self.arrival == 'closed' else 'q'}{self.level:g}-r{self.repeat}"

    @property
    def load(self) -> str:
        """The load in words."""
        return f"concurrency {self.level:g}" if self.arrival == "closed" else f"{self.level:g} requests/s"


class Target(Checked):
    """A server: one of ours with its arguments, or the URL of one that runs already."""

    name: str = Field(pattern="^[a-z0-9-]+$", max_length=40, description="in folders, tables and charts")
    kind: Literal["hf", "vllm", "url"] = Field(description="servers.hf, servers.vllm, or any OpenAI-compatible server")
    args: str = Field("", description="hf, vllm: arguments for the server that is started, as one string")
    gpus: str = Field(
        "",
        coerce_numbers_to_str=True,
        description="hf, vllm: GPUs by nvidia-smi's numbers, as 0 or 0,1; default: all",
    )
    url: str = Field("", pattern="^(https?://.+)?$", description="use the server there instead of starting one")
    model: str = Field("", description="model to ask a server at a URL for; default: the first that it offers")
    server: str = Field("", description="HEADROOM_SERVER of a server at a URL, where that is not the target's name")

    def __repr__(self) -> str:
        """What was said of it, as a plan says it."""
        return str(self.model_dump(exclude_defaults=True))

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"expected another name than {' or '.join(RESERVED)}")
        return name

    @field_validator("gpus")
    @classmethod
    def _are_numbers(cls, gpus: str) -> str:
        if gpus and not re.fullmatch("[0-9]+(,[0-9]+)*", gpus):
            raise ValueError("expected numbers with commas between them, as 0 or 0,1")
        return gpus

    @field_validator("args")
    @classmethod
    def _is_a_command_line(cls, arguments: str) -> str:
        shlex.split(arguments)
        return arguments

    @model_validator(mode="after")
    def _fits_together(self) -> "Target":
        if self.kind == "url" and not self.url:
            raise ValueError("kind url needs a url")
        if self.url and self.args:
            raise ValueError("args are for a server that is started here; with a url none is")
        if self.url and self.gpus:
            raise ValueError("gpus are for a server that is started here; with a url none is")
        if self.model and not self.url:
            raise ValueError("model is for a server at a url; those that are started here serve the plan's")
        if self.server and not self.url:
            raise ValueError("server is for a server at a url; those that are started here bear the target's name")
        return self


class Plan(Checked):
    """Load each target in turn with the same requests and write a report."""

    model: str = Field("random:tiny", description="a Hugging Face id, a folder, or random:SHAPE")
    targets: list[Target] = Field(
        [Target(name="hf", kind="hf"), Target(name="vllm", kind="vllm")],
        min_length=1,
        max_length=20,
        description="the servers; the first is the baseline",
    )
    arrival: Arrival = Field("closed", description="closed: a user sends when its last request has ended; else by rate")
    levels: list[Annotated[float, Field(ge=0.001, le=1_000_000)]] = Field(
        [1, 4, 16], min_length=1, description="closed: requests in flight, for example 1,4,16; else requests/s"
    )
    requests: int | None = Field(
        None, ge=2, description="exactly so many measured requests in a cell; else by those below"
    )
    requests_per_user: int = Field(3, ge=1, description="closed: measured requests for each one in flight")
    min_seconds: float = Field(2, ge=0, le=86400, description="closed: a cell is measured for so long at least")
    duration_seconds: float = Field(60, gt=0, description="open loop: measured requests are those of so many seconds")
    min_requests: int = Field(20, ge=2, description="measured requests in a cell, at least")
    ramp_seconds: float = Field(5, ge=0, description="open loop: requests before the measured ones, and after them")
    repeats: int = Field(4, ge=1, le=20, description="cells of each target at each level; a verdict needs two or more")
    order: Literal["ABBA", "ABAB"] = Field("ABBA", description="of the targets: every second time reversed, or not")
    resident: Literal["all", "one"] = Field(
        "all", description="servers that are up at once; one: each is started for its cells and stopped after them"
    )
    together: bool = Field(False, description="load all servers at the same time, where by default one at a time is")
    workload: Literal["lognormal", "classic", "sharegpt", "alpaca"] = Field("lognormal", description="what is sent")
    input_mean: float = Field(64, ge=1, description="lognormal: mean prompt length in tokens")
    output_mean: float = Field(48, ge=1, description="lognormal: mean output length in tokens")
    sigma: float = Field(0.6, ge=0, le=3, description="lognormal: sigma of the lengths' logarithm")
    max_model_len: int | None = Field(None, ge=2, description="context of all servers; default: the model's own limit")
    seed: int = Field(1, ge=0, lt=1_000_000, description="the same seed gives the same requests")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of all servers")
    kv_budget: int | None = Field(None, ge=1, description="most bytes of KV cache of each server; default: their own")
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1, description="share of a GPU for vLLM; HF is beside it")
    hf_args: str = Field("", description="more arguments for every target of kind hf, as one string")
    vllm_args: str = Field("", description="more arguments for every target of kind vllm, as one string")
    limits: dict[Limit, Annotated[float, Field(gt=0)]] = Field({}, description="that a request must meet, for goodput")
    attainment: float = Field(0.99, gt=0, le=1, description="share of the requests that must meet the limits")
    saturation: bool = Field(False, description="open loop: search each target's highest rate that meets the limits")
    gate: Rules = Field(Rules(), description="for headroom gate")
    cooldown_seconds: float = Field(0, ge=0, le=3600, description="rest before each cell")
    hf_port: int = Field(8000, ge=1, le=65535, description="port of the first HF server; others get a free one")
    vllm_port: int = Field(8001, ge=1, le=65535, description="port of the first vLLM server; others get a free one")
    monitor_port: int = Field(9400, ge=1, le=65535, description="port of the monitor")
    monitor_url: str = Field("", pattern="^(https?://.+)?$", description="use the monitor there, start none")
    start_seconds: float = Field(900, gt=0, description="give up when a server is not healthy by then")
    cell_seconds: float = Field(900, gt=0, le=86400, description="give up on a cell or a request that takes longer")
    out: str = Field("results", description="folder in which the run makes a folder of its own")

    @field_validator("targets")
    @classmethod
    def _each_name_once(cls, targets: list[Target]) -> list[Target]:
        names = [target.name for target in targets]
        if len(set(names)) != len(names):
            raise ValueError(f"each name may be given once, got {', '.join(names)}")
        servers = [target.server or target.name for target in targets]
        if len(set(servers)) != len(servers):
            raise ValueError(f"each server may be given once, got {', '.join(servers)}")
        return targets

    @field_validator("levels")
    @classmethod
    def _each_level_once(cls, levels: list[float]) -> list[float]:
        if len(set(levels)) != len(levels):
            raise ValueError("each level may be given once")
        return levels

    @field_validator("hf_args", "vllm_args")
    @classmethod
    def _is_a_command_line(cls, arguments: str) -> str:
        shlex.split(arguments)
        return arguments

    @model_validator(mode="after")
    def _fits_together(self) -> "Plan":
        if self.arrival == "closed":
            wrong = [level for level in self.levels if level != int(level) or not 1 <= level <= 4096]
            if wrong:
                raise ValueError(f"levels: {wrong[0]:g}: expected whole numbers from 1 to 4096 in a closed loop")
            self.levels = [int(level) for level in self.levels]
        if self.saturation and (self.arrival == "closed" or not self.limits):
            raise ValueError("saturation: true: needs arrival poisson or constant, and limits such as ttft_seconds")
        if self.resident == "one" and not self.max_model_len:
            raise ValueError("max_model_len: None: resident one needs it, as no server knows the others' limit")
        if self.together and (self.resident == "one" or self.saturation or len(self.targets) < 2):
            raise ValueError("together: True: needs two targets or more, resident all, and no saturation")
        names = [target.name for target in self.targets]
        if unknown := [name for name in self.gate.targets if name not in names]:
            raise ValueError(f"gate.targets: {unknown[0]!r}: expected names of targets: {', '.join(names)}")
        return self

    def measured(self, level: float) -> int:
        """Measured requests in a cell; in a closed loop at least, see `goes_on_seconds`."""
        if self.requests:
            return self.requests
        wanted = self.requests_per_user * level if self.arrival == "closed" else self.duration_seconds * level
        return max(self.min_requests, round(wanted))

    @property
    def goes_on_seconds(self) -> float:
        """How long the measured requests of a closed loop go on at least; 0: there are exactly as many as planned."""
        return self.min_seconds if self.arrival == "closed" and not self.requests else 0.0

    def warmup(self, level: float) -> int:
        """Requests before the measured ones: one for each in flight or those of the ramp, at least two."""
        return max(2, round(level if self.arrival == "closed" else self.ramp_seconds * level))

    def drain(self, level: float) -> int:
        """Requests after the measured ones, so that the last of these still run under the cell's load."""
        return round(level - 1 if self.arrival == "closed" else self.ramp_seconds * level)

    def total(self, level: float) -> int:
        """All requests of a cell."""
        return self.warmup(level) + self.measured(level) + self.drain(level)

    def cell(self, index: int, target: str, level: float, repeat: int, *, search: bool = False) -> Cell:
        """A cell, whose seed depends on its level and repeat but not on its target."""
        seed = self.seed + 1_000_000 * round(1000 * level) + 10_000_000_000_000_000 * repeat
        return Cell(index, target, level, repeat, seed, self.arrival, search)

    def groups(self) -> list[list[Cell]]:
        """The cells in the order in which they run, in lists of those that run at the same time."""
        cells = list(self.cells())
        size = len(self.targets) if self.together else 1
        return [cells[start : start + size] for start in range(0, len(cells), size)]

    def cells(self) -> Iterator[Cell]:
        """Yield the cells in the order in which they run.

        At each level A B, B A, A B, ... where all servers are resident. Where one is, a server runs all levels before
        it makes room for the next, in that order.
        """
        names = [target.name for target in self.targets]
        turns = [names[::-1] if repeat % 2 and self.order == "ABBA" else names for repeat in range(self.repeats)]
        if self.resident == "all":
            order = [(r, name, level) for level in self.levels for r, turn in enumerate(turns) for name in turn]
        else:
            order = [(r, name, level) for r, turn in enumerate(turns) for name in turn for level in self.levels]
        for index, (repeat, name, level) in enumerate(order, 1):
            yield self.cell(index, name, level, repeat + 1)
