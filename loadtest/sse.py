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
        self._size = 0
        self._after_cr = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Take bytes; returns the data of each event that they complete."""
        # A CR ends its line at once; when the LF of a CRLF comes in the next piece, it ends no second one.
        text = self._rest + (piece.removeprefix(b"\n") if self._after_cr else piece)
        self._after_cr = piece.endswith(b"\r") if piece else self._after_cr
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(value) + 1
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        if self._size + len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError("an event is larger than 64 MiB")
        return events
