"""`python -m benchmarks.peers.drain URL STREAMS TOKENS`: takes what the reference server sends and stamps nothing.

So cheap a client shows the limits of the server itself. Prints how many streams came to their end.
"""

import json
import select
import socket
import sys
import time
from urllib.parse import urlsplit

from loadtest.reference.probe import ARRIVAL_SECONDS

END = b"0\r\n\r\n"


def drain(host: str, port: int, streams: int, tokens: int) -> int:
    """Open all connections, send one request on each in turn, and take all bytes; returns how many streams ended."""
    body = json.dumps({"model": "drain", "prompt": [300] * 8, "max_tokens": tokens, "stream": True})
    request = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    epoll, sockets = select.epoll(), []
    for _ in range(streams):
        sock = socket.create_connection((host, port))
        epoll.register(sock, select.EPOLLIN)
        sockets.append(sock)
    open_sockets = {sock.fileno(): sock for sock in sockets}
    begun, sent, ended = time.monotonic(), 0, 0
    while open_sockets:
        while sent < streams and (wait := begun + sent * ARRIVAL_SECONDS / streams - time.monotonic()) <= 0:
            sockets[sent].sendall(request)
            sent += 1
        for number, _ in epoll.poll(max(wait, 0.001) if sent < streams else -1):
            data = open_sockets[number].recv(65536)
            if not data or data.endswith(END):
                ended += bool(data)
                open_sockets.pop(number).close()
    return ended


if __name__ == "__main__":
    url = urlsplit(sys.argv[1])
    print(drain(url.hostname or "", url.port or 80, int(sys.argv[2]), int(sys.argv[3])))
