"""What the sampling of the host tells of itself."""

import time

import pytest

from monitor.gpu import Rates
from monitor.host import LATENESS, MISSED, make_host
from monitor.processes import Processes
from monitor.timeline import Readings, Timeline


def test_the_timeline_has_how_many_samples_were_missed_and_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of four samples takes so long that two are due before it has ended."""
    timeline, processes, samples = Timeline(), Processes(), 0

    def read() -> Readings:
        nonlocal samples
        samples += 1
        time.sleep(0.25 if samples == 2 else 0)
        return {}

    monkeypatch.setattr(processes, "read", read)
    steps = make_host(timeline, processes, Rates(hz=10, max_cpu=1.0, seconds=60), beside_gpus=False).samplers[0].steps
    ring = timeline.rings["host"]
    found: list[Readings] = []
    while samples < 4:
        seconds, before = next(steps), len(found)
        if samples > before:
            found.append(ring.latest())
        time.sleep(seconds)
    assert all(LATENESS in row for row in found)
    assert MISSED not in found[0]
    assert found[2][MISSED] >= 1  # one, or more where the machine stood still too
