"""HTTP/1.1 answers from bytes, without I/O."""

import zlib
from contextlib import suppress
from dataclasses import dataclass, field

import httptools

# The end of a chunked body: the last chunk, with or without trailers (RFC 9112, section 7.1).
LAST_BYTES = b"\r\n\r\n"
# Some servers keep the body open after a stream's own last event.
LAST_EVENT = b"[DONE]\n\n\r\n"
MAX_ANSWER_BYTES = 256 * 2**20


@dataclass
class Answer:
    """An answer as far as it was read: its status, and the body's pieces with the stamp at which each came (ns)."""

    status: int | None = None
    content_type: str = ""
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    complete: bool = False

    def __post_init__(self) -> None:
        self.keep_alive = False
        self._stamp = 0
        self._length_known = False  # else the body ends with the connection (RFC 9112, section 6.3)
        self._size = 0
        self._unread: list[tuple[int, bytes]] = []
        self._chunked = False
        self._body_begun = False
        self._unpack: zlib._Decompress | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(piece for _, piece in self.pieces)

    def take(self, stamp: int, data: bytes) -> bool:
        """Keep bytes that came at `stamp`; answers whether the answer may be complete, so that `read` is due.

        Inside a chunked body only bytes that could be its end, or that of its stream, make it so: the rest is read when
        it has come.
        """
        self._unread.append((stamp, data))
        return not self._body_begun or data.endswith((LAST_BYTES, LAST_EVENT)) or len(data) < len(LAST_BYTES)

    def read(self) -> None:
        """Read what was taken; raises ValueError for what is not HTTP, TruncatedError when packed data is not whole."""
        unread, self._unread = self._unread, []
        self._size += sum(len(data) for _, data in unread)
        if self._size > MAX_ANSWER_BYTES:
            raise ValueError(f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
        try:
            for self._stamp, data in unread:
                if self._parser:
                    self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, zlib.error) as error:
            raise ValueError(str(error) or type(error).__name__) from error
        self._body_begun = self._chunked and self.status is not None
        if self.complete:
            self._check_packed()

    def end(self) -> None:
        """Read the end of the connection; raises ConnectionError when it ended before or inside the answer."""
        self.read()
        if self.status is None:
            raise ConnectionResetError("the server closed the connection before it answered")
        if self._length_known and not self.complete:
            raise TruncatedError("the connection ended inside the answer")
        self.complete = True
        self._check_packed()

    def _check_packed(self) -> None:
        if self._unpack and self.pieces and not self._unpack.eof:
            raise TruncatedError("the answer ended inside its packed data")

    def close(self) -> None:
        """Read what had come of an answer that was given up, and let go of the parser.

        It refers to this answer: the cycle would stay until garbage is collected.
        """
        with suppress(ValueError, TruncatedError):  # it is not whole anyway
            self.read()
        self._parser = None

    # Callbacks of the parser, which is there while they run.

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note what says how the body is framed and packed."""
        name, given, value = name.lower(), value, value.lower()
        if name == b"content-type":
            self.content_type = given.decode("latin-1")
        elif name == b"content-encoding" and value in (b"gzip", b"deflate"):
            # Sent although it was not asked for. 32: either kind of header.
            self._unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._chunked = self._chunked or (name == b"transfer-encoding" and b"chunked" in value)
        self._length_known = self._length_known or name in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """Note the status."""
        status = self._parser.get_status_code() if self._parser else 0
        # An interim answer (1xx) is not the answer.
        self.status = status if status >= 200 else None

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self.pieces.append((self._stamp, self._unpack.decompress(body) if self._unpack else body))

    def on_message_complete(self) -> None:
        """Note the end."""
        self.complete = self.status is not None
        # The parser forgets it with the next line.
        self.keep_alive = bool(self._parser and self._parser.should_keep_alive())


class TruncatedError(ConnectionError):
    """An answer whose length or whose packing tells its end ended before that."""
