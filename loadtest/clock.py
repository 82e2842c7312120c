"""Holds this host's clock against another's by questions and answers, as NTP does (RFC 5905, section 8).

It sends nothing and reads no clock.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

# The clock filter of RFC 5905, section 10: of the last exchanges the one with the smallest round trip counts.
RECENT = 8


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer: sent and back by the asker's clock, received and answered by the other's (ns)."""

    sent_ns: int
    received_ns: int
    answered_ns: int
    back_ns: int

    @property
    def offset_ns(self) -> int:
        """What is added to a time of the asker's clock to have the other's."""
        return (self.received_ns - self.sent_ns + self.answered_ns - self.back_ns) // 2

    @property
    def uncertainty_ns(self) -> int:
        """The most by which the offset can be wrong: half of the time on the way, which may all be one way's."""
        return (self.back_ns - self.sent_ns - (self.answered_ns - self.received_ns) + 1) // 2


class Comparison:
    """The exchanges with another host."""

    def __init__(self) -> None:
        self.exchanges = 0
        self._recent: deque[Exchange] = deque(maxlen=RECENT)

    def add(self, exchange: Exchange) -> None:
        """Take what an exchange found."""
        self.exchanges += 1
        self._recent.append(exchange)

    @property
    def best(self) -> Exchange | None:
        """The recent exchange that is known best; None before the first."""
        return min(self._recent, key=lambda one: one.uncertainty_ns, default=None)


@dataclass(slots=True)
class Agreement:
    """The offset that a worker's stamps were moved by in a run, and what was seen of it while the run went on (ns).

    `uncertainty_ns` is the most by which a moved stamp can be wrong: that of the offset, or how far a later exchange
    found the clocks from it, its own uncertainty added. `drift_ns` is the last offset minus the first.
    """

    offset_ns: int
    uncertainty_ns: int
    same_clock: bool = False
    drift_ns: int = 0
    exchanges: int = 0

    @classmethod
    def of(cls, offset_ns: int, uncertainty_ns: int, same_name: bool) -> "Agreement":
        """Agree on what was measured, or on no offset for two processes whose clock is one and measures as one."""
        # A copy of a virtual machine may have the name of its original, and a clock of its own.
        if same_name and abs(offset_ns) <= uncertainty_ns:
            return cls(0, 0, same_clock=True)
        return cls(offset_ns, uncertainty_ns)

    def see(self, offset_ns: int, uncertainty_ns: int) -> None:
        """Hold a later measurement against it."""
        self.exchanges += 1
        if not self.same_clock:
            self.drift_ns = offset_ns - self.offset_ns
            self.uncertainty_ns = max(self.uncertainty_ns, abs(self.drift_ns) + uncertainty_ns)


def clock_name() -> str:
    """Name of this process's CLOCK_MONOTONIC: processes that name the same boot and time namespace read one clock."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/time")
    # Before Linux 5.6 a machine had but one.
    return f"{boot.read_text().strip()} {namespace.readlink() if namespace.exists() else ''}"
