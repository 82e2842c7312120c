"""The program as a user starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.__main__ import main

ROOT = Path(__file__).parents[3]
Refused = tuple[int, subprocess.Popen[str], subprocess.Popen[str]]


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "monitor", *options],
        cwd=ROOT,
        env=os.environ | {"HEADROOM_SERVER": "itself"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    # Two at once, because a start takes most of a second.
    processes = [start("--port", "0", "--hz", "20") for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_the_program_says_what_it_watches_answers_and_ends_cleanly(running: list[subprocess.Popen[str]]) -> None:
    for process, ending in zip(running, (signal.SIGTERM, signal.SIGINT), strict=True):
        assert process.stdout
        text = process.stdout.readline()
        name, url, *_ = text.split()
        assert name == "monitor:"
        # The main thread answers requests: only the samplers may keep servers from a core.
        assert os.sched_getscheduler(process.pid) == os.SCHED_OTHER
        with urllib.request.urlopen(f"{url}/health") as response:  # noqa: S310 - our own address
            health = json.load(response)
        assert health["hz"] == 20
        assert "keeps 30 minutes in " in text
        assert ("no GPU" in text) == (health["gpus"] == 0)
        assert (health["gpu_reason"] or "") in text
        # What is sampled is the memory of GPUs, or else that of processes, which is read less often.
        assert f", {20 if health['gpus'] else 10} times a second" in text
        assert shows(f"{url}/metrics", 'headroom_host_pss_bytes{server="itself"}')
        process.send_signal(ending)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 0


def test_it_runs_without_a_standard_error() -> None:
    command = ["sh", "-c", 'exec "$0" -m monitor --port 0 2>&-', sys.executable]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("monitor: http://127.0.0.1:")
        process.terminate()
        assert process.wait(30) == 0


def shows(url: str, text: str) -> bool:
    """Ask until the text is in the answer, for 30 seconds at most."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with urllib.request.urlopen(url) as response:  # noqa: S310 - our own address
            if text in response.read().decode():
                return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def refused() -> Iterator[Refused]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        yield port, start("--port", str(port)), start("--herz", "20")


def test_a_port_in_use_is_named_in_one_line(
    refused: Refused,
) -> None:
    port, process, _ = refused
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert err == f"monitor: port {port} of 127.0.0.1 is in use: free it, or choose another with --port (0: any)\n"


def test_an_unknown_option_is_named_without_a_traceback(
    refused: Refused,
) -> None:
    *_, process = refused
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "unrecognized arguments: --herz" in err
    assert "Traceback" not in err


def test_an_address_that_is_not_ours_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", "192.0.2.1"]) == 1
    assert capsys.readouterr().err.startswith("monitor: cannot listen on port 9400 of 192.0.2.1: ")


def test_each_bad_value_is_named_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--hz", "0", "--port", "70000", "--minutes", "x", "--max-cpu", "0"]) == 2
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "monitor: --hz: 0: Input should be greater than or equal to 1",
        "monitor: --max-cpu: 0: Input should be greater than 0",
        "monitor: --minutes: x: Input should be a valid integer, unable to parse string as an integer",
        "monitor: --port: 70000: Input should be less than or equal to 65535",
    ]


def test_an_unknown_variable_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HEADROOM_MONITOR_HERZ", "20")
    assert main([]) == 2
    assert "HEADROOM_MONITOR_HERZ: no such setting; there are HEADROOM_MONITOR_HOST" in capsys.readouterr().err


def test_a_variable_is_a_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HEADROOM_MONITOR_HZ", "1001")
    assert main([]) == 2
    assert capsys.readouterr().err == "monitor: --hz: 1001: Input should be less than or equal to 1000\n"


def test_more_samples_than_may_be_kept_are_refused_with_both_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--hz", "1000", "--minutes", "61"]) == 2
    assert capsys.readouterr().err == (
        "monitor: --minutes 61 x 60 x --hz 1000 is more than the 3600000 samples of a device that may be kept: "
        "at 1000 Hz up to 60 minutes, for 61 minutes up to 983 Hz\n"
    )
