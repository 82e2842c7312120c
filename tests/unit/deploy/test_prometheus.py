"""What Prometheus is given: its configuration, the rules, and promtool's tests of them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from experiment.plan.plan import Plan
from experiment.run.compare import LOCUST_PORT
from monitor.collector import METRICS, PEAK_NS
from monitor.nvml import THROTTLING
from monitor.sampler import SECOND

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy/prometheus"
JSON = dict[str, Any]
# Of every series that the monitor exports.
LABELS = {name: labels for name, (_, labels) in METRICS.items()} | {"gpu_info": ("gpu", "uuid", "name", "driver")}


def promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    assert program, "promtool is missing: apt-get install prometheus"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def load(path: Path) -> JSON:
    content: JSON = yaml.safe_load(path.read_text())
    return content


def rules(kind: str) -> list[JSON]:
    """All rules of a kind: alert or record."""
    groups = (group for path in sorted(DEPLOY.glob("rules/*.yml")) for group in load(path)["groups"])
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def cases(kind: str) -> Iterator[JSON]:
    """All of promtool's test cases of a kind: alert_rule_test or promql_expr_test."""
    for path in sorted(DEPLOY.glob("tests/*.yml")):
        for test in load(path)["tests"]:
            yield from test.get(kind, [])


ALERTS = [rule["alert"] for rule in rules("alert")]
RECORDS = sorted({rule["record"] for rule in rules("record")})


def test_promtool_finds_the_configuration_and_its_rules_valid() -> None:
    promtool("check", "config", DEPLOY / "prometheus.yml")


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("rules/*.yml")), ids=lambda path: path.name)
def test_the_rules_pass_promtools_tests(path: Path) -> None:
    promtool("check", "rules", path)
    promtool("test", "rules", DEPLOY / "tests" / path.name)


def test_every_file_of_tests_belongs_to_one_of_rules() -> None:
    assert [path.name for path in sorted(DEPLOY.glob("tests/*"))] == [
        path.name for path in sorted(DEPLOY.glob("rules/*"))
    ]


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_test_that_fires_it_and_one_that_does_not(alert: str) -> None:
    assert {bool(case["exp_alerts"]) for case in cases("alert_rule_test") if case["alertname"] == alert} == {
        True,
        False,
    }


def test_no_test_is_of_an_alert_that_does_not_exist() -> None:
    assert {case["alertname"] for case in cases("alert_rule_test")} == set(ALERTS)


@pytest.mark.parametrize("record", RECORDS)
def test_a_recording_rule_has_a_test_of_its_values(record: str) -> None:
    samples = [sample["labels"] for case in cases("promql_expr_test") for sample in case["exp_samples"]]
    assert any(re.match(rf"{re.escape(record)}($|\{{)", labels) for labels in samples)


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_happened_what_to_do_and_how_bad_it_is(rule: JSON) -> None:
    assert set(rule["annotations"]) == {"summary", "description"}
    assert all(text.strip() for text in rule["annotations"].values())
    assert rule["labels"]["severity"] in ("info", "warning", "critical")


@pytest.mark.parametrize("name", [*ALERTS, *RECORDS])
def test_the_documentation_names_every_rule(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs/prometheus.md").read_text()


def test_the_documentation_names_no_rule_that_does_not_exist() -> None:
    named = re.findall(r"`(headroom:[\w:]+|Headroom[A-Z]\w+)`", (ROOT / "docs/prometheus.md").read_text())
    assert set(named) == {*ALERTS, *RECORDS}


def test_the_documentation_lists_what_the_monitor_exports_with_its_labels_and_nothing_else() -> None:
    text = (ROOT / "docs/prometheus.md").read_text()
    rows = re.findall(r"^\| `headroom_((?:gpu|host|monitor)_\w+)` \|(.*?)\|", text, re.MULTILINE)
    listed = [(name, tuple(re.findall(r"`(\w+)`", labels))) for name, labels in rows]
    assert dict(listed) == LABELS
    assert len(listed) == len(dict(listed))


def test_the_monitor_exports_what_the_rules_and_their_texts_name_under_the_labels_that_they_use() -> None:
    text = "".join(path.read_text() for path in DEPLOY.glob("rules/*.yml"))
    assert set(re.findall(r"headroom_((?:gpu|host|monitor)_\w+)", text)) <= set(LABELS)
    used = re.findall(r"headroom_((?:gpu|host|monitor)_\w+)\{(\w+)[=!]", text)
    assert {name: label for name, label in used if label not in LABELS[name]} == {}
    assert {"gpu_xid_last_timestamp_seconds", "gpu_throttled_seconds_total"} <= {name for name, _ in used}


def test_the_tests_of_the_rules_give_the_monitors_series_the_labels_that_it_gives_them() -> None:
    text = "".join(path.read_text() for path in DEPLOY.glob("tests/*.yml"))
    series = set(re.findall(r"series: '?headroom_((?:gpu|host|monitor)_\w+)(?:\{(.*?)\})?", text))
    wrong = {name: labels for name, labels in series if set(re.findall(r'(\w+)="', labels)) != set(LABELS[name])}
    assert wrong == {}


def test_heat_and_the_power_brake_are_throttling_and_the_power_limit_is_not() -> None:
    throttled, capped = (
        re.search(r'reason=~?"(.*?)"', rule["expr"])
        for rule in rules("alert")
        if rule["alert"] in ("HeadroomGpuThrottled", "HeadroomGpuPowerCapped")
    )
    assert throttled
    assert capped
    held_down = {reason for reason in THROTTLING if re.fullmatch(throttled[1], reason)}
    assert held_down == {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
    assert capped[1] in THROTTLING


def test_the_targets_are_those_of_headroom_up() -> None:
    jobs = {job["job_name"]: job["static_configs"] for job in load(DEPLOY / "prometheus.yml")["scrape_configs"]}
    ports = {
        entry.get("labels", {}).get("server", name): urlsplit(f"//{target}").port
        for name, entries in jobs.items()
        for entry in entries
        for target in entry["targets"]
    }
    plan = Plan.model_construct()
    assert ports == {
        "hf": plan.hf_port,
        "vllm": plan.vllm_port,
        "monitor": plan.monitor_port,
        "loadtest": LOCUST_PORT,
    }


def test_a_spike_stays_in_the_window_maximum_for_two_scrapes() -> None:
    interval = load(DEPLOY / "prometheus.yml")["global"]["scrape_interval"]
    assert 2 * int(interval.removesuffix("s")) * SECOND < PEAK_NS
    # As rarely as the documentation allows.
    assert 2 * 60 * SECOND <= PEAK_NS
