"""`docker compose up` on this machine, whatever it has: healthy, wired, with data, and back after what is killed.

In this order: what a test kills or scales the next one has back.
"""

import json
import re
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from experiment.run.stack import get
from loadtest.records import Record, read
from tests.system.compose import ROOT, Compose, service_of, until

START_SECONDS, RECOVERY_SECONDS = 300, 120
# Enough that most scrapes find a request under way, and less than the slowest server can do.
LOAD = {"rate": 2, "output_mean": 60}
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
QUERIES = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{path.stem}: {panel['title']}: {target['refId']}")
    for path in DASHBOARDS
    for panel in json.loads(path.read_text())["panels"]
    for target in panel.get("targets", [])
]
# The HF server has it of a GPU alone, which the fake one is not to torch.
OF_TORCH_ON_A_GPU = "hf:torch_"


def start(stack: Compose, **options: Any) -> None:
    """Start a run as the form of the web UI does; a worker that lost its master takes a minute to look for it anew."""
    stats = f"{stack.url('locust')}/stats/requests"
    until(lambda: httpx.get(stats, timeout=10).json()["workers"], 100, lambda: "no worker")
    # The form keeps what it was given last.
    usual = {"requests": 0, "endpoint": "completions", "tokenizer": ""}
    form = {"user_count": 8, "spawn_rate": 8, **usual, **options}
    answer = httpx.post(f"{stack.url('locust')}/swarm", data=form, timeout=20).json()
    assert answer["success"], answer


def stop(stack: Compose) -> None:
    httpx.post(f"{stack.url('locust')}/stop", timeout=30).raise_for_status()
    until(lambda: not numbers(stack)["running"], 30, lambda: numbers(stack))


def numbers(stack: Compose) -> dict[str, Any]:
    """What the page "Servers" shows."""
    found: dict[str, Any] = httpx.get(f"{stack.url('locust')}/servers.json", timeout=10).json()
    return found


def latest_run(stack: Compose) -> Path:
    """Folder of the latest run that has records; if there is none, a path that is not there."""
    return max((stack.folder / "results").glob("*-locust/records.arrow"), default=stack.folder / "none" / "yet").parent


def is_over(client: Path) -> bool:
    """Whether a run has closed its files."""
    return client.exists() and bool(json.loads(client.read_text())["run"]["ended"])


def records_of(stack: Compose) -> list[Record]:
    """Those of the latest run that are on the disk of the host."""
    return list(read(latest_run(stack) / "records.arrow"))


def keys(stack: Compose) -> set[tuple[str, int]]:
    """Target and place of each request of the latest run that has a record: no two of the same."""
    found = [(record.target, record.index) for record in records_of(stack)]
    assert len(set(found)) == len(found)
    return set(found)


def kill_and_wait(stack: Compose, service: str) -> None:
    """Kill a container of the service and wait until it is back and all are healthy."""
    workers = len(stack.health()["locust-worker"])
    victim = next(each for each in stack.containers() if service_of(each) == service)
    stack.kill(victim)

    def is_back() -> bool:
        restarts = {each["Id"]: each["RestartCount"] for each in stack.containers()}
        return restarts.get(victim["Id"], 0) > victim["RestartCount"] and stack.is_healthy(workers)

    until(is_back, RECOVERY_SECONDS, lambda: (stack.health(), stack.run("logs", "--tail", "20", service)))


@pytest.fixture
def run_that_goes_on(stack: Compose) -> None:
    if numbers(stack)["running"]:
        return
    before = latest_run(stack)
    start(stack, arrival="poisson", **LOAD)
    until(lambda: latest_run(stack) != before, 20, lambda: before)
    until(lambda: {target for target, _ in keys(stack)} == {"hf", "vllm"}, 60, lambda: numbers(stack))


@pytest.fixture(scope="module")
def gpu_in_use(stack: Compose) -> None:
    if stack.fake_gpu:
        stack.use_fake_gpu()


def test_all_services_are_healthy_in_time(stack: Compose) -> None:
    if stack.left_out:
        warnings.warn(f"left out, because its image is not on this machine: {stack.left_out}", stacklevel=1)
    assert set(stack.left_out) <= {"grafana"}
    assert stack.is_healthy(), stack.health()
    assert stack.seconds_to_start < START_SECONDS


def test_ports_are_bound_to_loopback(stack: Compose) -> None:
    published = [
        binding["HostIp"]
        for container in stack.containers()
        for bindings in container["NetworkSettings"]["Ports"].values()
        for binding in bindings or []
    ]
    assert Counter(published) == {"127.0.0.1": len(stack.services) - 1}  # a worker has none


def test_only_the_monitor_runs_as_root_and_none_can_write_outside_its_volumes(stack: Compose) -> None:
    for container in stack.containers():
        host, service = container["HostConfig"], service_of(container)
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert host["Memory"] > 0, service
        users = stack.users(container)
        assert ("0" in users) == (service == "monitor"), (service, users)
        if service.startswith("locust"):
            assert users == {str((stack.folder / "results").stat().st_uid)}


def test_a_run_from_the_web_ui_shows_both_servers(stack: Compose, page: Page) -> None:
    page.goto(stack.url("locust"))
    page.get_by_text("Custom parameters").click()
    page.get_by_label(re.compile("^Arrival")).select_option("poisson")
    page.get_by_label(re.compile("^Rate")).fill(str(LOAD["rate"]))
    page.get_by_label(re.compile("^Output Mean")).fill(str(LOAD["output_mean"]))
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("link", name="Servers: live charts").click()
    for server in ("hf", "vllm"):
        name = re.compile(rf"Time to first token.*, {server}:.*p50 .*\d")
        expect(page.get_by_role("img", name=name)).to_be_visible(timeout=60_000)
    report = httpx.get(f"{stack.url('locust')}/stats/report", timeout=20).text
    assert all(f'"name": "{server}"' in report for server in ("hf", "vllm"))


@pytest.mark.usefixtures("run_that_goes_on")
def test_prometheus_has_every_target_and_no_rule_fails(stack: Compose) -> None:
    def up() -> dict[str, str]:
        found = stack.query("up")
        return {each["metric"].get("server", each["metric"]["job"]): each["value"][1] for each in found}

    wanted = dict.fromkeys(("hf", "vllm", "monitor", "loadtest", "prometheus"), "1")
    until(lambda: up() == wanted, 60, up)
    groups = json.loads(get(stack.url("prometheus") + "/api/v1/rules") or b"{}")["data"]["groups"]
    assert [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "err"] == []


@pytest.mark.usefixtures("run_that_goes_on")
def test_the_monitor_sees_the_processes_of_both_servers_in_their_containers(stack: Compose) -> None:
    def known(metric: str) -> set[str]:
        return {each["metric"]["server"] for each in stack.query(f"{metric} > 1e8")}

    # PSS and open files need more rights than RSS.
    until(lambda: known("headroom_host_rss_bytes") == {"hf", "vllm"}, 30, lambda: known("headroom_host_rss_bytes"))
    until(lambda: known("headroom_host_pss_bytes") == {"hf", "vllm"}, 30, lambda: known("headroom_host_pss_bytes"))
    assert {each["metric"]["server"] for each in stack.query("headroom_host_open_files > 0")} == {"hf", "vllm"}


@pytest.mark.usefixtures("run_that_goes_on", "gpu_in_use")
@pytest.mark.parametrize(("expression", "legend"), QUERIES)
def test_a_panel_of_a_dashboard_has_numbers(stack: Compose, expression: str, legend: str) -> None:
    if OF_TORCH_ON_A_GPU in expression and stack.fake_gpu:
        pytest.skip("torch has no GPU")
    # `==` drops what is not a number: a percentile of nothing.
    counted = f"count_over_time((({expression}) == ({expression}))[10m:5s])"
    until(lambda: stack.query(counted), 90, lambda: (expression, stack.query(expression)))
    labels = {label for series in stack.query(counted) for label in series["metric"]}
    assert set(re.findall(r"{{(\w+)}}", legend)) <= labels


def test_grafana_has_the_dashboards_for_who_has_no_login(stack: Compose) -> None:
    if "grafana" in stack.left_out:
        pytest.skip("the image of Grafana is not on this machine")
    found = httpx.get(f"{stack.url('grafana')}/api/search", params={"tag": "headroom"}, timeout=10).json()
    assert {each["title"] for each in found} == {json.loads(path.read_text())["title"] for path in DASHBOARDS}
    body = {
        "queries": [{"refId": "A", "expr": "up", "datasource": {"uid": "prometheus", "type": "prometheus"}}],
        "from": "now-5m",
        "to": "now",
    }
    answer = httpx.post(f"{stack.url('grafana')}/api/ds/query", json=body, timeout=10).json()
    assert answer["results"]["A"]["frames"], answer
    refused = httpx.post(f"{stack.url('grafana')}/api/dashboards/db", json={"dashboard": {"title": "x"}}, timeout=10)
    assert refused.status_code in (401, 403)


def test_four_workers_send_every_request_exactly_once(stack: Compose) -> None:
    stop(stack)
    workers = 4
    stack.run("up", "--detach", "--wait", "--no-build", "--scale", f"locust-worker={workers}", seconds=200)
    assert stack.is_healthy(workers), stack.health()
    before, count = latest_run(stack), 60
    start(stack, arrival="poisson", rate=6, requests=count, output_mean=10)
    until(lambda: not numbers(stack)["running"], 120, lambda: numbers(stack))
    folder = latest_run(stack)
    assert folder != before
    until(lambda: is_over(folder / "client.json"), 30, lambda: stack.run("logs", "--tail", "20", "locust"))
    records = records_of(stack)
    sent = Counter((record.target, record.index) for record in records)
    assert sent == Counter((target, index) for target in ("hf", "vllm") for index in range(count))
    assert {record.error for record in records} == {None}
    client = json.loads((folder / "client.json").read_text())
    assert client["complete"], client["reasons"]
    assert len(client["processes"]) == workers
    assert {record.worker for record in records} == set(range(workers))
    # Each worker is in the master's metrics under its own name.
    process = "count(headroom_loadtest_client_cpu_ratio{process=~'worker.*'})"
    until(lambda: stack.query(f"{process} == {workers}"), 30, lambda: stack.query("headroom_loadtest_client_cpu_ratio"))


def test_chats_have_the_tokenizer_of_the_servers_model(stack: Compose) -> None:
    stop(stack)
    model = stack.run("exec", "hf", "sh", "-c", "dirname /cache/headroom/*/tokenizer.json").strip()
    before = latest_run(stack)
    start(stack, endpoint="chat", tokenizer=model, arrival="poisson", rate=6, requests=10, output_mean=10)
    until(lambda: not numbers(stack)["running"], 60, lambda: numbers(stack))
    assert latest_run(stack) != before
    records = records_of(stack)
    assert Counter(record.target for record in records) == {"hf": 10, "vllm": 10}
    assert {record.error for record in records} == {None}
    # The template of a chat takes the same few tokens on top of each prompt's own.
    counts = {target: [each.prompt_tokens for each in records if each.target == target] for target in ("hf", "vllm")}
    assert sorted(map(int, filter(None, counts["hf"]))) == sorted(map(int, filter(None, counts["vllm"])))


@pytest.mark.usefixtures("run_that_goes_on")
@pytest.mark.parametrize("service", ["monitor", "prometheus", "grafana"])
def test_what_watches_comes_back_when_it_is_killed(stack: Compose, service: str) -> None:
    if service in stack.left_out:
        pytest.skip(f"the image of {service} is not on this machine")
    kill_and_wait(stack, service)


@pytest.mark.usefixtures("run_that_goes_on")
@pytest.mark.parametrize("service", ["hf", "vllm"])
def test_a_server_that_is_killed_under_load_comes_back_and_its_failures_are_records(
    stack: Compose, service: str
) -> None:
    since = time.monotonic_ns()
    kill_and_wait(stack, service)

    def targets(failed: bool, sent_after: int) -> set[str]:
        return {each.target for each in records_of(stack) if each.sent_ns > sent_after and bool(each.error) == failed}

    assert targets(failed=True, sent_after=since) == {service}
    back = time.monotonic_ns()
    until(lambda: targets(failed=False, sent_after=back) == {"hf", "vllm"}, 60, lambda: numbers(stack))


@pytest.mark.usefixtures("run_that_goes_on")
def test_a_killed_worker_is_named_and_what_it_had_ended_is_kept(stack: Compose) -> None:
    ended = keys(stack)
    kill_and_wait(stack, "locust-worker")
    stop(stack)
    summary = latest_run(stack) / "client.json"
    until(lambda: is_over(summary), 30, lambda: stack.run("logs", "--tail", "20", "locust"))
    said = json.loads(summary.read_text())
    assert len(said["lost_workers"]) == 1
    assert not said["valid"]
    assert not said["complete"]
    assert any("lost_workers" in reason for reason in said["reasons"])
    assert numbers(stack)["judgement"] == {name: said[name] for name in ("complete", "valid", "reasons")}
    assert keys(stack) >= ended


@pytest.mark.usefixtures("run_that_goes_on")
def test_a_killed_master_loses_no_record_that_it_had_and_its_workers_find_it_again(stack: Compose) -> None:
    run, ended = latest_run(stack), keys(stack)
    kill_and_wait(stack, "locust")
    assert latest_run(stack) == run
    assert keys(stack) >= ended
    assert not is_over(run / "client.json")
    assert json.loads((run / "client.json").read_text())["complete"] is False
    start(stack, arrival="poisson", rate=6, requests=10, output_mean=10)
    until(lambda: not numbers(stack)["running"], 60, lambda: numbers(stack))
    assert latest_run(stack) != run
    assert len(keys(stack)) == 20


def test_all_of_it_goes_when_it_is_taken_down(stack: Compose) -> None:
    stack.run("down", "--volumes", seconds=120)
    assert stack.containers() == []
    assert get(stack.url("hf") + "/health") is None
