"""Settings to vLLM's arguments and environment: pure, so that tests and readers see the whole mapping."""

import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from pydantic import Field
from pydantic_settings import CliSuppress, SettingsConfigDict

from servers.models import Model
from servers.settings import ServerSettings, cpu_cores

PROGRAM = "servers.vllm"
CPU_POOL = "VLLM_CPU_KVCACHE_SPACE"
# vLLM's own options that set the size of the KV pool; a share of the GPU's memory does not once its bytes are given.
POOL_SIZES = ("--kv-cache-memory-bytes", "--num-gpu-blocks-override")
# How a traceback of any of vLLM's processes ends, in its log or outside it. Pydantic says what is wrong only in the
# lines that follow; those end the output, as no process has been started by then.
RAISED = re.compile(r"(?:\(\w+ pid=\d+\) )?(?:ERROR [^\]]*\] )?([\w.]*(?:Error|Exception): (?!\d+ validation error).+)")


class Settings(ServerSettings):
    """Serve a model with vLLM over the OpenAI API. What follows -- is handed to vLLM as it is."""

    model_config = SettingsConfigDict(env_prefix="HEADROOM_VLLM_", cli_prog_name=PROGRAM)

    port: int = Field(8001, ge=1, le=65535, description="port to listen on")
    prefix_caching: bool = Field(False, description="reuse the KV cache of equal prompt prefixes")
    enforce_eager: bool = Field(False, description="start faster, decode slower: neither compile nor capture graphs")
    max_num_seqs: int | None = Field(None, ge=1, description="sequences that may run at once; default: vLLM's own")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="share of the GPU's memory to take; with --kv-budget, to find free at the start"
    )
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
    if settings.per_request_metrics:
        command.append("--enable-per-request-metrics")
    if settings.kv_budget is not None:
        command += ["--kv-cache-memory-bytes", str(settings.kv_budget)]
    for option in ("max_model_len", "max_num_seqs", *(["gpu_memory_utilization"] if gpu else [])):
        if (value := getattr(settings, option)) is not None:
            command += ["--" + option.replace("_", "-"), str(value)]
    return command + settings.passed_on


def second_size(settings: Settings, gpu: bool, inherited: Mapping[str, str]) -> str | None:
    """Return what sizes the KV pool besides --kv-budget, as the user gave it; vLLM would follow only one of them."""
    if settings.kv_budget is None:
        return None
    if "cpu_kv_cache_gib" in settings.model_fields_set:
        return f"--cpu-kv-cache-gib {settings.cpu_kv_cache_gib}"
    if not gpu and inherited.get(CPU_POOL):
        return f"the environment's {CPU_POOL}={inherited[CPU_POOL]}"
    for argument in settings.passed_on:
        # vLLM takes underscores for dashes, and the start of an option's name for the whole.
        name = argument.partition("=")[0].replace("_", "-")
        if len(name) > 2 and any(option.startswith(name) for option in POOL_SIZES):
            return f"vLLM's {name}"
    return None


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
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in cpu_cores(settings.threads))
        if settings.kv_budget is None:  # vLLM would follow the variable and not --kv-cache-memory-bytes
            chosen[CPU_POOL] = str(settings.cpu_kv_cache_gib)
    return chosen | dict(inherited)


def raised(line: str) -> str | None:
    """Return the exception that a line of vLLM's output tells of, if it ends a traceback."""
    found = RAISED.match(line)
    return found[1] if found else None


def explained(settings: Settings, error: str) -> str:
    """Say what to do about vLLM's error when --kv-budget is its reason, else hand on the error itself."""
    if settings.kv_budget is not None:
        cannot = f"--kv-budget {settings.kv_budget}: vLLM cannot hold"
        if needed := re.search(r"max seq len \((\d+)\)", error):
            fits = re.search(r"maximum model length is (\d+)", error)
            shorter = f"--max-model-len {fits[1]}" if fits else "a smaller --max-model-len"
            return f"{cannot} one sequence of {needed[1]} tokens; give more bytes or {shorter}"
        if "No available memory for the cache blocks" in error:
            return f"{cannot} one block of its cache; give more bytes"
    return f"vLLM's error: {error}"
