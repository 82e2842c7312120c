"""`python -m servers.hf`: load a model and serve it."""

import asyncio
import gc
import logging
import signal
import socket
import sys
import time
from typing import Literal

import torch
import transformers
import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry
from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from servers.hf.app import GATE, Service, drain, make_app
from servers.hf.continuous import ContinuousEngine
from servers.hf.engine import Engine, Limits, first_sentence
from servers.hf.jobs import EngineDeadError
from servers.hf.kv import bytes_per_token, has_plain_layers
from servers.hf.metrics import Metrics
from servers.hf.padded import PaddedEngine
from servers.models import Model, ModelError, resolve
from servers.settings import ServerSettings, cpu_cores, fail, listen, parse

PROGRAM = "servers.hf"
#: Tokens in a block of the paged cache, as in vLLM.
BLOCK_SIZE = 16


class Settings(ServerSettings):
    """Serve a model with Hugging Face Transformers over the OpenAI API."""

    model_config = SettingsConfigDict(env_prefix="HEADROOM_HF_", cli_prog_name=PROGRAM)

    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    engine: Literal["sequential", "batch", "continuous"] = Field(
        "sequential",
        description="one request at a time; those that wait padded into one batch; Transformers' continuous batching",
    )
    max_batch: int = Field(32, ge=1, le=4096, description="requests that may run at once (not sequential)")
    max_wait_ms: float = Field(
        5.0, ge=0, le=60_000, description="how long a batch may fill up while requests keep coming in (batch)"
    )
    cache: Literal["dynamic", "static"] = Field(
        "dynamic", description="KV cache that grows, or the maximum length set aside for each row (not continuous)"
    )
    compile: bool = Field(False, description="compiled decode on a static cache, CUDA graphs on GPU (not continuous)")
    max_waiting: int = Field(512, ge=0, description="requests that may wait; one more is answered with 429")
    drain_seconds: float = Field(10.0, ge=0, description="how long running requests may go on after SIGTERM")

    @model_validator(mode="after")
    def _possible(self) -> "Settings":
        if self.engine == "continuous" and (self.compile or self.cache == "static"):
            option = "--compile" if self.compile else "--cache static"
            raise ValueError(f"{option}: not possible with --engine continuous, whose cache is paged")
        return self


def load(settings: Settings, model: Model) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """Load the model's weights, or make them in place, and its tokenizer; raises OSError if there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": "float32" if device == "cpu" else "bfloat16"}.get(settings.dtype, settings.dtype)
    if device == "cpu":
        torch.set_num_threads(len(cpu_cores(settings.threads)))
    # cuDNN's attention plans anew for every length, some 30 ms each: lengths change with every prompt and step here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.source)
    if model.weights:
        weights = transformers.AutoModelForCausalLM.from_pretrained(model.source, dtype=getattr(torch, dtype))
        return weights.to(device).eval(), tokenizer
    config = transformers.AutoConfig.from_pretrained(model.source)
    with torch.device(device):
        weights = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return weights.eval(), tokenizer


def limits(settings: Settings, weights: transformers.PreTrainedModel) -> Limits:
    """What the engine may take; raises ModelError when the model or the budget does not allow what is asked for."""
    config = weights.config
    longest = config.max_position_embeddings
    if (settings.max_model_len or 0) > longest:
        raise ModelError(f"--max-model-len: {settings.max_model_len}: the model's limit is {longest}")
    if not has_plain_layers(config):
        raise ModelError(f"--model: {settings.model!r}: its layers do not store every token (a sliding window?)")
    length = settings.max_model_len or longest
    size = bytes_per_token(config, weights.dtype.itemsize)
    tokens = settings.kv_budget // size if settings.kv_budget else None
    rows = 1 if settings.engine == "sequential" else settings.max_batch
    static = settings.cache == "static" or settings.compile
    least = length if static else BLOCK_SIZE if settings.engine == "continuous" else 1
    if tokens is not None and tokens < least:
        raise ModelError(
            f"--kv-budget: {settings.kv_budget}: {least * size} bytes are the least, {least} tokens of {size} bytes"
        )
    eos = config.eos_token_id if config.eos_token_id is not None else []
    return Limits(
        max_model_len=length,
        max_batch=min(rows, tokens // length) if static and tokens else rows,
        max_waiting=settings.max_waiting,
        kv_tokens=tokens,
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [eos]),
    )


def service(settings: Settings) -> Service:
    """Everything the application needs, with the model in memory."""
    model = resolve(settings.model)
    try:
        weights, tokenizer = load(settings, model)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"--model: {settings.model!r}: cannot be loaded: {reason}") from error
    allowed = limits(settings, weights)
    engine: Engine
    if settings.engine == "continuous":
        engine = ContinuousEngine(weights, allowed, BLOCK_SIZE)
    else:
        wait = settings.max_wait_ms / 1000 if settings.engine == "batch" else 0.0
        engine = PaddedEngine(weights, allowed, wait, settings.cache == "static", settings.compile)
    registry = CollectorRegistry()
    return Service(
        name=model.name,
        engine=engine,
        tokenizer=tokenizer,
        vocab_size=weights.config.vocab_size,
        max_model_len=allowed.max_model_len,
        bytes_per_token=bytes_per_token(weights.config, weights.dtype.itemsize),
        metrics=Metrics(registry, engine.name),
        registry=registry,
        per_request_metrics=settings.per_request_metrics,
    )


async def serve(served: Service, sock: socket.socket, started: float, drain_seconds: float) -> None:
    """Start the engine, serve until SIGINT or SIGTERM, then drain; a second signal ends what still runs."""
    app = make_app(served)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    # Nothing that was loaded is garbage; not walking through it keeps full collections from stalling the event loop.
    gc.freeze()
    await web.SockSite(runner, sock).start()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    weights, engine = served.engine.model, served.engine
    host, port = sock.getsockname()[:2]
    print(
        f"{PROGRAM}: {served.name} on {weights.device}, {str(weights.dtype).removeprefix('torch.')}, engine "
        f"{engine.name}, at most {engine.limits.max_batch} at once and {engine.capacity * served.bytes_per_token} "
        f"bytes of KV cache, loaded in {time.monotonic() - started:.1f} s, ready at http://{host}:{port}",
        flush=True,
    )
    await stop.wait()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, app[GATE].idle.set)
    await drain(app, drain_seconds)
    await runner.cleanup()


def main() -> None:
    """Run the server until SIGINT or SIGTERM."""
    settings = parse(Settings, PROGRAM, sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format=f"{PROGRAM}: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    try:
        # Bound before the model is loaded: a taken port is an error now, not in a minute.
        sock = listen(settings.host, settings.port)
        started = time.monotonic()
        uvloop.run(serve(service(settings), sock, started, settings.drain_seconds))
    except (ModelError, EngineDeadError, OSError) as error:
        raise fail(PROGRAM, str(error).splitlines()[0]) from None
    except torch.OutOfMemoryError as error:
        bounds = "--max-batch, --max-model-len and --kv-budget bound the KV cache"
        raise fail(PROGRAM, f"the memory does not suffice: {first_sentence(error)}; {bounds}") from None


if __name__ == "__main__":
    main()
