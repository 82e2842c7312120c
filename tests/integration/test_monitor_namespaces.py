"""The monitor and servers in different PID namespaces, as containers have them."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.fake_nvml.fake import GIB, Metrics, MonitorProcess, Script, build

pytestmark = pytest.mark.alone

ROOT_OF_ITS_OWN = () if os.geteuid() == 0 else ("--user", "--map-root-user")
UNSHARE = ("unshare", *ROOT_OF_ITS_OWN, "--pid", "--fork", "--kill-child", "--mount-proc")
# Two servers in the namespace of the monitor, one of which has a file open that is called as the GPU's, their pids in
# files; and the monitor.
BESIDE_SERVERS = """
cd "$0"
for name in null zero random urandom; do touch $name; mount --bind /dev/$name $name; done
touch nvidia0
mount --rbind . /dev
cd - > /dev/null
HEADROOM_SERVER=idle sleep 60 &
echo $! > "$0/idle"
HEADROOM_SERVER=busy sleep 60 3< /dev/nvidia0 &
echo $! > "$0/busy"
exec "$@"
"""

pytestmark = pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0,
    reason="this user may make no PID namespaces",
)


@contextmanager
def monitoring(script: Script, folder: Path, within: Sequence[str] = ()) -> Iterator[MonitorProcess]:
    monitor = MonitorProcess(build(folder), script, "--max-cpu", "1", within=within)
    try:
        yield monitor
    finally:
        monitor.end()


def parts(metrics: Metrics) -> dict[str, float]:
    return {name[2]: value / GIB for name, value in metrics.items() if name[0] == "gpu_process_memory_bytes"}


def namespace(pid: int | str) -> int:
    return Path(f"/proc/{pid}/ns/pid").stat().st_ino


def test_a_server_in_a_namespace_is_attributed_by_a_monitor_outside(tmp_path: Path) -> None:
    # A name that no other process on this machine bears.
    name = f"test-{uuid4()}"
    environ = os.environ | {"HEADROOM_SERVER": name}
    with subprocess.Popen([*UNSHARE, "sh", "-c", "echo $$; sleep 60"], env=environ, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout
            assert server.stdout.readline() == b"1\n"
            (inner,) = psutil.Process(server.pid).children()
            assert namespace(inner.pid) != namespace("self")
            script = Script(tmp_path / "script").add("device", 0, 80 * GIB).add("memory", 0, 0, 30 * GIB)
            script.add("process", 0, 0, inner.pid, 20 * GIB)
            with monitoring(script, tmp_path) as monitor:
                metrics = monitor.wait(lambda metrics: ("host_processes", name) in metrics)
                assert parts(metrics) == {name: 20, "unattributed": 10}
                # unshare itself, the shell and its child.
                assert metrics["host_processes", name] == 3
                assert monitor.health()["pid_namespace"] == "host"
                assert "namespace" not in monitor.log
        finally:
            server.kill()


def test_a_monitor_in_a_namespace_says_so_and_takes_no_pid_of_the_host_for_one_of_its_own(tmp_path: Path) -> None:
    devices = tmp_path / "dev"
    devices.mkdir()
    script = Script(tmp_path / "script").add("device", 0, 80 * GIB).add("memory", 0, 0, 30 * GIB)
    with monitoring(script, tmp_path, [*UNSHARE, "sh", "-c", BESIDE_SERVERS, str(devices)]) as monitor:
        idle, busy = ((devices / name).read_text().strip() for name in ("idle", "busy"))
        script.add("process", 0, 0, idle, 20 * GIB).add("process", 0, 0, busy, 4 * GIB).save()
        servers = {("host_processes", name) for name in ("idle", "busy")}
        monitor.wait(lambda metrics: servers <= set(metrics) and parts(metrics) == {"busy": 4, "unattributed": 26})
        assert monitor.health()["pid_namespace"] == "own"
        assert monitor.log.count("in a PID namespace of its own") == 1
        time.sleep(1)
        # Nor when the processes are looked at again.
        assert parts(monitor.metrics()) == {"busy": 4, "unattributed": 26}
