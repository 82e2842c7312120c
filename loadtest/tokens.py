"""From the events of one stream to output tokens and their times: pure.

Chunks are not tokens: tokens are counted from the server's usage or from token ids, never by counting chunks.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import index
from typing import Any

from loadtest.records import ErrorKind, TokenSource


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


def read_stream(events: Iterable[tuple[int, bytes]], max_tokens: int) -> Output:
    """Read (stamp in ns, data) events of a completion or chat stream; never raises: what is wrong is in `error`."""
    out = Output()
    counted = _Count()
    done = False
    for stamp, data in events:
        if data.strip() == b"[DONE]":
            done = True
            continue
        try:
            _read_chunk(out, counted, stamp, json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            out.error, out.error_detail = "malformed", f"{type(error).__name__}: {error}: {data[:200]!r}"
        if out.error:
            return out
    if out.finish_reason is None and not (done and out.chunk_ns):
        out.error, out.error_detail = "truncated", "the stream ended without its last token"
        return out
    _settle_count(out, counted, max_tokens)
    return out


@dataclass
class _Count:
    """Tokens counted so far, by each source; None where the source is silent."""

    usage: int | None = None
    ids: int | None = None
    per_chunk: bool = True


def _read_chunk(out: Output, counted: _Count, stamp: int, chunk: dict[str, Any]) -> None:
    if chunk.get("error"):
        out.error, out.error_detail = "sse_error", json.dumps(chunk["error"])[:500]
        return
    usage = chunk.get("usage")
    before = counted.usage or 0
    if usage:
        out.prompt_tokens, counted.usage = index(usage["prompt_tokens"]), index(usage["completion_tokens"])
    if not chunk.get("choices"):
        return
    choice = chunk["choices"][0]
    out.finish_reason = choice.get("finish_reason") or out.finish_reason
    ids = choice.get("token_ids")
    if ids is not None:
        counted.ids = (counted.ids or 0) + len(ids)
    if usage and counted.per_chunk:
        tokens = usage["completion_tokens"] - before
    elif ids is not None:
        tokens = len(ids)
    else:
        # The server does not say: a chunk with text holds at least one token, and how many stays unknown.
        tokens = 1 if choice.get("text") or _delta_holds_output(choice.get("delta") or {}) else 0
        counted.per_chunk = counted.per_chunk and not tokens
    if tokens > 0:
        out.chunk_ns.append(stamp)
        out.chunk_tokens.append(tokens)


def _delta_holds_output(delta: dict[str, Any]) -> bool:
    return any(delta.get(key) for key in ("content", "reasoning", "reasoning_content", "tool_calls", "refusal"))


def _settle_count(out: Output, counted: _Count, max_tokens: int) -> None:
    if counted.usage is not None:
        out.output_tokens, out.token_source = counted.usage, "usage"
    elif counted.ids is not None:
        out.output_tokens, out.token_source = counted.ids, "token_ids"
    elif out.finish_reason == "length":
        out.output_tokens, out.token_source = max_tokens, "max_tokens"
    if not counted.per_chunk or sum(out.chunk_tokens) != out.output_tokens:
        out.chunk_tokens = []
