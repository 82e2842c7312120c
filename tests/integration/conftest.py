"""Both real servers and the monitor, started once for the whole session."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiment.stack import Stack
from tests.integration.harness import Compare, make_plan


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    logs = tmp_path_factory.mktemp("stack")
    # float32, in which greedy outputs of both servers are equal.
    with Stack(make_plan(logs, dtype="float32"), logs, print) as running:
        running.start()
        yield running


@pytest.fixture
def compare(tmp_path: Path) -> Iterator[Callable[..., Compare]]:
    """Start a comparison with the given options of the plan; killed after the test if it still runs."""
    started: list[Compare] = []

    def start(**options: Any) -> Compare:
        started.append(Compare(tmp_path / "results", **options))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
