"""`python -m servers.hf`: load a model and serve it."""

import asyncio
import gc
import logging
import signal
import socket
import sys
import time

import transformers
import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry

from servers.hf.app import GATE, Service, drain, make_app
from servers.hf.jobs import EngineDeadError
from servers.hf.metrics import Metrics
from servers.hf.remote import RemoteEngine
from servers.hf.settings import PROGRAM, Settings
from servers.models import Model, ModelError, resolve, unreadable
from servers.settings import fail, listen, parse


async def serve(
    settings: Settings, engine: RemoteEngine, tokenizer: transformers.PreTrainedTokenizerFast, sock: socket.socket
) -> None:
    """Wait for the engine, serve until SIGINT or SIGTERM, then drain; a second signal ends what still runs."""
    started = time.monotonic()
    loaded = await engine.load()
    registry = CollectorRegistry(auto_describe=True)  # so that a scrape may ask for some by name
    service = Service(
        name=resolve(settings.model).name,
        engine=engine,
        tokenizer=tokenizer,
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.limits.max_model_len,
        bytes_per_token=loaded.bytes_per_token,
        metrics=Metrics(registry, engine.name),
        registry=registry,
        per_request_metrics=settings.per_request_metrics,
    )
    app = make_app(service)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    # Nothing that was loaded is garbage; not walking through it keeps full collections from stalling the event loop.
    gc.freeze()
    await web.SockSite(runner, sock).start()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    host, port = sock.getsockname()[:2]
    print(
        f"{PROGRAM}: {service.name} on {loaded.device}, {loaded.dtype}, engine {engine.name}, at most "
        f"{loaded.limits.max_batch} at once and {loaded.capacity * loaded.bytes_per_token} bytes of KV cache, "
        f"loaded in {time.monotonic() - started:.1f} s, ready at http://{host}:{port}",
        flush=True,
    )
    await stop.wait()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, app[GATE].idle.set)
    await drain(app, settings.drain_seconds)
    await runner.cleanup()


def load_tokenizer(model: Model) -> transformers.PreTrainedTokenizerFast:
    """Load the model's tokenizer; raises ModelError when there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(model.source)
    except (OSError, ValueError) as error:
        raise unreadable(model, error) from error


def main() -> None:
    """Run the server until SIGINT or SIGTERM."""
    settings = parse(Settings, PROGRAM, sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format=f"{PROGRAM}: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    engine = None
    try:
        # Bound before the model is loaded: a taken port is an error now, not in a minute.
        sock = listen(settings.host, settings.port)
        model = resolve(settings.model)
        tokenizer = load_tokenizer(model)
        engine = RemoteEngine(settings, model, sock)
        uvloop.run(serve(settings, engine, tokenizer, sock))
    except (ModelError, EngineDeadError, OSError) as error:
        raise fail(PROGRAM, str(error).splitlines()[0]) from None
    finally:
        if engine:
            engine.kill()


if __name__ == "__main__":
    main()
