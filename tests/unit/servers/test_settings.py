"""How a command line becomes settings, and how a port becomes a socket."""

import os
import socket
from typing import Any

import pytest
from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from servers.settings import ServerSettings, cpu_cores, fail, listen, parse


class Settings(ServerSettings):
    """Serve."""

    model_config = SettingsConfigDict(env_prefix="HEADROOM_TEST_", cli_prog_name="program")

    port: int = Field(8000, ge=0, le=65535, description="port")

    @model_validator(mode="after")
    def _possible(self) -> "Settings":
        if self.port == 13 and self.model != "random:tiny":
            raise ValueError("--port: 13 is only for random:tiny")
        return self


def test_options_come_from_the_command_line_then_the_environment_then_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADROOM_TEST_MODEL", "gpt2")
    monkeypatch.setenv("HEADROOM_TEST_PORT", "1")
    settings = parse(Settings, "program", ["--port", "2", "--max-model-len", "64"])
    assert (settings.model, settings.port, settings.max_model_len, settings.host) == ("gpt2", 2, 64, "127.0.0.1")


def test_a_variable_that_is_set_to_nothing_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_TEST_KV_BUDGET", "")
    monkeypatch.setenv("HEADROOM_TEST_MODEL", "")
    settings = parse(Settings, "program", [])
    assert (settings.kv_budget, settings.model) == (None, "random:tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "program: --port: '70000': Input should be less than or equal to 65535"),
        (["--max-model-len", "1"], "program: --max-model-len: '1': Input should be greater than or equal to 2"),
        (["--threads", "some"], "program: --threads: 'some': Input should be a valid integer"),
        (["--kv-budget", "0"], "program: --kv-budget: '0': Input should be greater than or equal to 1"),
        (["--kv-budget", "1GiB"], "program: --kv-budget: '1GiB': Input should be a valid integer"),
        (["--dtype", "int8"], "'auto', 'float32', 'bfloat16'"),
        (["--modle", "gpt2"], "--modle"),
    ],
)
def test_a_bad_option_exits_with_2_and_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(Settings, "program", arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_every_bad_option_has_its_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_TEST_THREADS", "0")
    with pytest.raises(SystemExit):
        parse(Settings, "program", ["--port", "-1"])
    lines = sorted(capsys.readouterr().err.splitlines())
    assert [line.rsplit(": ", 1)[0] for line in lines] == ["program: --port: '-1'", "program: --threads: '0'"]


def test_options_that_do_not_go_together_are_one_line_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(Settings, "program", ["--port", "13", "--model", "gpt2"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "program: --port: 13 is only for random:tiny\n"


def test_budget_and_metrics_are_off_unless_asked_for() -> None:
    default = parse(Settings, "program", [])
    assert (default.kv_budget, default.per_request_metrics) == (None, False)
    settings = parse(Settings, "program", ["--kv-budget", "4096", "--per-request-metrics"])
    assert (settings.kv_budget, settings.per_request_metrics) == (4096, True)


def test_help_names_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(Settings, "program", ["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in Settings.model_fields)
    assert "random:tiny" in shown


def test_port_0_listens_on_a_free_port() -> None:
    with listen("127.0.0.1", 0) as one, listen("127.0.0.1", 0) as other:
        ports = {one.getsockname()[1], other.getsockname()[1]}
        assert len(ports) == 2
        with socket.create_connection(one.getsockname(), timeout=5):
            pass


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="address already in use; choose another port") as refused:
            listen("127.0.0.1", port)
    assert str(refused.value).startswith(f"--port: {port}: cannot listen on 127.0.0.1:{port}: ")


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:0: cannot assign requested address"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("cores", "threads", "expected"),
    [
        ({0, 1, 2, 3}, None, [0, 1, 2]),
        ({5, 3}, None, [3]),
        ({7}, None, [7]),
        ({0, 1, 2, 3}, 2, [0, 1]),
        ({0, 1}, 9, [0, 1]),
    ],
)
def test_the_model_gets_all_cores_but_one_unless_told(
    cores: set[int], threads: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sched_getaffinity(_: int) -> set[int]:
        return cores

    monkeypatch.setattr(os, "sched_getaffinity", sched_getaffinity)
    assert cpu_cores(threads) == expected


def test_a_failure_is_one_line_and_an_exit_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    message: Any = OSError("no room")
    assert fail("program", message).code == 1
    assert capsys.readouterr().err == "program: no room\n"
