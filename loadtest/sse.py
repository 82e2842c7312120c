"""Server-sent events from bytes, without I/O (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

MAX_EVENT_BYTES = 64 * 2**20


class Decoder:
    """Collects bytes, cut at any place, into the data of events.

    Comments, other fields and events without data are dropped; lines end with LF, CRLF or CR. Raises ValueError for an
    event larger than 64 MiB.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Take bytes; returns the data of each event that they complete."""
        text = self._rest + piece
        if len(text) > MAX_EVENT_BYTES:
            raise ValueError("an event is larger than 64 MiB")
        # A CR at the very end may be the first half of a CRLF: it waits for the next byte.
        held = b"\r" if text.endswith(b"\r") else b""
        lines = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
