"""Requests and responses of the OpenAI API: pure data, no I/O.

A field that is not declared here is refused with 400, never ignored. Field names and shapes beyond OpenAI's own
(`ignore_eos`, `min_tokens`, `top_k`, `return_token_ids`, `continuous_usage_stats`) are vLLM's.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

JSON = dict[str, Any]


class ApiError(Exception):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.body: JSON = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream says about usage: at its end, and in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(_Strict):
    """The fields that completions and chat share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**63, description="0 and -1: off")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, fields: Any) -> Any:
        return (
            {key: value for key, value in fields.items() if value is not None} if isinstance(fields, dict) else fields
        )

    @model_validator(mode="after")
    def _consistent(self) -> "GenerationRequest":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only allowed with stream: true")
        if "" in self.stops:
            raise ValueError("stop: an empty string is not allowed")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions, with one prompt: text or token ids."""

    prompt: str | list[int]


class TextPart(_Strict):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


Request = TypeVar("Request", bound=GenerationRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """Read a request body; raises ApiError 400 that names the first bad field, its value and what is allowed."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = [str(part) for part in problem["loc"] if part not in ("str", "list[int]", "list[str]")]
        field = ".".join(where)
        if problem["type"] == "extra_forbidden":
            message = f"{field}: this server does not support the field (value {_short(problem['input'])})"
        elif not field:
            message = problem["msg"].removeprefix("Value error, ")
            field = message.split(":")[0] if message.split(":")[0].isidentifier() else ""
        else:
            message = f"{field}: {_short(problem['input'])}: {problem['msg']}"
        raise ApiError(400, message, field or None) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Delta:
    """What one step of a generation adds: text (it may lag behind the tokens), token ids, and the end's reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None


@dataclass(frozen=True)
class Reply:
    """Builds the JSON of one response; `chat` chooses the shape."""

    id: str
    created: int
    model: str
    chat: bool
    prompt_ids: tuple[int, ...]
    return_token_ids: bool

    def role_chunk(self) -> JSON:
        """The chunk that opens a chat stream; it holds no output."""
        choice: JSON = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        prompt = {"prompt_token_ids": list(self.prompt_ids)} if self.return_token_ids else {}
        return self._envelope("chat.completion.chunk", [choice]) | prompt

    def chunk(self, delta: Delta, first: bool) -> JSON:
        """One streamed chunk."""
        choice: JSON = {"index": 0, "logprobs": None, "finish_reason": delta.finish_reason}
        if self.chat:
            choice["delta"] = {"content": delta.text}
        else:
            choice["text"] = delta.text
        if self.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            if first and not self.chat:
                choice["prompt_token_ids"] = list(self.prompt_ids)
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def usage_chunk(self, output_tokens: int, timing: JSON) -> JSON:
        """The chunk after the last choice, with the whole usage, and the metrics of the request if there are any."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._envelope(kind, []) | {"usage": self.usage(output_tokens)} | timing

    def whole(self, delta: Delta, timing: JSON) -> JSON:
        """The answer to a request that does not stream."""
        choice: JSON = {"index": 0, "logprobs": None, "finish_reason": delta.finish_reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": delta.text}
        else:
            choice["text"] = delta.text
        if self.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        body = self._envelope("chat.completion" if self.chat else "text_completion", [choice])
        if self.return_token_ids:
            (body if self.chat else choice)["prompt_token_ids"] = list(self.prompt_ids)
        return body | {"usage": self.usage(len(delta.token_ids))} | timing

    def usage(self, output_tokens: int) -> JSON:
        """Token counts; `completion_tokens` counts an end-of-text token that ended the output."""
        prompt = len(self.prompt_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output_tokens,
            "total_tokens": prompt + output_tokens,
        }

    def _envelope(self, kind: str, choices: list[JSON]) -> JSON:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def timing(arrived: float, started: float, first: float, last: float, tokens: int) -> JSON:
    """What the server measured of a request, from times in seconds; names and meaning are vLLM's PerRequestMetrics."""
    decode, inference = last - first, last - started
    metrics = {
        "time_to_first_token_ms": (first - started) * 1000,
        "generation_time_ms": decode * 1000,
        "queue_time_ms": (started - arrived) * 1000,
        "mean_itl_ms": decode / (tokens - 1) * 1000 if tokens > 1 else None,
        "tokens_per_second": tokens / inference if inference > 0 else None,
    }
    return {"metrics": {name: value for name, value in metrics.items() if value is not None}}
