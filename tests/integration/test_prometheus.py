"""A real Prometheus, with the configuration and rules that ship, on all four programs while a load test runs."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment.environment import find_gpus
from experiment.run.stack import Stack, end, get, spawn
from tests.fake_nvml.fake import MonitorProcess, Script, build
from tests.integration.harness import free_ports
from tests.integration.hf_server import HfServer

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy/prometheus"
JSON = dict[str, Any]
RULES = [
    rule
    for path in sorted(DEPLOY.glob("rules/*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
# Rules that say nothing of one or both servers here; all others must have a series for each.
OF_GPUS = {"headroom:gpu_memory_used:ratio", "headroom:gpu_memory_used_max:ratio"}
OF_NO_SERVER = {"headroom:monitor_cpu:ratio_rate1m"}
RECORDS = {rule["record"] for rule in RULES if "record" in rule}
OF_VLLM = {"headroom:preemptions:rate1m", *(name for name in RECORDS if name.startswith("headroom:vllm_"))}
OF_A_PREFIX_CACHE = {"headroom:prefix_cache_hit:ratio_rate1m"}  # off unless it is asked for
BOTH = sorted(RECORDS - OF_GPUS - OF_NO_SERVER - OF_VLLM - OF_A_PREFIX_CACHE)


def tool(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is missing: apt-get install prometheus"
    return path


def until(holds: Callable[[], object], seconds: float, why: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.5)


class Prometheus:
    """Its HTTP API; `urls` are those of what it scrapes, by server label or job."""

    def __init__(self, url: str, urls: dict[str, str]):
        self.url = url
        self.urls = urls

    def api(self, path: str, **query: str) -> Any:
        body = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}")
        return json.loads(body)["data"] if body else {}

    def query(self, expression: str) -> list[JSON]:
        found: list[JSON] = self.api("query", query=expression).get("result", [])
        return found

    def up(self) -> dict[str, str]:
        targets = self.api("targets").get("activeTargets", [])
        return {each["labels"].get("server", each["labels"]["job"]): each["health"] for each in targets}

    def alerts(self, name: str) -> list[tuple[str | None, str]]:
        """Server and state of each alert of the name."""
        found = self.api("alerts")["alerts"]
        return [(each["labels"].get("server"), each["state"]) for each in found if each["labels"]["alertname"] == name]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HfServer]:
    """A server of these tests alone, because they stop it."""
    with HfServer(tmp_path_factory.mktemp("hf") / "log") as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="module")
def loadtest(hf: HfServer, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of Locust's web UI, with an open loop against both servers that goes on until the end."""
    folder, (port,) = tmp_path_factory.mktemp("loadtest"), free_ports(1)
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py"), "--autostart"]
    command += ["--web-port", str(port), "--hf-url", hf.url, "--vllm-url", stack.programs["vllm"].url]
    # Poisson, so that scrapes do not always fall in the same moment of a request.
    command += ["--arrival", "poisson", "--rate", "3", "--output-mean", "30"]
    process = spawn([*command, "--records", str(folder / "records.arrow")], folder / "log", {})
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    end(process, 10)


@pytest.fixture(scope="module")
def prometheus(
    hf: HfServer, stack: Stack, loadtest: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    urls = {name: stack.programs[name].url for name in ("vllm", "monitor")} | {"hf": hf.url, "loadtest": loadtest}
    with started(tmp_path_factory.mktemp("prometheus"), urls) as running:
        yield running


@contextmanager
def started(folder: Path, urls: dict[str, str]) -> Iterator[Prometheus]:
    """A Prometheus that has scraped all these targets once."""
    (port,) = free_ports(1)
    (folder / "prometheus.yml").write_text(configuration(urls))
    command = [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder}/data"]
    process = spawn([*command, f"--web.listen-address=127.0.0.1:{port}"], folder / "log", {})
    running = Prometheus(f"http://127.0.0.1:{port}", urls)
    try:
        until(lambda: get(f"{running.url}/-/ready"), 60, (folder / "log").read_text)
        until(lambda: set(running.up().values()) == {"up"}, 60, lambda: running.api("targets"))
        yield running
    finally:
        process.terminate()
        end(process, 20)


def configuration(urls: dict[str, str]) -> str:
    """What ships, with these targets alone, and faster."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / pattern) for pattern in config["rule_files"]]
    for job in config["scrape_configs"]:
        for entry in job["static_configs"]:
            name = entry.get("labels", {}).get("server", job["job_name"])
            entry["targets"] = [urllib.parse.urlsplit(urls[name]).netloc] if name in urls else []
    return yaml.safe_dump(config)


def test_every_target_is_up_and_none_is_missing(prometheus: Prometheus) -> None:
    assert prometheus.up() == dict.fromkeys(("hf", "vllm", "monitor", "loadtest"), "up")
    alerts = ("HeadroomServerDown", "HeadroomMonitorDown", "HeadroomLoadGeneratorDown", "HeadroomTargetMissing")
    # The last one is pending for a moment, if it was evaluated before the first scrape.
    until(lambda: not any(prometheus.alerts(name) for name in alerts), 10, lambda: prometheus.api("alerts"))


@pytest.mark.parametrize("record", BOTH)
def test_a_recorded_series_has_numbers_of_both_servers(prometheus: Prometheus, record: str) -> None:
    # `==` drops what is not a number: a percentile of nothing. The range, because what is set aside in the KV cache may
    # be nothing at the moment of a scrape.
    numbers = f"count_over_time(({record} == {record})[5m:1s])"

    def servers() -> set[str]:
        return {series["metric"]["server"] for series in prometheus.query(numbers)}

    until(lambda: servers() == {"hf", "vllm"}, 90, lambda: (record, servers(), prometheus.query(record)))


@pytest.mark.parametrize("record", sorted(OF_VLLM))
def test_a_recorded_series_of_vllm_alone_has_numbers(prometheus: Prometheus, record: str) -> None:
    until(lambda: prometheus.query(f"{record} == {record}"), 30, lambda: record)
    assert {series["metric"]["server"] for series in prometheus.query(record)} == {"vllm"}


def test_the_monitors_share_of_a_core_is_recorded(prometheus: Prometheus) -> None:
    (record,) = OF_NO_SERVER
    until(lambda: prometheus.query(f"{record} > 0"), 30, lambda: prometheus.query(record))


@pytest.mark.parametrize("record", sorted(OF_GPUS))
def test_a_recorded_series_of_gpus_is_there_where_there_is_one(prometheus: Prometheus, record: str) -> None:
    assert bool(prometheus.query(record)) == bool(find_gpus()[0])


def test_a_prefix_cache_that_is_off_has_no_share_of_hits(prometheus: Prometheus) -> None:
    (record,) = OF_A_PREFIX_CACHE
    assert prometheus.query(record) == []


def test_every_rule_is_evaluated_without_an_error(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert {(rule["name"], rule["health"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"} == set()


def test_the_size_of_vllms_cache_is_that_of_its_labels(prometheus: Prometheus) -> None:
    (config,) = (series["metric"] for series in prometheus.query("vllm:cache_config_info"))
    (capacity,) = prometheus.query('headroom:kv_capacity_tokens{server="vllm"}')
    assert float(capacity["value"][1]) == (int(config["num_gpu_blocks"]) - 1) * int(config["block_size"])


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("monitor", ()),
        ("loadtest", ()),
        # The prefix is like vLLM's, so that one expression reads both servers.
        ("hf", (r"hf:\w+ metric names should not contain ':'",)),
        # vLLM's text is not ours: whatever promtool finds in its names.
        ("vllm", (r"vllm:\w+ .*",)),
    ],
)
def test_metrics_are_what_prometheus_expects(prometheus: Prometheus, target: str, allowed: tuple[str, ...]) -> None:
    text = get(prometheus.urls[target] + "/metrics")
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    findings = (done.stdout + done.stderr).decode().splitlines()
    assert [finding for finding in findings if not any(re.fullmatch(form, finding) for form in allowed)] == []
    assert text
    assert done.returncode in ((0, 3) if allowed else (0,))  # 3: it is well-formed, and there are findings


def test_a_server_that_stops_is_about_to_alert(prometheus: Prometheus, hf: HfServer) -> None:
    """The last test here, as the others need the server."""
    hf.interrupt()
    until(lambda: prometheus.alerts("HeadroomServerDown"), 60, lambda: prometheus.api("targets"))
    assert prometheus.alerts("HeadroomServerDown") == [("hf", "pending")]


def test_a_spike_that_no_scrape_sees_and_an_error_of_a_gpu_fire_their_alerts(tmp_path: Path) -> None:
    script = Script(tmp_path / "script").add("device", 0, 100).add("memory", 0, 0, 50)
    monitor = MonitorProcess(build(tmp_path), script)
    try:
        soon = script.now() + 1
        for begins in (soon, soon + 0.3, soon + 0.6):  # a machine that stands still for a moment misses one of them
            script.add("memory", begins, 0, 99).add("memory", begins + 0.02, 0, 50)
        script.add("xid", soon, 0, 79).save()
        peak = ("gpu_memory_used_max_bytes", "0")
        monitor.wait(lambda metrics: metrics[peak] == 99 and metrics[("gpu_memory_used_bytes", "0")] == 50)
        with started(tmp_path, {"monitor": monitor.url}) as prometheus:
            alerts = ("HeadroomGpuMemoryNearlyFull", "HeadroomGpuXidError")
            until(lambda: all(map(prometheus.alerts, alerts)), 30, lambda: (prometheus.api("alerts"), monitor.log))
            assert [prometheus.alerts(name) for name in alerts] == [[(None, "firing")]] * 2
            assert {record: prometheus.query(record)[0]["value"][1] for record in sorted(OF_GPUS)} == {
                "headroom:gpu_memory_used:ratio": "0.5",
                "headroom:gpu_memory_used_max:ratio": "0.99",
            }
    finally:
        monitor.end()
