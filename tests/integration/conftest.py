"""Both real servers and the monitor, started once for the whole session."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiment.stack import Stack
from tests.integration.harness import Compare, make_plan


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    logs = tmp_path_factory.mktemp("stack")
    with Stack(make_plan(logs), logs, print) as running:
        running.start()
        yield running


@pytest.fixture
def compare(tmp_path: Path) -> Iterator[type[Compare]]:
    started: list[Compare] = []

    class Started(Compare):
        def __init__(self, **options: Any):
            super().__init__(tmp_path / "results", **options)
            started.append(self)

    yield Started
    for run in started:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGKILL)
            run.process.wait()
