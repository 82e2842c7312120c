"""The page "Servers" in a real browser, on a real Locust whose users make their records up."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.integration.harness import free_ports

ROOT = Path(__file__).parents[2]


class Locust:
    """Locust processes in one folder; the first has the web server."""

    def __init__(self, folder: Path, stack: ExitStack, base: str = ""):
        self.folder = folder
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}{base}"
        self._stack = stack

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("HEADROOM_", "LOCUST_"))}
        process = subprocess.Popen(
            [sys.executable, "-m", "locust", "-f", str(ROOT / "tests/integration/live_locustfile.py"), *arguments],
            cwd=self.folder,
            env={**ours, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "locust.log").open("ab"),
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def numbers(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/servers.json").json()
        return found

    def swarm(self, users: int) -> None:
        form = {"user_count": users, "spawn_rate": users}
        assert httpx.post(self.url + "/swarm", data=form, timeout=10).json()["success"]

    def stop(self) -> None:
        httpx.post(self.url + "/stop", timeout=10)

    def until(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if holds():
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, (self.folder / "locust.log").read_text()
            time.sleep(0.1)

    def ready(self) -> "Locust":
        self.until(lambda: self.get("/servers").status_code == 200)
        return self


@contextmanager
def started(folder: Path) -> Iterator[Locust]:
    with ExitStack() as stack:
        locust = Locust(folder, stack)
        locust.start("--web-port", str(locust.port))
        yield locust.ready()


@pytest.fixture
def locust(tmp_path: Path) -> Iterator[Locust]:
    with started(tmp_path) as locust:
        yield locust


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locust]:
    """One that runs no test."""
    with started(tmp_path_factory.mktemp("idle")) as locust:
        yield locust


def cell(page: Page, row: str, column: int) -> str:
    return page.get_by_role("row", name=re.compile(f"^{row}")).get_by_role("cell").nth(column).inner_text()


def start_test(page: Page, users: int) -> None:
    page.get_by_label(re.compile("Number of users")).fill(str(users))
    page.get_by_label(re.compile("Ramp up")).fill(str(users))
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()


def test_a_test_is_started_watched_and_stopped_and_its_records_downloaded(locust: Locust, page: Page) -> None:
    page.goto(locust.url)
    page.get_by_role("link", name="Servers: live charts").click()
    expect(page.get_by_text("No test is running. Start one on the first page")).to_be_visible()
    expect(page.get_by_role("link", name="Download records")).to_be_hidden()
    page.get_by_role("link", name="Start or stop a test").click()

    start_test(page, users=6)
    page.get_by_role("link", name="Servers: live charts").click()
    expect(page.get_by_text(re.compile(r"Running, 6 users, 0:0[3-9]"))).to_be_visible(timeout=15_000)
    for chart, server, value in [
        ("Output throughput", "hf", r"\d"), ("Output throughput", "vllm", r"\d"),
        ("Time to first token", "hf", r"p50 (1[89]|2[01])\d(\.\d)? ms"),
        ("Time to first token", "vllm", r"p50 (4[5-9]|5[0-5])(\.\d)? ms"),
        ("Time per output token", "hf", "p99 2"), ("End-to-end", "vllm", r"p95 1\d\d ms"),
        ("Send lateness", "hf", r"p50 (1|0\.99|1\.01) ms"), ("Requests in flight", "vllm", "3 requests"),
        ("Requests that failed", "hf", r"timeout \d"), ("Requests that failed", "vllm", "None has failed"),
    ]:  # fmt: skip
        name = re.compile(f"{chart}.*, {server}:.*{value}")
        expect(page.get_by_role("img", name=name), f"{chart} {server}").to_be_visible()
    expect(page.get_by_role("img", name=re.compile("CPU of the load generator: local 25 %"))).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("^local 25 % 1 ms"))).to_be_visible()

    locust.stop()
    expect(page.get_by_text("The test has ended; these are its last numbers")).to_be_visible()
    expect(page.get_by_text("Not running")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download records").click()
    lines = Counter(Path(download.value.path()).read_text().splitlines())
    assert download.value.suggested_filename == "records.txt"
    assert cell(page, "Succeeded", 0) == str(lines["hf None"])
    assert cell(page, "Succeeded", 1) == str(lines["vllm None"])
    assert f"{lines['hf timeout']} timeout" in cell(page, "Failed", 0)
    assert cell(page, "In flight", 0) == cell(page, "In flight", 1) == "0"


def test_a_second_test_starts_the_page_anew(locust: Locust, page: Page) -> None:
    page.goto(locust.url + "/servers")
    locust.swarm(2)
    expect(page.get_by_text(re.compile("Running, 2 users, 0:0[3-9]"))).to_be_visible(timeout=15_000)
    locust.stop()
    expect(page.get_by_text("The test has ended")).to_be_visible()
    locust.swarm(1)
    expect(page.get_by_text(re.compile("Running, 1 user, 0:0[01]"))).to_be_visible(timeout=5_000)


def test_the_page_says_when_locust_does_not_answer_and_goes_on_when_it_does(idle: Locust, page: Page) -> None:
    page.goto(idle.url + "/servers")
    page.route("**/servers.json*", lambda route: route.abort())
    expect(page.get_by_text("Locust does not answer")).to_be_visible()
    page.unroute("**/servers.json*")
    expect(page.get_by_text("No test is running")).to_be_visible()


def test_the_page_fits_a_phone_and_follows_its_dark_mode(locust: Locust, browser: Browser) -> None:
    locust.swarm(4)
    locust.until(lambda: len(locust.numbers()["points"]) >= 2)
    with browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark") as context:
        page = context.new_page()
        page.goto(locust.url + "/servers")
        expect(page.get_by_role("img", name=re.compile("Time to first token.*vllm.*ms"))).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"


def test_a_moment_of_a_chart_is_read_by_pointing_at_it(locust: Locust, page: Page) -> None:
    locust.swarm(4)
    locust.until(lambda: len(locust.numbers()["points"]) >= 4)
    locust.stop()
    page.goto(locust.url + "/servers")
    chart = page.get_by_role("img", name=re.compile("Requests in flight.*hf"))
    expect(chart).to_have_attribute("aria-label", re.compile(": 0 requests"))
    chart.hover(position={"x": 60, "y": 60})
    expect(chart).to_have_attribute("aria-label", re.compile(": 2 requests"))
    expect(page.get_by_role("img", name=re.compile("Requests in flight.*vllm: 2 requests"))).to_be_visible()


def test_no_other_site_may_read_or_frame_what_we_answer(idle: Locust) -> None:
    for path in ("/servers", "/servers.json", "/servers/records", "/servers/servers.js", "/metrics"):
        headers = idle.get(path).headers
        assert "Access-Control-Allow-Origin" not in headers, path
        assert "default-src 'self'" in headers["Content-Security-Policy"], path


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/servers/records", 404, "no records yet: start a test first"),
        ("/servers/__init__.py", 404, "no file '__init__.py'"),
        ("/servers.json?since=yesterday", 400, "since: 'yesterday': expected a whole number"),
    ],
)
def test_what_is_not_there_is_said(idle: Locust, path: str, status: int, says: str) -> None:
    response = idle.get(path)
    assert response.status_code == status
    assert says in response.text


def test_metrics_are_what_prometheus_expects(locust: Locust) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: apt-get install prometheus"
    locust.swarm(4)
    locust.until(lambda: b'requests_total{kind="timeout",server="hf"}' in locust.get("/metrics").content)
    metrics = locust.get("/metrics").content
    done = subprocess.run([promtool, "check", "metrics"], input=metrics, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert b"headroom_loadtest_users 4.0" in metrics
    assert re.search(rb'headroom_loadtest_ttft_seconds_bucket\{le="\+Inf",server="vllm"\} [1-9]', metrics)


def test_the_page_stands_below_a_base_path_and_behind_the_login(tmp_path: Path) -> None:
    with ExitStack() as stack:
        locust = Locust(tmp_path, stack, base="/load")
        locust.start("--web-port", str(locust.port), "--web-base-path", "/load", "--web-login")
        locust.until(lambda: locust.get("/login").status_code == 200)
        for path in ("/servers", "/servers.json", "/servers/records", "/metrics"):
            response = locust.get(path)
            assert (response.status_code, "/load/login" in response.headers["Location"]) == (302, True), path


def test_the_master_shows_all_workers_and_forgets_one_that_was_killed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        locust = Locust(tmp_path, stack)
        (port,) = free_ports(1)
        locust.start("--master", "--master-bind-port", str(port), "--web-port", str(locust.port))
        locust.ready()
        workers = [locust.start("--worker", "--master-port", str(port)) for _ in range(2)]
        locust.until(lambda: locust.get("/worker-count").json()["worker_count"] == 2)
        locust.swarm(8)
        locust.until(lambda: set(locust.numbers()["clients"]) == {"worker-0", "worker-1"})
        locust.until(lambda: sum(t["in_flight"] for t in locust.numbers()["run"].values()) == 8)
        locust.until(lambda: locust.numbers()["points"][-1:] != [])
        workers[0].send_signal(signal.SIGKILL)
        locust.until(lambda: len(locust.numbers()["clients"]) == 1)
        locust.until(lambda: sum(t["in_flight"] for t in locust.numbers()["run"].values()) == 4)
        locust.stop()
        kept = Counter((tmp_path / "records.txt").read_text().splitlines())

        def missing(target: str) -> int:
            return kept[f"{target} None"] - int(locust.numbers()["run"][target]["outcomes"]["ok"])

        # The worker that is left tells the rest within three seconds. What the killed one had not told is all that may
        # be missing: three seconds of its four users, all of them perhaps of one server, and what they waited for.
        locust.until(lambda: 0 <= missing("hf") <= 4 * 3 / 0.36 + 4)
        locust.until(lambda: 0 <= missing("vllm") <= 4 * 3 / 0.09 + 4)
        locust.until(lambda: sum(t["in_flight"] for t in locust.numbers()["run"].values()) == 0)
