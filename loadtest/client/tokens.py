"""From the events of one stream to output tokens and their times: pure.

Chunks are not tokens: tokens are counted from the server's usage or from token ids, never by counting chunks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from loadtest.records import ErrorKind, TokenSource

# How an output ends as it should; with another reason, such as `abort` or `error`, the server gave it up:
# https://platform.openai.com/docs/api-reference/completions/object and that of chats; the last two are TGI's.
ENDS = ("stop", "length", "tool_calls", "function_call", "content_filter", "eos_token", "stop_sequence")


@dataclass
class Output:
    """What a stream held; see `Record` for the fields."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    token_source: TokenSource = "unknown"
    finish_reason: str | None = None
    chunk_ns: list[int] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    error: ErrorKind | None = None
    error_detail: str | None = None


class Usage(msgspec.Struct):
    """Tokens so far."""

    prompt_tokens: int | None
    completion_tokens: int


class Delta(msgspec.Struct):
    """What a chunk of a chat adds; any of it is output."""

    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None
    refusal: Any = None

    def holds_output(self) -> bool:
        """Whether there is any."""
        return bool(self.content or self.reasoning or self.reasoning_content or self.tool_calls or self.refusal)


class Choice(msgspec.Struct):
    """One output's part of a chunk: of a completion (text) or of a chat (delta)."""

    text: Any = None
    delta: Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class Chunk(msgspec.Struct):
    """The fields of an event that matter here; those of other names are skipped."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    object: str | None = None


decode = msgspec.json.Decoder(Chunk).decode


def excerpt(data: bytes, most: int, secret: str = "") -> bytes:
    """The beginning of what a server sent, without a secret that it repeats; to cut first would leave a part of it."""
    return data.replace(secret.encode(), b"***")[:most] if secret else data[:most]


@dataclass(slots=True)
class _Count:
    """Tokens counted so far, by each source; None where the source is silent."""

    usage: int | None = None
    ids: int | None = None
    per_chunk: bool = True


def read_stream(events: Iterable[tuple[int, bytes]], max_tokens: int, secret: str = "") -> Output:
    """Read (stamp in ns, data) events of a completion or chat stream; never raises: what is wrong is in `error`.

    Of a stream that is not whole the tokens of its chunks are known where each chunk said how many it held. The
    `secret` is left out of what the error quotes.
    """
    out, counted = Output(), _Count()
    done = _read_events(out, counted, events, secret)
    if out.error is None and (lack := _lack(out, counted, done, max_tokens)):
        out.error, out.error_detail = "truncated", lack
    if out.error is None:
        _settle_count(out, counted, max_tokens)
    if not counted.per_chunk:
        out.chunk_tokens = []
    return out


def _read_events(out: Output, counted: _Count, events: Iterable[tuple[int, bytes]], secret: str) -> bool:
    """Read up to the first error; answers whether the stream said that it is done."""
    done = False
    for stamp, data in events:
        if data.startswith(b"[DONE]"):
            done = True
            continue
        try:
            chunk = decode(data)
        except (ValueError, RecursionError) as error:
            shown = excerpt(data, 200, secret)
            out.error, out.error_detail = "malformed", f"{type(error).__name__}: {error}: {shown!r}"
            return done
        if chunk.error or chunk.object == "error":
            what = msgspec.json.encode(chunk.error) if chunk.error else data
            out.error, out.error_detail = "sse_error", excerpt(what, 500, secret).decode(errors="replace")
            return done
        _read_chunk(out, counted, stamp, chunk)
    return done


def read_answer(events: Iterable[tuple[int, bytes]]) -> str | list[int]:
    """What a stream says as far as it can be read: its token ids where it has them, else its text."""
    ids: list[int] = []
    text = ""
    for _, data in events:
        try:
            choice = (decode(data).choices or [Choice()])[0]
        except (ValueError, RecursionError):  # also the end, which is no JSON
            continue
        ids += choice.token_ids or []
        text += str(choice.text or (choice.delta and choice.delta.content) or "")
    return ids or text


def _read_chunk(out: Output, counted: _Count, stamp: int, chunk: Chunk) -> None:
    usage, before = chunk.usage, counted.usage or 0
    if usage:
        out.prompt_tokens = out.prompt_tokens if usage.prompt_tokens is None else usage.prompt_tokens
        counted.usage = usage.completion_tokens
    if not chunk.choices:
        return
    choice = chunk.choices[0]
    if choice.finish_reason:
        out.finish_reason = choice.finish_reason
    ids = choice.token_ids
    if ids is not None:
        counted.ids = (counted.ids or 0) + len(ids)
    if usage and counted.per_chunk:
        tokens = usage.completion_tokens - before
    elif ids is not None:
        tokens = len(ids)
    else:
        # The server does not say: a chunk with text holds at least one token, and how many stays unknown.
        tokens = 1 if choice.text or (choice.delta and choice.delta.holds_output()) else 0
        counted.per_chunk = counted.per_chunk and not tokens
    if tokens > 0:
        out.chunk_ns.append(stamp)
        out.chunk_tokens.append(tokens)


def _lack(out: Output, counted: _Count, done: bool, max_tokens: int) -> str:
    """Why what was read is no whole answer; empty: it is one."""
    if out.finish_reason:
        gave_up = out.finish_reason not in ENDS
        return f"the server gave the answer up: finish_reason {out.finish_reason!r}" if gave_up else ""
    if not (done and out.chunk_ns):
        return "the stream ended without its last token"
    tokens = counted.ids if counted.usage is None else counted.usage
    few = tokens is not None and tokens < max_tokens  # some servers never give a reason
    return f"the answer ended after {tokens} of {max_tokens} tokens without a finish_reason" if few else ""


def _settle_count(out: Output, counted: _Count, max_tokens: int) -> None:
    if counted.usage is not None:
        out.output_tokens, out.token_source = counted.usage, "usage"
    elif counted.ids is not None:
        out.output_tokens, out.token_source = counted.ids, "token_ids"
    elif out.finish_reason == "length":
        out.output_tokens, out.token_source = max_tokens, "max_tokens"
    if sum(out.chunk_tokens) != out.output_tokens:
        out.chunk_tokens = []
