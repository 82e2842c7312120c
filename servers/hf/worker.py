"""The process that holds the model, apart from the one that answers requests.

Each token costs Python on both sides. In one process the two would wait for each other's turns of the interpreter.
"""

import asyncio
import gc
import logging
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from servers.hf.continuous import ContinuousEngine
from servers.hf.engine import Limits, ModelEngine, Outputs, first_sentence
from servers.hf.jobs import EngineDeadError, Job, QueueFullError, TooLargeError
from servers.hf.kv import bytes_per_token, has_plain_layers
from servers.hf.padded import PaddedEngine
from servers.hf.settings import Settings
from servers.models import Model, ModelError, unreadable
from servers.settings import cpu_cores

#: Tokens in a block of the paged cache, as in vLLM.
BLOCK_SIZE = 16
#: Blocks that Transformers adds to the pool of its paged cache, and in which no sequence is kept.
OWN_BLOCKS = 2
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What the process that answers requests is told of the engine once it is ready; sizes in tokens, or as named."""

    engine: str
    limits: Limits
    capacity: int
    vocab_size: int
    bytes_per_token: int
    device: str
    dtype: str


def load(settings: Settings, model: Model) -> transformers.PreTrainedModel:
    """Load the model's weights, or make them in place; raises OSError or ValueError if they cannot be read."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": "float32" if device == "cpu" else "bfloat16"}.get(settings.dtype, settings.dtype)
    if device == "cpu":
        torch.set_num_threads(len(cpu_cores(settings.threads)))
    # cuDNN's attention plans anew for every length, which takes longer than a step: here lengths change all the time.
    torch.backends.cuda.enable_cudnn_sdp(False)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if settings.device_map:
        return _spread(model, options | {"device_map": settings.device_map}).eval()
    if model.weights:
        weights = transformers.AutoModelForCausalLM.from_pretrained(model.source, **options)
        return weights.to(device).eval()
    config = transformers.AutoConfig.from_pretrained(model.source)
    with torch.device(device):
        weights = transformers.AutoModelForCausalLM.from_config(config, **options)
    return weights.eval()


def _spread(model: Model, options: dict[str, Any]) -> transformers.PreTrainedModel:
    if model.weights:
        return transformers.AutoModelForCausalLM.from_pretrained(model.source, **options)
    # A checkpoint without weights: each is made where it is mapped to, and would be reported as missing.
    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(model.source)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    spread: transformers.PreTrainedModel = kind.from_pretrained(None, config=config, state_dict={}, **options)
    return spread


def limits(settings: Settings, weights: transformers.PreTrainedModel) -> Limits:
    """What the engine may take; raises ModelError when the model or the budget does not allow what is asked for."""
    devices = {parameter.device.type for parameter in weights.parameters()}
    if settings.device_map and torch.cuda.is_available() and devices != {"cuda"}:
        raise ModelError("--device-map: auto: the GPUs together do not hold the model; a part would be in host memory")
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
    own = OWN_BLOCKS * BLOCK_SIZE if settings.engine == "continuous" else 0
    least = length if static else own + BLOCK_SIZE if own else 1
    if tokens is not None and tokens < least:
        raise ModelError(
            f"--kv-budget: {settings.kv_budget}: {least * size} bytes are the least, {least} tokens of {size} bytes"
        )
    eos = config.eos_token_id if config.eos_token_id is not None else []
    return Limits(
        max_model_len=length,
        max_batch=min(rows, tokens // length) if static and tokens else rows,
        max_waiting=settings.max_waiting,
        kv_tokens=None if tokens is None else tokens - own,
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [eos]),
    )


def make_engine(settings: Settings, model: Model) -> ModelEngine:
    """The engine that the settings ask for, around the model; raises ModelError when they do not allow one."""
    try:
        weights = load(settings, model)
    except (OSError, ValueError) as error:
        raise unreadable(model, error) from error
    allowed = limits(settings, weights)
    if settings.engine == "continuous":
        return ContinuousEngine(weights, allowed, BLOCK_SIZE)
    wait = settings.max_wait_ms / 1000 if settings.engine == "batch" else 0.0
    return PaddedEngine(weights, allowed, wait, settings.cache == "static", settings.compile)


def work(settings: Settings, model: Model, connection: Connection, inherited: tuple[Any, ...]) -> None:
    """Load the model and run jobs for the process at the other end; the main function of a forked process.

    `inherited`: what was open in that process and must not stay open here when it ends.
    """
    for end in inherited:
        end.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the other process decides what they mean
    try:
        asyncio.run(_work(settings, model, connection))
    except (ModelError, EngineDeadError) as error:
        connection.send(error)
    except torch.OutOfMemoryError as error:
        bounds = "--max-batch, --max-model-len and --kv-budget bound the KV cache"
        connection.send(EngineDeadError(f"the memory does not suffice: {first_sentence(error)}; {bounds}"))
    except Exception:
        logger.exception("the process of the model failed")
        os._exit(1)  # whatever threads still run: the other process must see the end


async def _work(settings: Settings, model: Model, connection: Connection) -> None:
    commands: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
    listener = threading.Thread(target=_listen, args=(connection, commands, asyncio.get_running_loop()), daemon=True)
    listener.start()
    engine = make_engine(settings, model)
    await engine.start()
    gc.freeze()  # nothing that was loaded is garbage
    config, dtype = engine.model.config, engine.model.dtype
    loaded = Loaded(
        engine=engine.name,
        limits=engine.limits,
        capacity=engine.capacity,
        vocab_size=config.vocab_size,
        bytes_per_token=bytes_per_token(config, dtype.itemsize),
        device=", ".join(sorted({str(parameter.device) for parameter in engine.model.parameters()})),
        dtype=str(dtype).removeprefix("torch."),
    )
    await Worker(engine, connection).run(loaded, commands)


def _listen(connection: Connection, commands: asyncio.Queue[tuple[Any, ...]], loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            command = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the other process is gone, and with it whoever waits for a token
        loop.call_soon_threadsafe(commands.put_nowait, command)


class Worker:
    """Runs jobs for another process: commands come in, tokens and errors go out in one message a step."""

    def __init__(self, engine: ModelEngine, connection: Connection):
        self._engine = engine
        self._connection = connection
        self._sending = threading.Lock()
        self._jobs: dict[int, Job] = {}
        engine.deliver = self._deliver

    async def run(self, loaded: Loaded, commands: asyncio.Queue[tuple[Any, ...]]) -> None:
        """Say that the engine is ready, and obey until told to close."""
        self._send(loaded)
        while True:
            match await commands.get():
                case "submit", Job() as job:
                    self._submit(job)
                case "cancel", int() as number if number in self._jobs:
                    self._engine.cancel(self._jobs.pop(number))
                case ("state",):
                    self._send(await self._engine.state())
                case ("close",):
                    await self._engine.close()
                    return

    def _submit(self, job: Job) -> None:
        self._jobs[job.number] = job
        try:
            self._engine.submit(job)
        except (QueueFullError, TooLargeError, EngineDeadError) as error:
            self._deliver([(job, error)])

    def _deliver(self, outputs: Outputs) -> None:
        for job, output in outputs:
            if isinstance(output, Exception) or output.finish_reason:
                self._jobs.pop(job.number, None)
        self._send([(job.number, job.started, output) for job, output in outputs])

    def _send(self, message: object) -> None:
        with self._sending:
            self._connection.send(message)
