"""Waits until a moment, to some microseconds: gevent's own timers go by whole milliseconds."""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import gevent
from gevent.event import Event
from gevent.socket import wait_read

CLOCK_MONOTONIC, ABSOLUTE = 1, 1
# The flags of timerfd_create are those of open; the module os has them from Python 3.13 on.
FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
# Waking up takes 0.05 to 0.15 ms, never the same: so long before the moment it is done, and the rest is watched.
WATCH_NS = 150_000
# To read an answer of a few tokens and keep its record takes about as long.
NEAR_NS = 400_000
LONGEST_WAIT_NS = 5_000_000


class _Times(ctypes.Structure):
    """struct itimerspec of timerfd_settime(2): an interval that is not used, and the moment."""

    _fields_ = (("interval", ctypes.c_long * 2), ("moment", ctypes.c_long * 2))


class Alarm:
    """One greenlet's alarm: Linux's timerfd. Raises OSError when there is none to be had."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(CLOCK_MONOTONIC, FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wait_until(self, moment_ns: int) -> None:
        """Wait for a moment of CLOCK_MONOTONIC; when it has passed, others have their turn all the same."""
        wake_ns = moment_ns - WATCH_NS
        if wake_ns <= time.monotonic_ns():
            gevent.sleep(0)
        else:
            times = _Times((0, 0), divmod(wake_ns, 1_000_000_000))
            self._libc.timerfd_settime(self._fd, ABSOLUTE, ctypes.byref(times), None)
            wait_read(self._fd)
            os.read(self._fd, 8)
        while time.monotonic_ns() < moment_ns:
            pass

    def close(self) -> None:
        """Give it back."""
        os.close(self._fd)


class Precedence:
    """Lets sends go before what can wait: it waits when one is due within the time that it takes itself."""

    def __init__(self) -> None:
        self._due_ns: dict[str, int] = {}
        self._gone = Event()

    @contextmanager
    def of(self, sender: str, due_ns: int) -> Iterator[None]:
        """What the sender sends at a moment (CLOCK_MONOTONIC) goes first, until it is under way."""
        self._due_ns[sender] = due_ns
        try:
            yield
        finally:
            del self._due_ns[sender]
            self._gone.set()
            self._gone.clear()

    def wait(self) -> None:
        """Wait while a send is near, but not for long: at thousands a second there always is one.

        One that is later than that already has its turn with everything else.
        """
        begun_ns = time.monotonic_ns()
        while (now_ns := time.monotonic_ns()) - begun_ns < LONGEST_WAIT_NS:
            if not any(abs(due_ns - now_ns) < NEAR_NS for due_ns in self._due_ns.values()):
                return
            self._gone.wait()
