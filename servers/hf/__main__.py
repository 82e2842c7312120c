"""`python -m servers.hf`: load a model and serve it."""

import logging
import sys
import time

import torch
import transformers
from aiohttp import web
from prometheus_client import CollectorRegistry
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from servers.hf.app import Service, make_app
from servers.hf.engines import SequentialEngine
from servers.hf.metrics import Metrics
from servers.models import Model, ModelError, resolve
from servers.settings import ServerSettings, cpu_cores, fail, listen, parse

PROGRAM = "servers.hf"


class Settings(ServerSettings):
    """Serve a model with Hugging Face Transformers over the OpenAI API."""

    model_config = SettingsConfigDict(env_prefix="HEADROOM_HF_", cli_prog_name=PROGRAM)

    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    max_waiting: int = Field(512, ge=0, description="requests that may wait; one more is answered with 429")


def load(settings: Settings, model: Model) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """Load the model's weights, or make them in place, and its tokenizer; raises OSError if there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": "float32" if device == "cpu" else "bfloat16"}.get(settings.dtype, settings.dtype)
    if device == "cpu":
        torch.set_num_threads(len(cpu_cores(settings.threads)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.source)
    if model.weights:
        weights = transformers.AutoModelForCausalLM.from_pretrained(model.source, dtype=getattr(torch, dtype))
        return weights.to(device).eval(), tokenizer
    config = transformers.AutoConfig.from_pretrained(model.source)
    with torch.device(device):
        weights = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return weights.eval(), tokenizer


def service(settings: Settings) -> Service:
    """Everything the application needs, with the model in memory."""
    model = resolve(settings.model)
    try:
        weights, tokenizer = load(settings, model)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"--model: {settings.model!r}: cannot be loaded: {reason}") from error
    config = weights.config
    limit = config.max_position_embeddings
    if (settings.max_model_len or 0) > limit:
        raise ModelError(f"--max-model-len: {settings.max_model_len}: the model's limit is {limit}")
    eos = config.eos_token_id if config.eos_token_id is not None else []
    eos_ids = frozenset(eos if isinstance(eos, list) else [eos])
    registry = CollectorRegistry()
    engine = SequentialEngine(weights, eos_ids, settings.max_waiting)
    return Service(
        name=model.name,
        engine=engine,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        max_model_len=settings.max_model_len or limit,
        metrics=Metrics(registry, engine.name),
        registry=registry,
    )


def main() -> None:
    """Run the server until SIGINT or SIGTERM."""
    settings = parse(Settings, PROGRAM, sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format=f"{PROGRAM}: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    try:
        # Bound before the model is loaded: a taken port is an error now, not in a minute.
        sock = listen(settings.host, settings.port)
        started = time.monotonic()
        served = service(settings)
    except (ModelError, OSError) as error:
        raise fail(PROGRAM, str(error).splitlines()[0]) from None
    weights = served.engine.model
    print(
        f"{PROGRAM}: {served.name} on {weights.device}, {str(weights.dtype).removeprefix('torch.')}, "
        f"engine {served.engine.name}, loaded in {time.monotonic() - started:.1f} s, "
        f"ready at http://{settings.host}:{sock.getsockname()[1]}",
        flush=True,
    )
    web.run_app(make_app(served), sock=sock, print=None, access_log=None, handler_cancellation=True, shutdown_timeout=5)


if __name__ == "__main__":
    main()
