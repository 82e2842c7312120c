"""The peers that the benchmark of load generators runs: the C program and a driver for real, reports of the others."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.peers import compiled, drivers
from benchmarks.peers.drivers import CLIENTS, Load, UnavailableError
from benchmarks.peers.probe import Session
from loadtest.reference.probe import Seen, reference, stamps

CORE = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with reference(CORE, ttft_seconds=0.02, itl_seconds=0.005) as url:
        yield url


@pytest.mark.parametrize("name", ["drain", "watch"])
def test_a_c_compiler_has_nothing_to_say_of(name: str, tmp_path: Path) -> None:
    source = Path(peers.__file__).parent / f"{name}.c"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / name), str(source)]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


def test_the_c_program_takes_every_stream_to_its_end(url: str, tmp_path: Path) -> None:
    since = stamps(url)[0]["next"]
    command = [str(compiled("drain", tmp_path)), url.rpartition(":")[2], "12", "7", "0.1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    assert said[0] == "12"
    assert 0 < float(said[1]) < 1
    _, *sends = stamps(url, since)
    assert [len(sent["sent_ns"]) for sent in sends] == [7] * 12


def test_the_c_program_says_what_it_wants_and_what_it_could_not_reach(tmp_path: Path) -> None:
    drain = compiled("drain", tmp_path)
    assert "usage: drain PORT" in subprocess.run([drain], capture_output=True, text=True, check=False).stderr
    refused = subprocess.run([drain, "9", "1", "1", "1"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.startswith("drain: connect")) == (1, True)


def test_a_driver_sends_a_load_and_reads_back_what_its_client_saw(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "ARRIVAL_SECONDS", 0.5)
    session = Session(CLIENTS["fast-http-user"], Load(url, 0, 5, "", tmp_path), CORE, 60)
    probe = session.probe(4)
    assert (probe.streams, probe.failed) == (4, 0)
    assert probe.server_ttft_p99 <= probe.ttft_p99 < 1
    assert probe.itl_mean == pytest.approx(probe.server_itl_mean, abs=0.01)


def test_a_client_that_fails_is_not_available_and_says_why(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = drivers.Client(lambda _: ["sh", "-c", "echo no such thing; exit 3"], drivers.read_plain)
    with pytest.raises(UnavailableError, match=r"ended with 3 at 4 streams: no such thing"):
        Session(client, Load(url, 0, 5, "", tmp_path), CORE, 60).probe(4)


def test_the_result_of_vllm_bench_has_a_row_for_each_request_that_was_answered(tmp_path: Path) -> None:
    result = {"ttfts": [0.05, 0.06, 0.0], "itls": [[0.02, 0.04], [0.02, 0.02], []], "errors": ["", "", "refused"]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    first, second = drivers.read_vllm_bench(tmp_path)
    assert (first.key, first.ttft, first.gaps) == ("bench-0", 0.05, (0.02, 0.04))
    assert first.itl == pytest.approx(0.03)
    assert (second.key, second.ttft, second.gaps) == ("bench-1", 0.06, (0.02, 0.02))


def test_the_report_of_guidellm_gives_the_mean_gap_from_its_first_and_last_token(tmp_path: Path) -> None:
    timings = {
        "request_start": 10.0,
        "first_token_iteration": 10.5,
        "last_token_iteration": 12.5,
        "token_iterations": 5,
    }
    request = {"response_id": "cmpl-7", "info": {"timings": timings}}
    (tmp_path / "result.json").write_text(json.dumps({"benchmarks": [{"requests": {"successful": [request]}}]}))
    assert list(drivers.read_guidellm(tmp_path)) == [Seen("cmpl-7", 0.5, 0.5)]


def test_the_records_of_aiperf_are_in_milliseconds_and_those_with_an_error_are_left_out(tmp_path: Path) -> None:
    def row(name: str, **more: object) -> str:
        metrics = {"time_to_first_token": {"value": 50.0}, "inter_token_latency": {"value": 20.0}}
        return json.dumps({"metadata": {"x_request_id": name}, "metrics": metrics, **more})

    (tmp_path / "profile_export.jsonl").write_text(f"{row('a')}\n{row('b', error={'code': 500})}\n")
    assert list(drivers.read_aiperf(tmp_path)) == [Seen("a", 0.05, 0.02)]


def test_without_a_compiler_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"cc, gcc: not found.*watch\.c \(Debian: gcc, libc6-dev\)"):
        compiled("watch", tmp_path)


def test_what_a_compiler_has_against_a_program_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(OSError, match=r"watch\.c cannot be compiled: no headers"):
        compiled("watch", tmp_path)
