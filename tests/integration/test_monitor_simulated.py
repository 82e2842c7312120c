"""GPUs over minutes and hours: the monitor's threads in simulated time, with a library that plays NVML."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_nvml.fake import GIB, ROOT, Script, build

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fake-nvml"))


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "script")


def play(library: Path, script: Script, module: str, *words: str) -> dict[str, Any]:
    """Run a program in simulated time; answer the figures that it prints."""
    environ = {
        "LD_LIBRARY_PATH": str(library.parent),
        "FAKE_NVML_SCRIPT": str(script.path),
        "HEADROOM_SERVER": "hf",
    }
    command = [sys.executable, "-m", f"tests.fake_nvml.{module}", *words]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    figures: dict[str, Any] = json.loads(run.stdout)
    return figures


def test_a_gpu_that_is_taken_away_for_good_is_let_go_and_the_others_keep_their_names(
    library: Path, script: Script
) -> None:
    played = play(library, script, "scenarios", "taken_away")
    assert played["before"]["up"] == ["nvml", "gpu0", "gpu1", "gpu2"]
    soon, later = played["soon"], played["later"]
    assert soon["up"] == later["up"] == ["nvml", "gpu0", "gpu2"]
    assert soon["there"] == later["there"] == {"0": "GPU-0", "2": "GPU-2"}
    assert soon["used"] == later["used"] == {"0": 1, "2": 3}
    assert soon["down"] == ["gpu1"]
    # NVML was opened once more, and in the half hour after that no more.
    assert soon["opened"] == later["opened"] == 2
    assert played["samples"] == pytest.approx((2000 - 80) * 2, abs=2)
    # Its samples have been overwritten by then.
    assert soon["rings"] == ["gpu0", "gpu1", "gpu2", "xid"]
    assert (later["rings"], later["down"]) == (["gpu0", "gpu2", "xid"], [])


def test_a_gpu_that_fails_for_ever_is_looked_for_ever_more_seldom(library: Path, script: Script) -> None:
    played = play(library, script, "scenarios", "fails_for_ever")
    assert played["hour"]["up"] == played["two"]["up"] == ["nvml", "gpu0"]
    assert played["hour"]["down"] == ["gpu1"]
    assert played["hour"]["opened"] < 20
    assert played["two"]["opened"] - played["hour"]["opened"] == 3600 // 300


def test_an_error_of_whatever_code_ends_when_nvml_is_opened_anew(library: Path, script: Script) -> None:
    played = play(library, script, "scenarios", "unknown_error")
    assert [played[when]["used"] for when in ("before", "soon", "later")] == [{"0": 0}, {}, {"0": 0}]
    assert [played[when]["opened"] for when in ("before", "soon", "later")] == [1, 1, 2]


def test_mig_devices_come_and_go_while_nvml_stays_open(library: Path, script: Script) -> None:
    played = play(library, script, "scenarios", "mig")
    assert played["before"]["there"] == {"0": "GPU-0", "0/0": "GPU-0/0", "0/1": "GPU-0/1"}
    # In the place of 0/0 there is another device, and its series are others.
    there = {"0": "GPU-0", "0/0:GPU-7": "GPU-7", "0/2": "GPU-0/2"}
    for when in ("soon", "later"):
        assert played[when]["there"] == there
        assert played[when]["used"] == {"0/0:GPU-7": 8, "0/2": 5}
        assert played[when]["opened"] == 1
    # What is taken away on purpose is not down.
    assert (played["soon"]["down"], played["later"]["down"]) == ([], [])


def test_what_is_not_supported_is_tried_again(library: Path, script: Script) -> None:
    assert play(library, script, "scenarios", "supported_later") == {"sent": 5 * 1024, "errors": 0}


def test_seconds_with_lower_clocks_are_counted_by_reason_and_those_without_a_sample_are_not(
    library: Path, script: Script
) -> None:
    played = play(library, script, "scenarios", "throttled")
    assert played["enough"] == played["sw_power_cap"] == pytest.approx(30, abs=0.1)
    assert 55 < played["hw_thermal_slowdown"] < 61
    assert played["hw_slowdown"] == 0


def test_processes_that_have_more_than_the_device_leave_less_than_nothing(library: Path, script: Script) -> None:
    assert play(library, script, "scenarios", "overcount") == {"hf": 12, "unattributed": 10 - 12}


def test_a_day_leaves_memory_flat_and_the_schedule_where_it_was(library: Path, script: Script) -> None:
    day = play(library, script, "day")
    seconds, losses, kept = 24 * 3600, 24, 30 * 60
    assert day["samples"]["nvml"] == [seconds, 0]
    # Some seconds are missed with each loss.
    taken, missed = day["samples"]["gpu0"]
    assert taken + missed == seconds
    assert missed == pytest.approx(losses * 7, abs=losses * 4)
    # Each thread woke up late by up to 2 ms each time.
    assert 0 < day["off_grid_ns"] <= 2_000_000
    assert (day["errors"], day["xids"], day["opened"]) == (losses, losses, 1 + 2 * losses)
    assert day["throttled_seconds"] == pytest.approx(seconds - losses * 7, abs=losses * 4)
    assert day["rows"]["gpu_memory_used_bytes"] == day["rows"]["gpu_energy_joules_total"] == kept
    assert day["rows"]["gpu_pcie_bytes_per_second"] == 2 * kept
    assert day["rows"]["gpu_throttled"] == 6 * kept
    assert day["rows"]["host_processes"] == seconds // 300
    assert (day["spike_rows"], day["server_rows"], day["adds_up"]) == (30 * 2, kept // 2, True)
    assert day["peaks"] == {str(9.0 * GIB): seconds // 300}
    assert day["grown_bytes"] < 2_000_000


def test_processes_are_read_when_the_memory_changes_and_else_five_times_a_second(library: Path, script: Script) -> None:
    played = play(library, script, "scenarios", "changing")
    assert 45 <= len(played["calm"]) <= 60
    # The spike within the millisecond, its end once the next reading is due.
    assert [round(at, 3) for at in played["spike"]][:2] == [10.001, 10.01]
    assert 85 <= len([at for at in played["read"] if 11 <= at < 12]) <= 115


def test_lists_of_processes_keep_within_their_share_after_a_burst_and_take_nothing_from_the_memory(
    library: Path, script: Script
) -> None:
    played = play(library, script, "scenarios", "dear_processes")
    assert played["memory"] == 4000
    # A tenth of --max-cpu is 1 % of a core: 5 a second, of which 25 were saved up.
    assert 20 <= sum(at < 1 for at in played["processes"]) <= 35
    assert 20 * 4 <= sum(20 <= at < 40 for at in played["processes"]) <= 20 * 6
