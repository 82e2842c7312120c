"""What the tests of the experiment share."""

import pytest

from experiment import stats


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    # These are enough to tell the verdicts of these tests apart.
    monkeypatch.setattr(stats, "RESAMPLES", 100)


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the time of a report."""
    for name in ("charts", "layers"):
        monkeypatch.setattr(f"experiment.report.{name}.draw", lambda *_: {})
