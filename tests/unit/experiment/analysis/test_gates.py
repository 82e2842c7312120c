"""What the real load generator leaves of itself, as a rule of a comparison."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiment.analysis.gates import judge
from experiment.analysis.results import JSON, load
from experiment.words import Words, findings
from loadtest import calibrate
from loadtest.records import count
from loadtest.reference.probe import reference
from tests.unit.experiment.folders import change_json, make_folder

ROOT = Path(__file__).parents[4]
CELL = "cells/01-hf-c2-r1"
FAST, WHOLE = "client-fast", "client-complete"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    core = min(os.sched_getaffinity(0))
    with reference(core, ttft_seconds=0.01, itl_seconds=0.002) as url:
        yield url


def send(url: str, folder: Path, requests: int) -> subprocess.Popen[bytes]:
    """Run the load generator on a machine on which it was found to be accurate up to ten tokens a second."""
    folder.mkdir()
    kept = folder / calibrate.KEPT.relative_to(Path.home())
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"machine": calibrate._machine(), "tokens_per_second": 10}))
    options = f"--headless --only-summary --users 2 --spawn-rate 9 --warmup 0 --requests {requests} --hf-url {url}"
    locust = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), *options.split()]
    records = ["--model", "reference", "--records", str(folder / "records.arrow"), "HF"]
    return subprocess.Popen(
        [*locust, *records],
        cwd=ROOT,
        env=os.environ | {"HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def gate(run: Path, client: Path, rule: str) -> JSON:
    shutil.copy(client, run / CELL / "client.json")
    return next(gate for gate in judge(load(run), {}) if gate["id"] == rule)


def test_what_the_load_generator_says_against_a_run_fails_a_rule(tmp_path: Path, url: str) -> None:
    whole, stopped = send(url, tmp_path / "whole", 20), send(url, tmp_path / "stopped", 100_000)
    assert whole.wait(180) == 0
    records = tmp_path / "stopped" / "records.arrow"
    while not records.exists() or not count(records):
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(180)
    run = make_folder(tmp_path / "run")

    fast = gate(run, tmp_path / "whole" / "client.json", FAST)
    assert not fast["passed"]
    told = findings.found(Words("en"), fast, "closed")
    assert "cell 1: chunks_per_second_max: " in told
    assert "at most 10" in told
    assert gate(run, tmp_path / "whole" / "client.json", WHOLE)["passed"]
    assert gate(run, tmp_path / "stopped" / "client.json", WHOLE)["found"] == [{"id": "stopped", "cells": [1]}]


def test_a_closed_loop_says_that_it_has_no_schedule_to_be_late_on(tmp_path: Path) -> None:
    run = make_folder(tmp_path)
    client = tmp_path / "client.json"
    shutil.copy(run / CELL / "client.json", client)
    assert "no send lateness" in findings.found(Words("en"), gate(run, client, FAST), "closed")
    change_json(run / "plan.json", arrival="poisson")
    change_json(client, send_lateness_p99_seconds=0.0004)
    told = findings.found(Words("en"), gate(run, client, FAST), "poisson")
    assert "send lateness p99 at most 0.0004 s" in told
    assert "no send lateness" not in told
