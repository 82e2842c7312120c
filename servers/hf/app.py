"""The aiohttp application: requests in, chunks out."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import to_json
from transformers import PreTrainedTokenizerFast

from servers.hf.api import (
    JSON,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Delta,
    GenerationRequest,
    Reply,
    StreamOptions,
    parse,
    timing,
)
from servers.hf.engine import Engine
from servers.hf.jobs import (
    EngineDeadError,
    EngineFailedError,
    Job,
    OutOfMemoryError,
    QueueFullError,
    Sampling,
    TooLargeError,
)
from servers.hf.metrics import Metrics, StateCollector
from servers.hf.text import TextStream

OPENAI_DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Service:
    """What the handlers need; lengths are in tokens."""

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    max_model_len: int
    bytes_per_token: int
    metrics: Metrics
    registry: CollectorRegistry
    per_request_metrics: bool = False

    @cached_property
    def max_characters(self) -> int:
        """No text that is longer can fit into the context."""
        return self.max_model_len * max(map(len, self.tokenizer.get_vocab()))


class Gate:
    """Counts the requests that are being answered; once closed, no more are taken."""

    def __init__(self) -> None:
        self.closed = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._inside = 0

    def __enter__(self) -> None:
        self._inside += 1
        self.idle.clear()

    def __exit__(self, *_: object) -> None:
        self._inside -= 1
        if not self._inside:
            self.idle.set()


SERVICE = web.AppKey("service", Service)
GATE = web.AppKey("gate", Gate)
STATE = web.AppKey("state", StateCollector)


def make_app(service: Service) -> web.Application:
    """Build the application around a loaded model; its engine starts and stops with it."""
    app = web.Application(middlewares=[_errors], client_max_size=64 * 2**20)
    app[SERVICE] = service
    app[GATE] = Gate()
    app[STATE] = StateCollector(service.engine, service.bytes_per_token)
    service.registry.register(app[STATE])
    app.add_routes(
        [
            web.post("/v1/completions", _completions),
            web.post("/v1/chat/completions", _chat),
            web.get("/v1/models", _models),
            web.get("/health", _health),
            web.get("/version", _version),
            web.get("/metrics", _metrics),
        ]
    )
    app.cleanup_ctx.append(_engine)
    return app


async def _engine(app: web.Application) -> AsyncIterator[None]:
    await app[SERVICE].engine.start()
    yield
    await app[SERVICE].engine.close()


async def drain(app: web.Application, seconds: float) -> None:
    """Take no more requests, let those that run end, and after `seconds` end the rest with an error."""
    app[GATE].closed = True
    with suppress(TimeoutError):
        await asyncio.wait_for(app[GATE].idle.wait(), seconds)
    await app[SERVICE].engine.close()
    # Those that are told of the end need an instant; a client that does not send or read must not hold it up.
    with suppress(TimeoutError):
        await asyncio.wait_for(app[GATE].idle.wait(), 1)


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    with request.app[GATE] if request.method == "POST" else nullcontext():
        try:
            return await handler(request)
        except ConnectionResetError:
            # The client left in the instant of a write, before the handler was cancelled; nobody reads this answer.
            return web.Response(status=499)
        except web.HTTPRequestEntityTooLarge as error:
            refused = ApiError(413, str(error.text))
        except ApiError as error:
            refused = error
        if refused.status < 500:
            request.app[SERVICE].metrics.end("rejected")
        headers = {"Retry-After": "1"} if refused.status in (429, 503) else {}
        return web.json_response(refused.body, status=refused.status, headers=headers)


async def _health(request: web.Request) -> web.Response:
    healthy = request.app[SERVICE].engine.alive and not request.app[GATE].closed
    return web.Response(status=200 if healthy else 503)


async def _version(_: web.Request) -> web.Response:
    """Say what serves, as vLLM's server does of itself."""
    return web.json_response({name: version(name) for name in ("transformers", "torch")})


async def _metrics(request: web.Request) -> web.Response:
    """Answer a scrape, of some metrics if it names them, in the text format whatever it accepts.

    prometheus_client's OpenMetrics would turn the colon of our names, which vLLM's have too, into an underscore.
    """
    await request.app[STATE].read()
    registry, names = request.app[SERVICE].registry, request.query.getall("name[]", [])
    body = generate_latest(registry.restricted_registry(names) if names else registry)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _models(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    model = {"id": service.name, "object": "model", "owned_by": "headroom", "max_model_len": service.max_model_len}
    return web.json_response({"object": "list", "data": [model]})


async def _completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    asked = parse(CompletionRequest, await request.read())
    if isinstance(asked.prompt, str):
        _check_text(service, "prompt", len(asked.prompt))
        prompt = tuple(service.tokenizer(asked.prompt)["input_ids"])
    else:
        prompt = tuple(asked.prompt)
    return await _generate(request, asked, prompt, asked.max_tokens or OPENAI_DEFAULT_MAX_TOKENS)


async def _chat(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    asked = parse(ChatRequest, await request.read())
    if not service.tokenizer.chat_template:
        raise ApiError(400, "messages: the model has no chat template; use /v1/completions", "messages")
    if asked.max_tokens and asked.max_completion_tokens:
        raise ApiError(400, "max_tokens: give either max_tokens or max_completion_tokens", "max_tokens")
    _check_text(service, "messages", sum(len(message.text) for message in asked.messages))
    messages = [{"role": message.role, "content": message.text} for message in asked.messages]
    prompt = tuple(
        service.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    )
    rest = max(1, service.max_model_len - len(prompt))
    return await _generate(request, asked, prompt, asked.max_completion_tokens or asked.max_tokens or rest)


async def _generate(
    request: web.Request, asked: GenerationRequest, prompt: tuple[int, ...], max_tokens: int
) -> web.StreamResponse:
    service = request.app[SERVICE]
    _check(service, asked, prompt, max_tokens)
    if request.app[GATE].closed:
        service.metrics.end("unavailable")
        raise ApiError(503, "the server is shutting down", kind="unavailable")
    chosen = asked.model_dump(include={"min_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos"})
    job = Job(prompt, Sampling(max_tokens=max_tokens, **chosen))
    chat = isinstance(asked, ChatRequest)
    reply = Reply(
        id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
        created=int(time.time()),
        model=service.name,
        chat=chat,
        prompt_ids=prompt,
        return_token_ids=asked.return_token_ids,
    )
    text = TextStream(service.tokenizer.backend_tokenizer, prompt, asked.stops, asked.min_tokens)
    async with aclosing(_deltas(service, job, text)) as deltas:
        return await (
            _stream(request, asked, reply, job, deltas) if asked.stream else _whole(request, reply, job, deltas)
        )


def _check_text(service: Service, field: str, characters: int) -> None:
    """Refuse a text of megabytes before it is tokenized, which would hold up everybody."""
    if characters > service.max_characters:
        raise ApiError(400, f"{field}: {characters} characters are more than {service.max_model_len} tokens", field)


def _check(service: Service, asked: GenerationRequest, prompt: tuple[int, ...], max_tokens: int) -> None:
    if asked.model != service.name:
        raise ApiError(404, f"model: {asked.model!r}: this server serves {service.name!r}", "model")
    field = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if not prompt:
        raise ApiError(400, f"{field}: at least one token is needed", field)
    if unknown := next((token for token in prompt if not 0 <= token < service.vocab_size), None):
        raise ApiError(400, f"prompt: token id {unknown} is not in 0..{service.vocab_size - 1}", "prompt")
    if asked.min_tokens > max_tokens:
        raise ApiError(400, f"min_tokens: {asked.min_tokens} is more than max_tokens, {max_tokens}", "min_tokens")
    if len(prompt) + max_tokens > service.max_model_len:
        message = (
            f"max_tokens: {len(prompt)} prompt tokens + {max_tokens} to generate are more than the context of "
            f"{service.max_model_len} tokens"
        )
        raise ApiError(400, message, "max_tokens")


async def _deltas(service: Service, job: Job, text: TextStream) -> AsyncGenerator[Delta]:
    """Run the job and yield what each token adds; keep the metrics, and end the job however this ends."""
    metrics = service.metrics
    last = job.arrived
    count = 0
    outcome: str | None = "cancelled"
    try:
        service.engine.submit(job)
        async for step in job.steps():
            now = time.monotonic()
            if not count:
                metrics.prompt_tokens.inc(len(job.prompt_ids))
                metrics.queue.observe(job.started - job.arrived)
            (metrics.itl if count else metrics.ttft).observe(now - last)
            last, count = now, count + 1
            piece = text.push(step.token_id)
            reason = "stop" if text.stopped else step.finish_reason
            if reason:
                outcome = reason
                metrics.e2e.observe(now - job.arrived)
                piece += text.flush()
            yield Delta(piece, (step.token_id,), reason)
            if reason:
                return
    except (QueueFullError, TooLargeError) as error:
        outcome = None  # counted with all that are rejected
        raise _rejection(job, error) from error
    except OutOfMemoryError as error:
        outcome = "oom"
        raise ApiError(503, f"the server ran out of memory: {error}", kind="oom") from error
    except EngineDeadError as error:
        outcome = "error" if isinstance(error, EngineFailedError) else "unavailable"
        raise ApiError(503, str(error), kind="unavailable") from error
    finally:
        metrics.generation_tokens.inc(count)
        service.engine.cancel(job)
        if outcome:
            metrics.end(outcome)


def _rejection(job: Job, error: Exception) -> ApiError:
    if isinstance(error, QueueFullError):
        return ApiError(429, "too many requests are waiting; try again later", kind="rate_limit_error")
    message = f"max_tokens: {job.sampling.max_tokens} after {len(job.prompt_ids)} prompt tokens: {error}"
    return ApiError(400, message, "max_tokens")


def _timing(service: Service, job: Job, tokens: int) -> JSON:
    if not service.per_request_metrics:
        return {}
    return timing(job.arrived, job.started, job.first, job.last, tokens)


async def _whole(request: web.Request, reply: Reply, job: Job, deltas: AsyncIterator[Delta]) -> web.Response:
    parts = [delta async for delta in deltas]
    token_ids = tuple(token for part in parts for token in part.token_ids)
    whole = Delta("".join(part.text for part in parts), token_ids, parts[-1].finish_reason)
    return web.json_response(reply.whole(whole, _timing(request.app[SERVICE], job, len(token_ids))))


async def _stream(
    request: web.Request, asked: GenerationRequest, reply: Reply, job: Job, deltas: AsyncIterator[Delta]
) -> web.StreamResponse:
    options = asked.stream_options or StreamOptions()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})

    async def send(chunk: JSON) -> None:
        if options.continuous_usage_stats and "choices" in chunk:
            chunk.setdefault("usage", reply.usage(count))
        await response.write(b"data: " + to_json(chunk) + b"\n\n")

    count = 0
    try:
        async for delta in deltas:
            first = not response.prepared
            if first:
                # Not before: what fails until here is answered with its own status.
                await response.prepare(request)
                if reply.chat:
                    await send(reply.role_chunk())
            count += len(delta.token_ids)
            await send(reply.chunk(delta, first))
    except ApiError as error:
        if not response.prepared:
            raise
        # The status is sent already; a client finds the failure in the stream.
        await send(error.body)
        return response
    if options.include_usage:
        await send(reply.usage_chunk(count, _timing(request.app[SERVICE], job, count)))
    await response.write(b"data: [DONE]\n\n")
    return response
