"""When received data is read: at once, or left to gather while many answers stream."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent.event import Event

from loadtest.client.http import Answer
from loadtest.client.receiver import (
    GATHER_SECONDS,
    GATHER_STREAMS,
    JUDGED_READINGS,
    LONG_GATHER_SECONDS,
    Receiver,
    Stream,
)
from tests.unit.loadtest.client.scripted import FIRST, LAST, chunked, head

STREAMS = 2 * GATHER_STREAMS
FAR_NS = 10**18


class Streams:
    """Answers that are received, and the ends that send them."""

    def __init__(self, receiver: Receiver, stack: ExitStack):
        self.receiver = receiver
        self.answers = [Answer() for _ in range(STREAMS)]
        self._ends = []
        for answer in self.answers:
            own, other = socket.socketpair()
            receiver.prepare(own)
            self._ends.append(other)
            stack.callback(own.close)
            stack.callback(other.close)
            stream = Stream(own, answer, FAR_NS, 0, 0)
            stack.callback(gevent.spawn(receiver.receive, stream).kill)
        gevent.sleep(0)

    def send(self, data: bytes) -> None:
        """Send the same to all, and wait until it was read."""
        for end in self._ends:
            end.sendall(data)
        for _ in range(4):  # the loop reads in between, also when it stood still for longer
            gevent.sleep(LONG_GATHER_SECONDS)


@pytest.fixture(params=[True, False], ids=["awaited", "not awaited"])
def streams(request: pytest.FixtureRequest) -> Iterator[Streams]:
    receiver = Receiver(awaited=request.param)
    if not receiver.kernel:
        pytest.fail("this system does not stamp what it receives")
    with ExitStack() as stack:
        stack.callback(receiver.close)
        yield Streams(receiver, stack)


@pytest.mark.parametrize("streams", [False], indirect=True)
def test_where_nothing_waits_for_answers_data_gathers_for_longer(streams: Streams) -> None:
    streams.send(head())
    for _ in range(2 + JUDGED_READINGS // STREAMS):
        streams.send(chunked(FIRST)[:-5])
    assert streams.receiver.gather_seconds == LONG_GATHER_SECONDS


@pytest.mark.parametrize("streams", [False], indirect=True)
def test_it_gathers_for_less_long_once_readings_hold_several_events(streams: Streams) -> None:
    streams.send(head())
    for _ in range(2 + JUDGED_READINGS // STREAMS):
        streams.send(chunked(FIRST, FIRST)[:-5])
    assert streams.receiver.gather_seconds == GATHER_SECONDS
    # And it goes on to receive.
    streams.send(chunked(LAST))
    assert all(answer.complete for answer in streams.answers)


@pytest.mark.parametrize("streams", [True], indirect=True)
def test_where_something_waits_for_answers_data_never_gathers_for_long(streams: Streams) -> None:
    streams.send(head() + chunked(FIRST, LAST))
    assert streams.receiver.gather_seconds == GATHER_SECONDS
    assert all(answer.complete for answer in streams.answers)


def test_what_has_gathered_is_received_when_its_turn_has_come() -> None:
    turn = Event()

    def wait() -> None:
        turn.wait()

    with ExitStack() as stack:
        receiver = Receiver(turn=wait)
        stack.callback(receiver.close)
        streams = Streams(receiver, stack)
        streams.send(head() + chunked(FIRST, LAST))
        assert not any(answer.complete for answer in streams.answers)
        turn.set()
        streams.send(b"")
        assert all(answer.complete for answer in streams.answers)


def test_an_answer_that_is_late_is_ended_also_while_many_stream(streams: Streams) -> None:
    own, other = socket.socketpair()
    with own, other:
        late = Stream(own, Answer(), time.monotonic_ns() + 50_000_000, 0, 0)
        streams.receiver.prepare(own)
        receiving = gevent.spawn(streams.receiver.receive, late)
        receiving.join(5)
        assert isinstance(late.failure, TimeoutError)
