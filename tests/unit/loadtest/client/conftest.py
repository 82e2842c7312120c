"""A scripted server and a client for it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from loadtest.client.connection import Connection
from loadtest.client.receiver import Receiver
from tests.unit.loadtest.client.scripted import Connect, Serve, Server


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server; each argument is a connection's list of answers."""
    with ExitStack() as stack:
        yield lambda *scripts: stack.enter_context(Server(list(scripts)))


@pytest.fixture(autouse=True, scope="module")
def stamping() -> Iterator[None]:
    """Linux begins to stamp a moment after it was first asked to, and goes on while a socket asks for it."""
    receiver = Receiver("kernel")
    time.sleep(0.1)
    yield
    receiver.close()


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as stack:

        def connect(
            url: str, timeout: float = 5, receiver: Receiver | None = None, token_timeout: float = 0
        ) -> Connection:
            receiver = receiver or Receiver()
            stack.callback(receiver.close)
            connection = Connection(url, receiver, timeout, token_timeout)
            stack.callback(connection.close)
            return connection

        yield connect
