"""Which stamps the load generator knows to be wrong: those of chunks that it read late, together with a later one."""

import time
from typing import Any

import gevent
import pytest

from loadtest import selfcheck
from loadtest.selfcheck import SelfCheck

CHUNK = b"data: {}\n\n"


class Check:
    """A self-check of answers of four chunks."""

    def __init__(self) -> None:
        self._check = SelfCheck()
        gevent.sleep(0.02)

    def stand_still(self) -> int:
        """Block the loop; returns a time at which it stood still (ns)."""
        time.sleep(0.008)
        at_ns = time.monotonic_ns()
        time.sleep(0.008)
        gevent.sleep(0.02)
        return at_ns

    def shares(self, chunk_ns: list[int], written: list[int]) -> tuple[Any, Any]:
        """Take an answer, by the stamps of its chunks and those of the pieces that the server wrote them in."""
        self._check.received(chunk_ns, [(stamp, CHUNK) for stamp in written])
        report = self._check.finish()
        return report["shared_stamp_share"], report["merged_chunk_share"]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    # What else the machine does is no stall of this test's.
    monkeypatch.setattr(selfcheck, "LATE_NS", 10_000_000)
    return Check()


def test_chunks_that_are_read_together_while_the_client_stands_still_are_merged(check: Check) -> None:
    at = check.stand_still()
    stamps = [at - 10**9, at, at, at]
    assert check.shares(stamps, stamps) == (0.5, 0.5)


def test_several_chunks_that_the_server_wrote_in_one_piece_are_its_own_doing(check: Check) -> None:
    at = check.stand_still()
    assert check.shares([at - 10**9, at, at, at], [at - 10**9, at]) == (0.0, 0.0)


def test_two_pieces_of_two_chunks_are_one_too_many(check: Check) -> None:
    at = check.stand_still()
    assert check.shares([at, at, at, at], [at, at]) == (0.25, 0.25)


def test_a_server_that_writes_several_at_once_is_no_client_that_stood_still(check: Check) -> None:
    at = check.stand_still() - 10**9
    assert check.shares([at - 5, at, at, at], [at - 5, at, at, at]) == (0.5, 0.0)


def test_chunks_with_stamps_of_their_own_share_none(check: Check) -> None:
    at = check.stand_still()
    stamps = [at - 3, at - 2, at - 1, at]
    assert check.shares(stamps, stamps) == (0.0, 0.0)


def test_a_run_without_chunks_has_none_that_were_merged() -> None:
    report = SelfCheck().finish()
    assert (report["shared_stamp_share"], report["merged_chunk_share"]) == (0.0, 0.0)
