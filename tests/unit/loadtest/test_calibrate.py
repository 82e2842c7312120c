"""Calibration: the real load generator against the real reference server, at a load that any machine can bear."""

import json
import os
from pathlib import Path

import pytest

from loadtest import calibrate

OWN = sorted(os.sched_getaffinity(0))
CORES = ",".join(map(str, OWN[:2]))
needs_two_cores = pytest.mark.skipif(len(OWN) < 2, reason="client and server each need a core")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "calibration.json"
    monkeypatch.setattr(calibrate, "KEPT", path)
    return path


@needs_two_cores
def test_each_load_is_shown_and_what_was_found_is_kept(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "LEAST_STREAMS", 4)
    monkeypatch.setattr(calibrate, "MOST_STREAMS", 4)
    code = calibrate.main(["--cores", CORES])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["4", "200"]
    client, server = lines[1].split()[2:4]
    # First token after 50 ms, and a machine that does other things too.
    assert 45 < float(client.rstrip(",")) < 1000
    assert 45 < float(server) < 1000
    assert calibrate.known_limit() == (200.0 if code == 0 else None)
    assert kept.exists() is (code == 0)


def test_a_result_of_another_machine_does_not_count(kept: Path) -> None:
    calibrate.keep(4000)
    assert calibrate.known_limit() == 4000
    other = json.loads(kept.read_text()) | {"machine": ["elsewhere"]}
    kept.write_text(json.dumps(other))
    assert calibrate.known_limit() is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": 1}'])
def test_a_damaged_file_is_no_calibration(kept: Path, content: str) -> None:
    kept.parent.mkdir()
    kept.write_text(content)
    assert calibrate.known_limit() is None


@needs_two_cores
def test_a_load_generator_that_ends_with_an_error_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: Path
) -> None:
    monkeypatch.setenv("HEADROOM_LOADTEST_SEED", "-1")
    assert calibrate.main(["--cores", CORES]) == 1
    assert "seed: -1" in capsys.readouterr().err
    assert not kept.exists()


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ("0", "expected two numbers"),
        ("a,b", "expected two numbers"),
        ("0,0", "expected two different cores"),
        ("0,9999", "may not use core 9999"),
    ],
)
def test_cores_that_are_not_there_are_refused(cores: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        calibrate.main(["--cores", cores])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert repr(cores) in said
    assert message in said
