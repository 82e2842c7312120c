"""TLS as a transformation of bytes, so that the socket below is read, and stamped, as any other."""

import socket
import ssl

from gevent.socket import wait_read, wait_write

CHUNK_BYTES = 64 * 1024


class Tls:
    """The client's side of one TLS connection; raises OSError (ssl.SSLError is one) for what is not TLS.

    `ended`: the server said that it sends no more, which is an end also while the socket below stays open.
    """

    def __init__(self, context: ssl.SSLContext, host: str):
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self.ended = False

    def handshake(self, sock: socket.socket, timeout_seconds: float) -> None:
        """Agree on keys over a non-blocking socket; each wait ends after `timeout_seconds`."""
        while True:
            try:
                self._session.do_handshake()
            except ssl.SSLWantReadError:
                send(sock, self._outgoing.read(), timeout_seconds)
                wait_read(sock.fileno(), timeout_seconds, TimeoutError("no TLS handshake"))
                data = sock.recv(CHUNK_BYTES)
                if not data:
                    raise ConnectionResetError("the server closed the connection in the TLS handshake") from None
                self._incoming.write(data)
            else:
                send(sock, self._outgoing.read(), timeout_seconds)
                return

    def encrypt(self, data: bytes) -> bytes:
        """Bytes to send for the data."""
        self._session.write(data)
        return self._outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        """The data in bytes that were received; b"" while a record is not whole."""
        self._incoming.write(data)
        plain = []
        try:
            while piece := self._session.read(CHUNK_BYTES):
                plain.append(piece)
            self.ended = True  # close_notify: RFC 8446, section 6.1
        except ssl.SSLWantReadError:
            pass
        return b"".join(plain)


def send(sock: socket.socket, data: bytes, timeout_seconds: float) -> None:
    """Send all of the data over a non-blocking socket."""
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left) :]
        except BlockingIOError:
            wait_write(sock.fileno(), timeout_seconds, TimeoutError("the server takes no data"))
