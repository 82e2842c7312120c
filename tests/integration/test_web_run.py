"""A load test as a user makes it in a browser: the form, the live view, the stop, the records."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from loadtest.records import read
from tests.integration.harness import free_ports

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reference() -> Iterator[str]:
    """URL of a reference server: first token after 200 ms, the next ones 20 ms apart."""
    command = [sys.executable, "-m", "loadtest.reference", "--port", "0", "--ttft", "0.2", "--itl", "0.02"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().split()[-1]
        process.terminate()


@pytest.fixture
def site(reference: str, tmp_path: Path) -> Iterator[str]:
    """URL of Locust's web UI, for a server and one that is not there."""
    web, nowhere = free_ports(2)
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HEADROOM_", "LOCUST_"))}
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py"), "--web-port", str(web)]
    command += ["--hf-url", reference, "--vllm-url", f"http://127.0.0.1:{nowhere}", "--model", "reference"]
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))
        process = subprocess.Popen(command, cwd=tmp_path, env=ours, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        url, deadline = f"http://127.0.0.1:{web}", time.monotonic() + 30
        while True:
            try:
                httpx.get(url)
            except httpx.TransportError:
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
            else:
                break
        yield url


def test_an_open_loop_from_the_form_is_watched_stopped_and_its_records_downloaded(site: str, page: Page) -> None:
    page.goto(site)
    page.get_by_text("Custom parameters").click()
    page.get_by_label(re.compile("^Arrival")).select_option("poisson")
    start = page.get_by_role("button", name="Start")
    start.click()
    expect(page.get_by_text("rate: 0.0: arrival poisson needs a rate above 0")).to_be_visible()
    page.get_by_label(re.compile("^Rate")).fill("20")
    page.get_by_label(re.compile("^Output Mean")).fill("10")
    start.click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()

    page.get_by_role("link", name="Servers: live charts").click()
    for chart, server, value in [
        ("Output throughput", "hf", r"\d"),
        ("Time to first token", "hf", r"p50 2\d\d(\.\d)? ms"),
        ("Send lateness", "hf", "p99 .* ms"),
        ("Requests that failed", "vllm", r"connect \d"),
    ]:
        name = re.compile(f"{chart}.*, {server}:.*{value}")
        expect(page.get_by_role("img", name=name), f"{chart} {server}").to_be_visible(timeout=20_000)

    page.get_by_role("link", name="Start or stop a test").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("link", name="Servers: live charts").click()
    expect(page.get_by_text("The test has ended")).to_be_visible()
    expect(page.get_by_text("It was ended before all was sent and answered.")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download records").click()
    records = list(read(download.value.path()))
    assert download.value.suggested_filename == "records.arrow"
    served = [record for record in records if record.target == "hf"]
    assert {record.error for record in served} <= {None, "cancelled"}
    # The last one may have been sent in the moment of the stop.
    assert {record.error for record in records if record.target == "vllm"} - {"cancelled"} == {"connect"}
    row = page.get_by_role("row", name=re.compile("^Succeeded")).get_by_role("cell")
    assert row.nth(0).inner_text() == str(sum(record.error is None for record in served))
