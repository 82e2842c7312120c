"""The requests of `headroom classic`: one input or several at once, streamed through the OpenAI API."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from experiment.run.stack import RunError

NEW_TOKENS, TEMPERATURE = 50, 0.7
TIMEOUT_SECONDS = 600
HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """What came back for an input: stamps (CLOCK_MONOTONIC ns), tokens as the server counts them, and characters."""

    sent_ns: int
    first_ns: int
    last_ns: int
    prompt_tokens: int
    output_tokens: int
    characters: int

    @property
    def ttft_seconds(self) -> float:
        """Time to first token."""
        return (self.first_ns - self.sent_ns) / 1e9

    @property
    def e2e_seconds(self) -> float:
        """From sending to the last token."""
        return (self.last_ns - self.sent_ns) / 1e9


def ask_at_once(url: str, model: str, inputs: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[Answer]:
    """Send all inputs at the same moment and wait for the last answer; raises RunError when one fails."""
    connections = [HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_SECONDS) for _ in inputs]
    bodies = [json.dumps(_body(model, text, place, new_tokens)) for place, text in enumerate(inputs)]

    def send() -> list[int]:
        """Send one right after the other, before any is waited for; the moments in ns."""
        sent = []
        for connection, body in zip(connections, bodies, strict=True):
            sent.append(time.monotonic_ns())
            connection.request("POST", f"{urlsplit(url).path}/v1/completions", body, HEADERS)
        return sent

    try:
        for connection in connections:
            connection.connect()
        with ThreadPoolExecutor(len(inputs), initializer=_go_first) as pool:
            sent = pool.submit(send).result()
            return list(pool.map(_read, connections, sent))
    except (OSError, HTTPException, ValueError, KeyError) as error:
        raise RunError(f"{url}: a request failed: {type(error).__name__}: {error}") from error
    finally:
        for connection in connections:
            connection.close()


def _go_first() -> None:
    """Have this thread run before others: vLLM's processes spin while they wait, and would keep it from its stamps."""
    if hasattr(os, "sched_setscheduler"):
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _body(model: str, prompt: str, place: int, new_tokens: int) -> dict[str, Any]:
    """The same sampling for all servers; the end of text is ignored, so that each makes as many tokens."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": TEMPERATURE}
    body |= {"seed": place + 1, "ignore_eos": True, "return_token_ids": True}
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def _read(connection: HTTPConnection, sent_ns: int) -> Answer:
    """Read one stream; raises OSError, HTTPException, ValueError, and KeyError for an answer without usage."""
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"HTTP {response.status}: {response.read(500).decode(errors='replace')}")
    stamps: list[int] = []
    text, usage = "", None
    for line in response:
        data = line.strip().removeprefix(b"data:").strip()
        if not data.startswith(b"{"):
            continue
        stamp, chunk = time.monotonic_ns(), json.loads(data)
        if "error" in chunk:
            raise ValueError(chunk["error"])
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["text"]
            stamps += [stamp] if choice["text"] or choice.get("token_ids") else []
    if not stamps or not usage:
        raise ValueError("the answer has no output token, or does not say how many")
    tokens = usage["prompt_tokens"], usage["completion_tokens"]
    return Answer(sent_ns, stamps[0], stamps[-1], *tokens, len(text))
