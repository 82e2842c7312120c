"""What came back for a request, as a record."""

from typing import Any

from loadtest.client.connection import Exchange
from loadtest.client.tokens import excerpt, read_stream
from loadtest.records import ErrorKind, Record
from loadtest.work.workloads import Request


def make_record(request: Request, exchange: Exchange, secret: str = "", **fields: Any) -> Record:
    """Turn what came back into a record; `fields` are those that neither request nor answer know.

    The `secret` that was sent is left out of the error.
    """
    fields |= {
        "index": request.index,
        "max_tokens": request.max_tokens,
        "sent_ns": exchange.sent_ns,
        "end_ns": exchange.end_ns,
        "status": exchange.status,
        "stamp_source": exchange.clock,
    }
    error, detail = error_of(exchange), exchange.error_detail
    if error in ("http_4xx", "http_5xx"):
        detail = excerpt(exchange.answer.body, 500, secret).decode(errors="replace")
    elif error == "malformed" and not exchange.error:
        kind = excerpt(exchange.answer.content_type.encode(), 200, secret).decode(errors="replace")
        detail = f"expected an event stream, got {kind!r}: {excerpt(exchange.answer.body, 200, secret)!r}"
    if error and not exchange.answer.pieces:
        return Record(**fields, error=error, error_detail=detail)
    try:
        output = read_stream(exchange.events(), request.max_tokens, secret)
    except ValueError as problem:
        return Record(**fields, error="malformed", error_detail=str(problem))
    if error:
        output.error, output.error_detail = error, detail
    return Record(**fields, **vars(output))


def error_of(exchange: Exchange) -> ErrorKind | None:
    """What failed as far as the status and the kind of answer tell; what it holds is read later."""
    if exchange.error == "cancelled":
        return exchange.error
    if exchange.status and exchange.status >= 400:
        return "http_4xx" if exchange.status < 500 else "http_5xx"
    if not exchange.error and not exchange.answer.content_type.lower().startswith("text/event-stream"):
        return "malformed"
    return exchange.error
