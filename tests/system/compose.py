"""The stack as its users run it: a clean copy of the tree, a .env, and `docker compose`."""

import json
import os
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from experiment.environment import find_gpus
from experiment.run.stack import get
from tests.fake_nvml.fake import GIB, Script, build
from tests.integration.harness import free_ports

ROOT = Path(__file__).parents[2]
JSON = dict[str, Any]
# What a fake GPU answers, where there is no real one, in the units of NVML.
FAKE_GPU = (
    "utilization 50, power 300000, temperature 60, sm 1500, memory 2600, throttling 4, energy 1000, pcie-tx 100, "
    "pcie-rx 200, links 1, nvlink-tx 5, nvlink-rx 6, ecc-corrected 1, ecc-uncorrected 0"
)
# Variable of .env with the published port, by service.
PORTS = {
    "hf": "HEADROOM_HF_PORT",
    "vllm": "HEADROOM_VLLM_PORT",
    "monitor": "HEADROOM_MONITOR_PORT",
    "locust": "LOCUST_WEB_PORT",
    "prometheus": "PROMETHEUS_PORT",
    "grafana": "GRAFANA_PORT",
}


class Compose:
    """A project of `docker compose` in a folder of its own.

    Services whose image is neither on this machine nor given by a registry are left out: `left_out` names them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        _copy_tree(folder)
        if os.getuid() == 0:
            # A clone is mostly not root's; what a container writes must be its owner's.
            os.chown(folder / "results", 1234, 1234)
        services: JSON = yaml.safe_load((folder / "docker-compose.yml").read_text())["services"]
        self.left_out = [name for name, each in services.items() if "build" not in each and not _at_hand(each["image"])]
        self.seconds_to_start = 0.0
        self.services = [name for name in services if name not in self.left_out and name != "headroom"]
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        settings = {variable: str(self.ports[service]) for service, variable in PORTS.items()} | {
            "COMPOSE_PROJECT_NAME": f"headroom-test-{os.getpid()}",
            "COMPOSE_FILE": "docker-compose.yml:docker-compose.override.yml",
            # A start takes half the time, and these tests are not about speed.
            "HEADROOM_VLLM_ENFORCE_EAGER": "true",
        }
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        # Builds on the host's network, because that of containers may reach no package index.
        override: JSON = {name: {"build": {"network": "host"}} for name, each in services.items() if "build" in each}
        override |= {name: {"profiles": ["left-out"]} for name in self.left_out}
        self.fake_gpu = None if find_gpus()[0] else _fake_gpu(folder / "fake-nvml", override["monitor"])
        (folder / "docker-compose.override.yml").write_text(yaml.safe_dump({"services": override}))

    def run(self, *arguments: str, seconds: float = 120) -> str:
        """Run `docker compose` with these arguments; answers what it printed, and fails with it."""
        return run("docker", "compose", *arguments, folder=self.folder, seconds=seconds)

    def headroom(self, *arguments: str, seconds: float = 120) -> str:
        """Run the headroom command in a container of its own; answers what it printed, and fails with it."""
        return self.run("run", "--rm", "headroom", *arguments, seconds=seconds)

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.ports[service]}"

    def containers(self) -> list[JSON]:
        """What `docker inspect` says of each container of the project that runs."""
        ids = self.run("ps", "--quiet").split()
        return json.loads(run("docker", "inspect", *ids)) if ids else []

    def health(self) -> dict[str, list[str | None]]:
        """Health of the containers of each service."""
        found: dict[str, list[str | None]] = {}
        for container in self.containers():
            found.setdefault(service_of(container), []).append(container["State"].get("Health", {}).get("Status"))
        return found

    def is_healthy(self, workers: int = 1) -> bool:
        wanted = {service: ["healthy"] for service in self.services}
        return self.health() == wanted | {"locust-worker": ["healthy"] * workers}

    def users(self, container: JSON) -> set[str]:
        """Ids of the users whom its processes run as, but for Docker's own init."""
        lines = run("docker", "top", container["Id"], "-eo", "pid,uid,comm").splitlines()[1:]
        return {line.split()[1] for line in lines if "docker-init" not in line}

    def use_fake_gpu(self) -> None:
        """Let the first process of each server's container hold memory of the fake GPU."""
        assert self.fake_gpu
        for container in self.containers():
            if service_of(container) in ("hf", "vllm"):
                self.fake_gpu.add("process 0 0", container["State"]["Pid"], GIB)
        self.fake_gpu.save()

    def kill(self, container: JSON) -> None:
        """SIGKILL its first process, as the kernel does when memory is short (`docker kill` counts as a stop)."""
        code = f"import os; os.kill({container['State']['Pid']}, 9)"
        command = ["docker", "run", "--rm", "--pid", "host", "--entrypoint", "python"]
        run(*command, "headroom-monitor", "-c", code)

    def query(self, expression: str) -> list[JSON]:
        """Ask Prometheus."""
        path = f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        body = get(self.url("prometheus") + path)
        return json.loads(body)["data"]["result"] if body else []


def run(*command: str, folder: Path = ROOT, seconds: float = 120) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def until(holds: Callable[[], object], seconds: float, why: Callable[[], object]) -> None:
    """Wait until something holds; fails with the reason."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.5)


def service_of(container: JSON) -> str:
    return str(container["Config"]["Labels"]["com.docker.compose.service"])


def _fake_gpu(folder: Path, monitor: JSON) -> Script:
    """Put a fake GPU into the monitor's container; its Compose override is changed."""
    folder.mkdir()
    build(folder)
    script = Script(folder / "script").add("device 0", 80 * GIB).add("memory 0 0", 3 * GIB).add("xid 0 0 13")
    for value in FAKE_GPU.split(", "):
        script.add("value 0", value)
    script.save()
    monitor["volumes"] = [f"{folder}:/fake-nvml:ro"]
    monitor["environment"] = {"LD_LIBRARY_PATH": "/fake-nvml", "FAKE_NVML_SCRIPT": "/fake-nvml/script"}
    return script


def _at_hand(image: str) -> bool:
    pull = ["docker", "pull", "--quiet", image]
    found = run("docker", "image", "ls", "--quiet", image).strip()
    return bool(found) or not subprocess.run(pull, capture_output=True, check=False, timeout=600).returncode


def _copy_tree(folder: Path) -> None:
    """Copy what a clone of the working tree would have."""
    for name in run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
