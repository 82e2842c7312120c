"""The stack, built and brought up once, with a run that goes on."""

import time
from collections.abc import Iterator

import pytest

from tests.integration.conftest import browser, page
from tests.system.compose import Compose

__all__ = ["browser", "page"]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    compose = Compose(tmp_path_factory.mktemp("clone"))
    compose.run("--profile", "command", "build", "--quiet", seconds=3000)
    return compose


@pytest.fixture(scope="session")
def stack(built: Compose) -> Iterator[Compose]:
    """All services but those whose image is not at hand, healthy."""
    started = time.monotonic()
    try:
        built.run("up", "--detach", "--wait", "--no-build", seconds=600)
        built.seconds_to_start = time.monotonic() - started
        yield built
    finally:
        print(built.run("logs", "--no-color", "--tail", "40"))
        built.run("--profile", "command", "down", "--volumes", "--timeout", "30", seconds=300)
