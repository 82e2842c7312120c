"""When sends are due: the alarm that they wait for, and what waits for them."""

import time
from contextlib import closing

import gevent
import pytest

from loadtest.alarm import LONGEST_WAIT_NS, NEAR_NS, Alarm, Precedence


@pytest.mark.parametrize("ahead_ns", [50_000, 20_000_000])
def test_an_alarm_does_not_ring_before_its_moment(ahead_ns: int) -> None:
    with closing(Alarm()) as alarm:
        moment = time.monotonic_ns() + ahead_ns
        alarm.wait_until(moment)
        assert time.monotonic_ns() >= moment


def test_others_have_their_turn_when_the_moment_has_passed() -> None:
    other = gevent.spawn(lambda: None)
    with closing(Alarm()) as alarm:
        alarm.wait_until(time.monotonic_ns() - 1)
    assert other.ready()


def test_what_can_wait_waits_for_a_send_that_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 0
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns)
    precedence, order = Precedence(), []

    def read() -> None:
        precedence.wait()
        order.append("read")

    with precedence.of("hf", NEAR_NS - 1):
        reading = gevent.spawn(read)
        gevent.sleep(0)
        order.append("sent")
    reading.join(5)
    assert order == ["sent", "read"]


@pytest.mark.parametrize("due_ns", [NEAR_NS, -NEAR_NS])
def test_what_can_wait_does_not_wait_for_a_send_that_is_far_or_late(
    due_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)
    precedence = Precedence()
    with precedence.of("hf", due_ns):
        waiting = gevent.spawn(precedence.wait)
        gevent.sleep(0)
        assert waiting.ready()


def test_what_can_wait_waits_for_a_send_that_is_due_until_it_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)
    precedence = Precedence()
    with precedence.of("hf", 0):
        waiting = gevent.spawn(precedence.wait)
        gevent.sleep(0)
        assert not waiting.ready()
    waiting.join(5)
    assert waiting.ready()


def test_what_waits_looks_anew_when_a_send_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)
    precedence = Precedence()
    with precedence.of("vllm", NEAR_NS // 2):
        with precedence.of("hf", NEAR_NS // 4):
            waiting = gevent.spawn(precedence.wait)
            gevent.sleep(0)
        gevent.sleep(0)
        assert not waiting.ready()
    waiting.join(5)
    assert waiting.ready()


def test_what_waits_goes_on_though_sends_are_always_near(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns, step_ns = 0, NEAR_NS // 2
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns)
    precedence = Precedence()
    waiting, sends = None, 0
    while waiting is None or not waiting.ready():
        with precedence.of("hf", now_ns + step_ns):
            waiting = waiting or gevent.spawn(precedence.wait)
            gevent.sleep(0)
            now_ns += step_ns
        sends += 1
        assert sends <= LONGEST_WAIT_NS // step_ns + 2
