"""What the reference server is asked, answers and remembers: bodies, the bytes of streams, stamps. Pure."""

import json
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loadtest.reference.http import BadRequestError

MAX_TOKENS, MAX_SECONDS = 1_000_000, 3600
#: What the ledger may hold, in stamps of 8 bytes; a request counts for its chunks and for 64 more.
KEPT_STAMPS, STAMPS_OF_A_REQUEST = 8_000_000, 64
TOKEN_TEXT, TOKEN_ID = " token", 100
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
    b"Cache-Control: no-cache\r\nConnection: %s\r\n\r\n"
)
END = b"0\r\n\r\n"


Ids = list[Annotated[int, Field(ge=0)]]


class StreamOptions(BaseModel):
    """When usage is sent: with the end, or also with each chunk."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Ask(BaseModel):
    """Body of a request; how to sample changes nothing here, so those fields take any value. Others are errors."""

    model_config = ConfigDict(extra="forbid")
    model: str
    stream: Literal[True]
    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    min_tokens: int | None = None
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    stop: Any = None
    ignore_eos: Any = None
    user: Any = None
    seed: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None

    @property
    def tokens(self) -> int:
        """How many tokens to send; 16 when the request does not say, as OpenAI's completions do."""
        return self.max_completion_tokens or self.max_tokens or 16

    @property
    def prompt_tokens(self) -> int:
        """Token ids of the prompt, or words where it is text."""
        if self.messages is not None:
            return sum(len(str(message.get("content", "")).split()) for message in self.messages)
        prompt = self.prompt or ""
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        return len(prompt.split() if isinstance(prompt, str) else prompt)


def read_ask(body: bytes, chat: bool) -> Ask:
    """Read a body; raises BadRequestError that names the field, the value and what is allowed."""
    try:
        ask = Ask.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        said = (f"{'.'.join(map(str, p['loc'])) or 'body'}: {str(p['input'])[:100]!r}: {p['msg']}" for p in problems)
        raise BadRequestError(400, "; ".join(said)) from None
    wanted, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if getattr(ask, wanted) is None or getattr(ask, other) is not None:
        raise BadRequestError(400, f"{wanted}: it must be given, and {other} must not")
    return ask


@dataclass(frozen=True)
class Schedule:
    """When chunks are due: the first `ttft_ns` after the request came, each later one `step_ns` after the last."""

    ttft_ns: int
    itl_ns: int
    tokens_per_chunk: int = 1

    @classmethod
    def of_seconds(cls, ttft: float, itl: float, tokens_per_chunk: int = 1) -> "Schedule":
        """Make a schedule; raises ValueError for what is no time or no number of tokens."""
        for name, value in (("ttft", ttft), ("itl", itl)):
            if not 0 <= value <= MAX_SECONDS:
                raise ValueError(f"{name}: {value}: expected 0 to {MAX_SECONDS} seconds")
        if not 1 <= tokens_per_chunk <= MAX_TOKENS:
            raise ValueError(f"tokens_per_chunk: {tokens_per_chunk}: expected 1 to {MAX_TOKENS}")
        return cls(round(ttft * 1e9), round(itl * 1e9), tokens_per_chunk)

    @property
    def step_ns(self) -> int:
        """Time between two chunks."""
        return self.itl_ns * self.tokens_per_chunk

    def chunks(self, tokens: int) -> int:
        """Chunks that hold so many tokens; the last one may hold fewer than the others."""
        return -(-tokens // self.tokens_per_chunk)


def framed(data: bytes) -> bytes:
    """One server-sent event as one HTTP chunk."""
    return b"%x\r\ndata: %s\n\n\r\n" % (len(data) + 8, data)


class Answer:
    """The bytes of one streamed answer: `head` goes at once, then one of `pieces` for each chunk of tokens.

    The head holds the role-only chunk of a chat, which carries no token. The last piece holds the end of the stream
    too: the usage if it was asked for, `[DONE]` and the last HTTP chunk.
    """

    def __init__(self, ask: Ask, number: int, created: int, per_chunk: int, keep_alive: bool):
        self._ask, self._per_chunk = ask, per_chunk
        self._chat = ask.messages is not None
        self._start = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{number:012d}",
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created,
            "model": ask.model,
        }
        usage = ask.stream_options
        self._usage, self._continuous = usage.include_usage, usage.include_usage and usage.continuous_usage_stats
        role = self._choice({"role": "assistant", "content": ""}) if self._chat else None
        self.head = STREAM_HEAD % (b"keep-alive" if keep_alive else b"close") + (self._event(role, 0) if role else b"")
        self.pieces = self._pieces()

    def _pieces(self) -> Iterator[bytes]:
        tokens, step = self._ask.tokens, self._per_chunk
        before = (tokens - 1) // step
        middle: Iterator[bytes]
        if self._continuous:
            # Counts of one width (JSON allows the blanks), so that one template serves every chunk of the request.
            template = self._event(self._tokens(step), None)
            prompt = self._ask.prompt_tokens
            counts = range(step, tokens, step)
            middle = map(template.__mod__, zip(counts, range(prompt + step, prompt + tokens, step), strict=True))
        else:
            middle = repeat(self._event(self._tokens(step), 0), before)
        last = self._event(self._tokens(tokens - before * step, "length"), tokens)
        return chain(middle, [last + (self._usage_event() if self._usage else b"") + framed(b"[DONE]") + END])

    def _tokens(self, number: int, finish: str | None = None) -> dict[str, Any]:
        text = TOKEN_TEXT * number
        ids = {"token_ids": [TOKEN_ID] * number} if self._ask.return_token_ids else {}
        return self._choice({"content": text} if self._chat else {"text": text}, finish) | ids

    def _choice(self, output: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        held = {"delta": output} if self._chat else output
        return {"index": 0} | held | {"logprobs": None, "finish_reason": finish}

    def _event(self, choice: dict[str, Any], count: int | None) -> bytes:
        """One event; with continuous usage it says the tokens so far, or is a template for them if they are None."""
        event = _json(self._start | {"choices": [choice]})
        if not self._continuous:
            return framed(event)
        prompt = self._ask.prompt_tokens
        usage = b',"usage":{"prompt_tokens":%d,"completion_tokens":%%8d,"total_tokens":%%8d}}' % prompt
        filled = usage % (count or 0, prompt + (count or 0))
        whole = framed(event[:-1] + filled)
        return whole if count is not None else whole.replace(b"%", b"%%").replace(filled, usage)

    def _usage_event(self) -> bytes:
        prompt, tokens = self._ask.prompt_tokens, self._ask.tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        return framed(_json(self._start | {"choices": [], "usage": usage}))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


@dataclass(slots=True)
class Sends:
    """One request as the server saw it; stamps are CLOCK_MONOTONIC ns, each taken right before its chunk was sent.

    `clock` says whether the stamp of receipt is the kernel's or was taken when the request had been read.
    """

    number: int
    request_id: str
    clock: Literal["kernel", "user"]
    received_ns: int
    tokens: int
    chunks: int
    stamps: "array[int]" = field(default_factory=lambda: array("q"))

    def lateness_ns(self, schedule: Schedule) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """How much later than due each chunk was sent."""
        stamps = np.array(self.stamps, dtype=np.int64)
        return stamps - (self.received_ns + schedule.ttft_ns + schedule.step_ns * np.arange(len(stamps)))


class Ledger:
    """The last requests, as many as `room` (in stamps of 8 bytes) allows; the oldest are dropped, and counted."""

    def __init__(self, schedule: Schedule, room: int = KEPT_STAMPS):
        self._schedule = schedule
        self._room = room
        self._kept: deque[Sends] = deque()
        self.dropped = 0

    def add(self, sends: Sends) -> None:
        """Keep a request that has just come; its stamps are yet to be taken."""
        self._room -= sends.chunks + STAMPS_OF_A_REQUEST
        self._kept.append(sends)
        while self._room < 0 and len(self._kept) > 1:
            self._room += self._kept.popleft().chunks + STAMPS_OF_A_REQUEST
            self.dropped += 1

    def lines(self, since: int) -> bytes:
        """JSON lines: a summary, then each kept request whose number is at least `since`, in the order of receipt.

        The summary holds how many lines follow, the number to ask for next time, how many were dropped since the start,
        and the server's own lateness over all chunks of these requests in seconds.
        """
        chosen = [sends for sends in self._kept if sends.number >= since]
        late = np.concatenate([np.zeros(0, np.int64), *(sends.lateness_ns(self._schedule) for sends in chosen)]) / 1e9
        low, high, most = np.quantile(late, (0.5, 0.99, 1)).tolist() if len(late) else (0.0, 0.0, 0.0)
        summary = {
            "requests": len(chosen),
            "next": self._kept[-1].number + 1 if self._kept else 0,
            "dropped": self.dropped,
            "chunks": len(late),
            "lateness_seconds": {"p50": low, "p99": high, "max": most},
        }
        lines = [summary, *({name: getattr(s, name) for name in FIELDS} | {"sent_ns": list(s.stamps)} for s in chosen)]
        return b"".join(_json(line) + b"\n" for line in lines)


FIELDS = ("number", "request_id", "clock", "received_ns", "tokens", "chunks")
