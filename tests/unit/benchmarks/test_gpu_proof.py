"""How `gpu_proof.sh` steps: with a shell script that plays Python and all our programs."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from experiment.plan.settings import read_plan

SCRIPT = Path(__file__).parents[3] / "benchmarks/gpu_proof.sh"
#: Says what it was asked. A comparison has three cells and a report; the one after CELLS of them has no end.
PYTHON = """#!/bin/sh
(IFS="|"; echo "$*") >>"$ASKED"
case " $* " in
*" $FAILS "*) echo "it broke"; exit 7 ;;
*" compare --out "*) run=$(echo "$*" | sed 's/.*--out \\([^ ]*\\).*/\\1/')/20260101T000000Z ;;
*" compare --resume "*) run=${*##*--resume } ;;
*" report "*) run=${*##* report } ;;
*) exit 0 ;;
esac
mkdir -p "$run/cells"
echo "{}" >"$run/plan.json"
trap 'exit 130' TERM
cells=0
for cell in 1 2 3; do
    [ -d "$run/cells/$cell" ] && continue
    [ "$cells" -lt "${CELLS:-3}" ] || { sleep 60 & wait $!; }
    cells=$((cells + 1))
    mkdir "$run/cells/$cell"
    echo '  "complete": true,' >"$run/cells/$cell/cell.json"
done
echo '"state": "complete"' >"$run/status.json"
sleep "${REPORT_SECONDS:-0}" & wait $!
for table in records timeline; do head -c "${TABLE_BYTES:-10}" /dev/zero >"$run/$table.parquet"; done
echo done >"$run/report.html"
"""


@dataclass
class Proof:
    """The script with its folder and the settings of all calls."""

    home: Path
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.python = self.home / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        self.folder = self.home / "proof"

    def begin(self, steps: str, **settings: str) -> "subprocess.Popen[str]":
        """Start a piece."""
        own = {"PYTHON": str(self.python), "FOLDER": str(self.folder), "GPUS": "1", "ASKED": str(self.home / "asked")}
        own |= {"FAILS": "-", "STEPS": steps} | settings
        return subprocess.Popen(
            # A signal that was ignored where the tests were started, as nohup has it, could not be taken.
            ["env", "--default-signal=INT,HUP", "bash", str(SCRIPT)],  # noqa: S607
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, steps: str, **settings: str) -> tuple[int, str]:
        """Run a piece; returns exit code and output."""
        piece = self.begin(steps, **settings)
        output, _ = piece.communicate(timeout=60)
        return piece.returncode, output

    def asked(self, program: str = "experiment.cli") -> list[list[str]]:
        """What was asked of the `headroom` command, or of another program, since the last time."""
        path = self.home / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.split("|")[2:] for line in lines if program in line]

    def states(self) -> dict[str, str]:
        """Of each step, from the table."""
        lines = (self.folder / "collected/steps.txt").read_text().splitlines()[1:]
        return {line.split()[0]: line.split()[1] for line in lines}


@pytest.fixture
def proof(tmp_path: Path) -> Proof:
    return Proof(tmp_path)


def test_a_step_that_is_done_is_not_run_again(proof: Proof) -> None:
    code, output = proof.call("doctor quick")
    assert code == 0, output
    assert [words[0] for words in proof.asked()] == ["doctor", "compare"]
    assert (proof.folder / "collected/quick/20260101T000000Z/report.html").read_text() == "done\n"
    assert proof.call("doctor quick")[0] == 0
    assert proof.asked() == []
    assert proof.states() == {"doctor": "done", "quick": "done"}


def test_a_comparison_that_a_piece_cut_off_goes_on_in_the_next_with_the_cells_it_has(proof: Proof) -> None:
    piece = {"PIECE_SECONDS": "3", "STOP_SECONDS": "1", "CELLS": "1"}
    code, output = proof.call("quick", **piece)
    assert code == 3, output
    assert proof.states() == {"quick": "left"}
    proof.asked()
    codes = [proof.call("quick", **piece)[0] for _ in range(2)]
    run = proof.folder / "runs/quick/20260101T000000Z"
    assert codes == [3, 0]
    assert proof.asked() == [["compare", "--resume", str(run)]] * 2
    assert proof.states() == {"quick": "done"}


def test_a_cell_that_does_not_fit_into_a_piece_is_told_rather_than_tried_for_ever(proof: Proof) -> None:
    code, output = proof.call("quick doctor", PIECE_SECONDS="2", STOP_SECONDS="1", CELLS="0")
    assert code == 3, output
    assert "quick got no further with a piece to itself: expected PIECE_SECONDS above 2" in output
    assert proof.states() == {"quick": "failed", "doctor": "left"}
    assert proof.call("quick doctor")[0] == 1
    assert proof.states() == {"quick": "failed", "doctor": "done"}


def test_cells_of_a_comparison_that_was_done_before_are_no_progress_of_the_next(proof: Proof) -> None:
    assert proof.call("own-gpus", PIECE_SECONDS="3", STOP_SECONDS="1", FAILS="--together")[0] == 1
    piece = {"PIECE_SECONDS": "3", "STOP_SECONDS": "1", "CELLS": "0", "RETRY": "1"}
    code, output = proof.call("own-gpus", **piece)
    assert code == 1, output
    assert "own-gpus got no further with a piece to itself" in output


def test_a_run_that_was_stopped_while_its_report_was_written_is_reported(proof: Proof) -> None:
    assert proof.call("quick", PIECE_SECONDS="3", STOP_SECONDS="1", REPORT_SECONDS="30")[0] == 3
    proof.asked()
    assert proof.call("quick")[0] == 0
    assert proof.asked() == [["report", str(proof.folder / "runs/quick/20260101T000000Z")]]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_or_a_lost_terminal_ends_what_runs_and_keeps_it_for_the_next_call(
    proof: Proof, ending: signal.Signals
) -> None:
    piece = proof.begin("quick", CELLS="1")
    run = proof.folder / "runs/quick/20260101T000000Z"
    deadline = time.monotonic() + 30
    while not (run / "cells/1/cell.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second, output = proof.call("doctor")
    assert second == 2, output
    assert "another call is at work" in output
    piece.send_signal(ending)
    output, _ = piece.communicate(timeout=30)  # it ends only when all that writes to it has ended
    assert piece.returncode == 130, output
    assert proof.states() == {"quick": "left"}
    assert proof.call("quick")[0] == 0
    assert proof.asked()[-1] == ["compare", "--resume", str(run)]


def test_a_failed_step_leaves_its_log_stops_no_other_and_is_run_again_only_when_asked(proof: Proof) -> None:
    code, output = proof.call("doctor quick", FAILS="doctor")
    assert code == 1, output
    assert "it broke" in output
    assert (proof.folder / "collected/logs/doctor.log").read_text() == "it broke\n"
    assert proof.states() == {"doctor": "failed", "quick": "done"}
    assert proof.call("doctor quick")[0] == 1
    assert [words[0] for words in proof.asked()] == ["doctor", "compare"]
    assert proof.call("doctor quick", RETRY="1")[0] == 0


def test_a_step_that_no_longer_fits_waits_for_the_next_piece_and_a_shorter_one_is_run(proof: Proof) -> None:
    assert proof.call("quick tests-hf classic", PIECE_SECONDS="300")[0] == 3
    assert proof.states() == {"quick": "done", "tests-hf": "left", "classic": "done"}
    assert proof.call("quick tests-hf classic", PIECE_SECONDS="300")[0] == 0


def test_tables_that_are_too_large_are_left_out_and_named(proof: Proof) -> None:
    assert proof.call("quick", TABLE_BYTES="600000", LIMIT_MB="1")[0] == 0
    collected = proof.folder / "collected"
    assert len(list(collected.rglob("*.parquet"))) == 1
    assert sum(path.stat().st_size for path in collected.rglob("*")) <= 1e6
    (gone,) = {"records", "timeline"} - {path.stem for path in collected.rglob("*.parquet")}
    assert f"quick/20260101T000000Z/{gone}.parquet, 600000 bytes" in (collected / "LEFT_OUT.txt").read_text()
    assert (proof.folder / f"runs/quick/20260101T000000Z/{gone}.parquet").exists()


def test_steps_for_two_gpus_are_run_only_where_there_are_two(proof: Proof) -> None:
    def known(gpus: str, **settings: str) -> set[str]:
        proof.call("", GPUS=gpus, FAILS="compare", **settings)
        return set(proof.states())

    assert known("2") - known("1") == {"own-gpus", "two-gpus"}
    assert known("4", CUDA_VISIBLE_DEVICES="3") == known("1")


def test_each_server_has_one_of_the_gpus_that_the_user_has_chosen(proof: Proof) -> None:
    proof.call("own-gpus", GPUS="4", CUDA_VISIBLE_DEVICES="3,1")
    plan = yaml.safe_load((proof.folder / "own-gpus.yaml").read_text())
    assert [target["gpus"] for target in plan["targets"]] == ["3", "1"]


def test_two_servers_are_not_given_a_gpu_that_the_user_has_not_chosen(proof: Proof) -> None:
    code, output = proof.call("own-gpus", GPUS="4", CUDA_VISIBLE_DEVICES="3")
    assert code == 1, output
    assert "CUDA_VISIBLE_DEVICES: '3': expected two GPUs" in output
    assert proof.asked() == []


@pytest.mark.parametrize("setting", ["SIZE", "MODEL", "BIG_MODEL", "KV_BUDGET", "BIG_KV_BUDGET"])
def test_a_folder_is_of_one_size_and_one_model(proof: Proof, setting: str) -> None:
    assert proof.call("quick", FAILS="quick-13b")[0] == 0
    code, output = proof.call("doctor", **{setting: "smoke"})
    assert code == 2, output
    assert f"{setting}: 'smoke': expected '" in output
    assert "give another FOLDER" in output
    assert proof.call("quick")[0] == 0


@pytest.mark.parametrize("size", ["short", "whole", "smoke"])
def test_every_comparison_is_a_plan(proof: Proof, size: str) -> None:
    code, output = proof.call("", GPUS="2", SIZE=size)
    assert code == 0, output
    plans = [read_plan(words[1:]) for words in proof.asked() if words[0] == "compare"]
    assert len(plans) == 12
    assert len({plan.out for plan in plans}) == 12
    assert sum(plan.model == "random:opt-13b" for plan in plans) == (0 if size == "smoke" else 4)
    assert sum(plan.together for plan in plans) == 1


def test_the_tests_that_are_run_are_there(proof: Proof) -> None:
    assert proof.call("tests-stack tests-hf")[0] == 0
    files = [word for words in proof.asked("pytest") for word in words if word.startswith("tests/")]
    assert len(files) == 7
    assert all((SCRIPT.parents[1] / file).is_file() for file in files)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"STEPS": "quick nothing"}, "STEPS: 'nothing': expected some of "),
        ({"SIZE": "huge"}, "SIZE: 'huge': expected short, whole or smoke"),
        ({"GPUS": "0"}, "no NVIDIA GPU is found here"),
        ({"PIECE_SECONDS": "40"}, "PIECE_SECONDS: '40': expected more than STOP_SECONDS, 45"),
    ],
)
def test_what_cannot_be_is_refused_and_named(proof: Proof, settings: dict[str, str], said: str) -> None:
    code, output = proof.call("quick", **settings)
    assert code == 2
    assert said in output
    assert proof.asked() == []


def test_after_the_rates_of_all_servers_vllm_alone_is_asked_higher_ones(proof: Proof) -> None:
    code, output = proof.call("paper", SIZE="short")
    assert code == 0, output
    plans = [read_plan(words[1:]) for words in proof.asked()]
    assert [plan.levels for plan in plans] == [[0.5, 1, 2], [4, 8, 16, 32, 64]]
    assert [[target.name for target in plan.targets] for plan in plans] == [
        ["sequential", "batch-static", "vllm"],
        ["vllm"],
    ]
    assert plans[0].workload == plans[1].workload
