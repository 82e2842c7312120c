"""What the benchmark of the monitor makes of its timeline."""

import io
import os
import subprocess
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from benchmarks import monitor
from benchmarks.kv_sampling import rate, ratio, stopped
from experiment.run import kv
from experiment.run.stack import Program, RunError
from monitor.timeline import Series
from monitor.window import SCHEMA


def answer(rows: list[tuple[int, str, str, float]]) -> bytes:
    """What /timeline answers for rows of moment, metric, source and value."""
    found = [
        {"time_ns": at, "wall_ns": at, "value": value, **Series(metric, detail=source)._asdict()}
        for at, metric, source, value in rows
    ]
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(found, SCHEMA))
    return sink.getvalue()


def test_a_sample_is_late_for_each_that_was_missed_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [(1, monitor.LATENESS, "gpu0", 0.001), (2, monitor.LATENESS, "gpu0", 0.025), (2, monitor.MISSED, "gpu0", 2)]
    body = answer([*rows, (2, monitor.LATENESS, "gpu1", 0.002), (2, monitor.LATENESS, "host", 9)])
    monkeypatch.setattr(monitor, "get", lambda _: body)
    program = Program("monitor", subprocess.Popen("true"), tmp_path / "log", "http://monitor")  # noqa: S607
    program.process.wait()
    late, taken = monitor.lateness(program, 0, "gpu", 100)
    assert taken == 3
    assert sorted(late) == pytest.approx([0.001, 0.002, 0.005, 0.015, 0.025])
    with pytest.raises(RunError, match="monitor took no sample of nvml"):
        monitor.lateness(program, 0, "nvml", 100)


@pytest.mark.parametrize(
    ("verdict", "said"), [("no detectable difference", "within noise"), ("slower", "slower"), ("faster", "faster")]
)
def test_a_ratio_is_told_with_its_interval_its_verdict_and_its_pairs(verdict: str, said: str) -> None:
    found = {"value": 0.97, "low": 0.9, "high": 1.05, "verdict": verdict, "ratios": [0.95, 0.99]}
    assert ratio(found) == f"0.970 (0.900 to 1.050), {said}; pairs 0.950, 0.990"


@pytest.mark.parametrize("rounds", ["0", "-1", "1,2", "x"])
def test_rounds_that_make_no_pairs_are_refused(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        monitor.parse(["--rounds", rounds])
    assert "--rounds" in capsys.readouterr().err


def test_a_file_that_cannot_be_made_is_refused_before_all_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(SystemExit):
            monitor.parse(["--out", str(path)])
        assert f"{str(path)!r}: expected a file in a folder that is there" in capsys.readouterr().err
    assert monitor.parse(["--out", str(tmp_path / "file")])[1] == tmp_path / "file"


def test_the_dearest_thread_is_told_first() -> None:
    found = {"hz": 100, "thread_cpu_shares": {"gpu0-fast": 0.002, "gpu0-pcie": 0.0051}}
    assert monitor.apart(found) == "of a core at 100 Hz: gpu0-pcie 0.51%, gpu0-fast 0.20%"


def test_what_watches_does_nothing_while_it_is_stopped() -> None:
    watcher = psutil.Popen(["sleep", "60"])
    try:
        with stopped(watcher):
            assert os.waitid(os.P_PID, watcher.pid, os.WSTOPPED)
        assert os.waitid(os.P_PID, watcher.pid, os.WCONTINUED)
    finally:
        watcher.kill()
        watcher.wait()


def test_the_time_in_which_a_sampler_was_stopped_is_not_in_its_rate(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.2, 5.2, 5.25, 5.3, 5.4]
    rows = [{"answered_ns": int(at * 1e9), "error": "gone" if at == 5.25 else None} for at in times]
    path = tmp_path / "kv.arrow"
    with pa.ipc.new_stream(path, kv.SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(rows, kv.SCHEMA))
    assert rate(path, 5) == pytest.approx(10)
