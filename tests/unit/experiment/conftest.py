"""What the tests of the experiment share."""

import pytest


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the time of a report."""
    for name in ("charts", "caches", "layers"):
        monkeypatch.setattr(f"experiment.report.{name}.draw", lambda *_: {})
