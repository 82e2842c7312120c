"""Both real servers and the monitor, started once for the whole session; comparisons; a browser."""

import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from experiment.run.stack import Stack
from tests.integration.harness import KV_BUDGET, Compare, comparisons, make_plan, vllm_knows

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or "chromium is missing: apt-get install chromium"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    logs = tmp_path_factory.mktemp("stack")
    # float32, in which greedy outputs of both servers are equal.
    times = "--per-request-metrics" if vllm_knows("enable_per_request_metrics") else ""
    plan = make_plan(logs, dtype="float32", kv_budget=KV_BUDGET, vllm_args=times)
    with Stack(plan, logs, print) as running:
        with pytest.MonkeyPatch.context() as environment:
            # The rates that it is held to are its own, not what this processor does within a share of a core.
            environment.setenv("HEADROOM_MONITOR_MAX_CPU", "1")
            running.start()
        yield running


@pytest.fixture
def compare(tmp_path: Path) -> Iterator[Callable[..., Compare]]:
    """Start a comparison with the given options of the plan; killed after the test if it still runs."""
    with comparisons(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    # Imported here: the tests without a page run also where there is no browser.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "Browser") -> Iterator["Page"]:
    """A page that must see no error and ask nothing of any other server."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        hosts: set[str | None] = set()
        page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).hostname))
        yield page
        assert [error for error in errors if "net::ERR_FAILED" not in error] == []
        assert hosts <= {"127.0.0.1"}
