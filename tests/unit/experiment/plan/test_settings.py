"""Where a plan comes from, and what wins: command line, environment, plan.yaml, preset."""

import json
from pathlib import Path

import pytest

from experiment.plan.plan import Plan
from experiment.plan.settings import PlanError, presets, read_plan


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return tmp_path / "plan.yaml"


def test_what_help_says_of_defaults_is_what_preset_quick_runs() -> None:
    assert read_plan([]) == read_plan(["--preset", "quick"]) == Plan()


@pytest.mark.parametrize("name", ["gate", "ladder", "paper", "quick", "same-memory"])
def test_every_preset_is_a_plan(name: str) -> None:
    assert name in presets()
    assert list(read_plan(["--preset", name]).cells())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--duration-seconds", "600"],
            "duration_seconds: 600: is not read by arrival closed; expected arrival poisson",
        ),
        (
            ["--preset", "paper", "--min-seconds", "3"],
            "min_seconds: 3: is not read by arrival poisson; expected arrival",
        ),
        (
            ["--workload", "alpaca", "--sigma", "1"],
            "sigma: 1: is not read by workload alpaca; expected workload lognormal",
        ),
    ],
)
def test_a_key_that_would_change_nothing_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        read_plan(given)


def test_the_plan_of_another_run_has_all_keys(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(Plan(duration_seconds=7).model_dump_json())
    assert read_plan([str(file)]).duration_seconds == 7


def test_the_nearest_source_wins(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_file.write_text("preset: paper\nrepeats: 7\nseed: 7\nattainment: 0.7\n")
    monkeypatch.setenv("HEADROOM_REPEATS", "8")
    monkeypatch.setenv("HEADROOM_SEED", "8")
    plan = read_plan([str(plan_file), "--repeats", "9"])
    assert (plan.repeats, plan.seed, plan.attainment, plan.workload) == (9, 8, 0.7, "sharegpt")


def test_a_preset_on_the_command_line_goes_before_that_of_the_file(plan_file: Path) -> None:
    plan_file.write_text("preset: paper\nseed: 7\n")
    plan = read_plan([str(plan_file), "--preset", "ladder"])
    assert (plan.arrival, len(plan.targets), plan.seed) == ("closed", 5, 7)


def test_the_plan_of_another_run_is_a_plan_file(tmp_path: Path) -> None:
    plan = Plan(arrival="poisson", levels=[0.5, 3], limits={"ttft_seconds": 1}, hf_args="--one 'a b'", seed=5)
    (tmp_path / "plan.json").write_text(json.dumps(plan.model_dump()))
    assert read_plan([str(tmp_path / "plan.json")]) == plan


def test_limits_can_be_given_as_options() -> None:
    plan = read_plan(["--limits", "ttft_seconds=0.2,tpot_seconds=0.05"])
    assert plan.limits == {"ttft_seconds": 0.2, "tpot_seconds": 0.05}


def test_the_environment_sets_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_CONCURRENCY", "[2, 8]")
    monkeypatch.setenv("HEADROOM_MODEL", "random:other")
    plan = read_plan([])
    assert (plan.levels, plan.model) == ([2, 8], "random:other")


def test_servers_that_run_already_are_used_and_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hf", "vllm", "monitor"):
        monkeypatch.setenv(f"HEADROOM_{name.upper()}_URL", f"http://{name}:80")
    plan = read_plan([])
    assert [(target.name, target.url) for target in plan.targets] == [
        ("hf", "http://hf:80"),
        ("vllm", "http://vllm:80"),
    ]
    assert plan.monitor_url == "http://monitor:80"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "ladder", "--hf-url", "http://a"], "expected one target of kind hf, the plan has 4"),
        (["--hf-url", "http://a", "--hf-args=--x"], "takes no args"),
        (["--preset", "paper", "--concurrency", "4"], "concurrency: [4]: expected levels, as arrival is poisson"),
        (["--preset", "slow"], "preset: 'slow': expected one of gate, ladder, paper, quick, same-memory"),
        (["nowhere.yaml"], "plan: 'nowhere.yaml': no such file or directory"),
    ],
)
def test_what_cannot_be_is_refused_and_says_what_can(arguments: list[str], message: str) -> None:
    with pytest.raises(PlanError) as refused:
        read_plan(arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- 1", "got list"), ("", "got NoneType")])
def test_a_file_that_is_no_plan_is_named(plan_file: Path, text: str, message: str) -> None:
    plan_file.write_text(text)
    with pytest.raises(PlanError) as refused:
        read_plan([str(plan_file)])
    assert str(plan_file) in str(refused.value)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
