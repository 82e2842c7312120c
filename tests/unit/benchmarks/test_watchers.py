"""What other programs that watch a GPU cost, measured on programs that are played."""

import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from benchmarks.peers import compiled, watchers
from experiment.run.stack import RunError
from tests.fake_nvml.fake import GIB, Script, build

# Burns 0.4 s when it starts, prints as nvidia-smi does and holds all back until a SIGINT.
SMI = """
import datetime, signal, sys, time
assert sys.argv[1] == "--query-gpu=index,timestamp,memory.used", sys.argv
period, lines = int(sys.argv[3].removeprefix("--loop-ms=")) / 1e3, []
def end(*_):
    print("\\n".join(lines), flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, end)
begun = time.process_time()
while time.process_time() < begun + 0.4:
    pass
while True:
    for gpu in (0, 1):
        stamp = datetime.datetime.now().strftime("%Y/%m/%d %H:%M:%S.%f")[:-3]
        lines.append(f"{gpu}, {stamp}, 615 MiB")
    time.sleep(period)
"""
EXPORTER = """
import http.server, sys, time
time.process_time()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        begun = time.process_time()
        while time.process_time() < begun + 0.01:
            pass
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
http.server.HTTPServer((options["--bind-address"], int(options["--port"])), Handler).serve_forever()
"""


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "SETTLE_SECONDS", 2)
    monkeypatch.setattr(watchers, "SCRAPES", 20)
    monkeypatch.setattr(watchers, "SCRAPE_SECONDS", 0.01)


def test_the_start_of_nvidia_smi_is_not_what_it_costs_and_what_it_holds_back_is_counted(tmp_path: Path) -> None:
    found = watchers.nvidia_smi(str(program(tmp_path / "nvidia-smi", SMI)), 50, 2)
    # Two GPUs at 50 Hz; the burnt 0.4 s would be a share of 0.2.
    assert found["samples_per_second"] == pytest.approx(100, rel=0.2)
    assert found["cpu_share"] < 0.15


def test_an_nvidia_smi_that_fails_says_why(tmp_path: Path) -> None:
    failing = program(tmp_path / "nvidia-smi", "print('NVIDIA-SMI has failed')\nraise SystemExit(9)")
    with pytest.raises(RunError, match=r"nvidia-smi ended with 9: NVIDIA-SMI has failed"):
        watchers.nvidia_smi(str(failing), 50, 0.1)


def test_only_whole_lines_inside_the_window_count() -> None:
    begun = datetime(2025, 11, 22, 1, 0, 0)
    stamps = [begun + timedelta(milliseconds=100 * n) for n in range(-20, 50)]
    lines = [f"{gpu}, {stamp:%Y/%m/%d %H:%M:%S.%f}"[:-3] + ", 1 MiB" for stamp in stamps for gpu in (0, 1, 2)]
    text = "\n".join([*lines, "0, 2025/11/22 01:00:0"])
    assert watchers.rate(text, begun, begun + timedelta(seconds=3)) == pytest.approx(30)
    assert watchers.rate("", begun, begun + timedelta(seconds=3)) == 0


def test_an_exporter_is_left_alone_and_then_scraped(tmp_path: Path) -> None:
    found = watchers.exporter_cost(program(tmp_path / "one", EXPORTER), tmp_path / "log", 0.3)
    assert found["exporter"] == "one"
    assert found["cpu_share"] < 0.1
    assert found["cpu_seconds_per_scrape"] == pytest.approx(0.01, abs=0.005)
    assert 0.01 <= found["scrape_seconds"]["p50"] <= found["scrape_seconds"]["p99"] <= found["scrape_seconds"]["max"]


def test_an_exporter_that_ends_is_an_error_with_its_log(tmp_path: Path) -> None:
    failing = program(tmp_path / "one", "print('no NVML', flush=True)\nraise SystemExit(1)")
    with pytest.raises(RunError, match=r"one ended with code 1(.|\n)*no NVML"):
        watchers.exporter_cost(failing, tmp_path / "log", 0.1)


def test_an_exporter_that_refuses_a_scrape_is_an_error(tmp_path: Path) -> None:
    refusing = EXPORTER.replace('200 if self.path == "/metrics" else 404', "200 if Handler.first else 503")
    refusing = refusing.replace(
        "        self.end_headers()", "        Handler.first = False\n        self.end_headers()"
    )
    refusing = refusing.replace("    def do_GET", "    first = True\n    def do_GET")
    with pytest.raises(RunError, match="one answered a scrape with 503"):
        watchers.exporter_cost(program(tmp_path / "one", refusing), tmp_path / "log", 0.1)


def test_without_nvml_the_bare_loop_says_so() -> None:
    with pytest.raises(RunError, match="NVML"):
        watchers.bare_loop(10, 1)


def test_the_loop_in_c_tells_what_reading_takes_from_what_waking_up_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path / "script").add("device 0", 80 * GIB).add("work 0 1e9 0 memory 0.005")
    script.save()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build(tmp_path).parent))
    monkeypatch.setenv("FAKE_NVML_SCRIPT", str(script.path))
    found = watchers.c_loop(compiled("watch", tmp_path), 50, 1)
    assert 35 < found["samples_per_second"] < 51
    # 5 ms in each 20 ms, or a little more often where it makes up for late ones.
    assert 0.15 < found["cpu_share"] < 0.4
    assert found["waking_cpu_share"] < 0.05


def test_without_nvml_the_loop_in_c_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"ended with 1: watch: libnvidia-ml\.so\.1"):
        watchers.c_loop(compiled("watch", tmp_path), 10, 1)
