"""Server-sent events from bytes, without I/O (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

BOM = b"\xef\xbb\xbf"
NO_DATA = (b":", b"event:", b"id:", b"retry:")


def read_events(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the data of each event of a stream, and the number of bytes up to the event's end.

    Comments, other fields, events without data and a last event without its empty line are dropped, and so is a byte
    order mark at the start; lines end with LF, CRLF or CR.
    """
    begin = len(BOM) if stream.startswith(BOM) else 0
    yield from _read_blocks(stream[begin:], begin)


def _read_blocks(stream: bytes, begun: int = 0) -> Iterator[tuple[int, bytes]]:
    """`begun`: how many bytes came before."""
    if b"\r" in stream:
        yield from _read_lines(stream, begun)
        return
    end, last = begun, begun + len(stream)
    for block in stream.split(b"\n\n"):
        begin, end = end, end + len(block) + 2
        if end > last:
            return  # the rest
        if block.startswith(b"data: ") and b"\n" not in block:
            yield end, block[6:]
        else:
            yield from _read_lines(block + b"\n\n", begin)


def read_pieces(pieces: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Yield the data of each event of a stream that came in pieces, with the stamp of the piece that held its end."""
    whole = 0
    for stamp, piece in pieces:  # nearly always each is one event
        if not _is_event(piece):
            break
        yield stamp, piece[6:-2]
        whole += 1
    else:
        return
    rest = pieces[whole:]
    ends = list(accumulate(len(piece) for _, piece in rest))
    read = _read_blocks if whole else read_events
    for end, data in read(b"".join(piece for _, piece in rest)):
        yield rest[bisect_left(ends, end)][0], data


def is_done(stream: bytes) -> bool:
    """Whether a stream has said that it is complete; its body may still be open. JSON holds no line breaks."""
    return stream.rpartition(b"[DONE]")[0].endswith((b"\ndata: ", b"\ndata:"))


def holds_data(piece: bytes) -> bool:
    """Whether a piece of a stream holds some of an event's data: more than empty lines, comments and other fields."""
    return any(line and not line.startswith(NO_DATA) for line in piece.splitlines())


def holds_several(data: bytes) -> bool:
    """Whether bytes of a stream seem to hold more than one event; those at its end come together and do not count."""
    return data.count(b"data:") > 1 and b"[DONE]" not in data


def _is_event(piece: bytes) -> bool:
    """Whether it is one event of one line, which ends with it."""
    return piece.startswith(b"data: ") and piece.endswith(b"\n\n") and piece.count(b"\n") == 2 and b"\r" not in piece


def _read_lines(stream: bytes, end: int) -> Iterator[tuple[int, bytes]]:
    values: list[bytes] = []
    for line in stream.splitlines(keepends=True):
        end += len(line)
        name, _, value = line.rstrip(b"\r\n").partition(b":")
        if name == b"data" and line.endswith((b"\n", b"\r")):
            values.append(value.removeprefix(b" "))
        elif line in (b"\n", b"\r\n", b"\r") and values:
            yield end, b"\n".join(values)
            values = []
