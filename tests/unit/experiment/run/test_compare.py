"""A comparison that cannot start says why in one line, and starts nothing."""

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiment.plan.plan import Plan
from experiment.run import compare as module
from experiment.run.compare import compare, up
from experiment.run.stack import RunError, Stack
from tests.unit.experiment.folders import make_plan


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def free_ports() -> dict[str, Any]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return dict(zip(("hf_port", "vllm_port", "monitor_port"), ports, strict=True))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("headroom: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RunError("the programs were started")

    monkeypatch.setattr(Stack, "start", refuse)


@pytest.mark.parametrize("command", [compare, up])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_place_of_the_folder_fails_with_one_line_that_names_it(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str], command: Any, below: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "LOCUST_PORT", free_ports()["hf_port"])
    (tmp_path / "out").write_text("mine")
    plan = make_plan(out=str(tmp_path / "out" / below), **free_ports())
    assert command(plan, console) == 1
    assert str(tmp_path / "out") in one_line(capsys)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("command", [compare, up])
@pytest.mark.parametrize("option", ["hf_port", "vllm_port", "monitor_port"])
def test_a_taken_port_fails_with_one_line_that_names_option_and_port(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str], command: Any, option: str, taken: int
) -> None:
    plan = make_plan(out=str(tmp_path / "out"), **free_ports() | {option: taken})
    assert command(plan, console) == 1
    said = one_line(capsys)
    assert str(taken) in said
    assert "--" + option.replace("_", "-") in said
    assert not (tmp_path / "out").exists()


def run_folder(plan: Plan) -> Path:
    (folder,) = Path(plan.out).iterdir()
    return folder


def test_a_start_that_fails_leaves_a_folder_that_says_why(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(out=str(tmp_path / "out"), **free_ports())
    assert compare(plan, console) == 1
    assert "the programs were started" in one_line(capsys)
    status = (run_folder(plan) / "status.json").read_text()
    assert "partial" in status
    assert "the programs were started" in status
    assert Plan.model_validate_json((run_folder(plan) / "plan.json").read_text()) == plan


def test_ctrl_c_ends_a_comparison_with_130(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stack, "start", interrupt)
    plan = make_plan(out=str(tmp_path / "out"), **free_ports())
    assert compare(plan, console) == 130
    assert "interrupted" in one_line(capsys)
    assert "interrupted" in (run_folder(plan) / "status.json").read_text()


def test_a_run_that_was_stopped_goes_on_in_its_folder(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(out=str(tmp_path / "out"), **free_ports())
    assert compare(plan, console) == 1
    capsys.readouterr()
    assert module.resume(run_folder(plan), console) == 1
    assert "the programs were started" in one_line(capsys)
    assert len(json.loads((run_folder(plan) / "environment.json").read_text())["parts"]) == 2


def test_a_run_cannot_go_on_where_its_ports_are_taken(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(out=str(tmp_path / "out"), **free_ports())
    compare(plan, console)
    capsys.readouterr()
    with socket.create_server(("127.0.0.1", plan.hf_port)):
        assert module.resume(run_folder(plan), console) == 1
    assert "--hf-port" in one_line(capsys)
    assert len(json.loads((run_folder(plan) / "environment.json").read_text())["parts"]) == 1


def test_all_servers_cannot_be_up_where_one_is_to_be(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    assert up(make_plan(resident="one", max_model_len=64), console) == 1
    assert "--resident: one: expected all" in one_line(capsys)
