"""The command line: exit codes, and one line on stderr for everything that is wrong with what was given."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from experiment import cli
from experiment.plan.plan import Plan
from loadtest.records import read, to_bytes
from tests.unit.experiment.folders import change_records, make_folder, make_plan

Headroom = Callable[..., tuple[int, str, str]]
CELL = "cells/01-hf-c1-r1"


@pytest.fixture
def headroom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Headroom]:
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headroom", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "run", make_plan(concurrency=[1], repeats=1))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that were handed on; nothing runs."""
    handed_on: list[Plan] = []

    def take(plan: Plan, _: object) -> int:
        handed_on.append(plan)
        return 7

    monkeypatch.setattr(cli, "compare", take)
    monkeypatch.setattr(cli, "up", take)
    return handed_on


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(headroom: Headroom, arguments: tuple[str, ...]) -> None:
    code, out, err = headroom(*arguments)
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in ("compare", "up", "report", "doctor"))


def test_an_unknown_command_is_named_beside_the_known(headroom: Headroom) -> None:
    code, _, err = headroom("compere")
    assert code == 2
    known = "compare, up, report, diff, list, gate, classic, calibrate, doctor"
    assert err == f"headroom: 'compere': unknown command; known: {known}\n"


@pytest.mark.parametrize("command", ["compare", "up"])
def test_a_command_gets_the_plan_and_its_exit_code_is_passed_on(
    headroom: Headroom, plans: list[Plan], command: str
) -> None:
    code, _, _ = headroom(command, "--concurrency", "1,4", "--hf-port", "9000")
    assert code == 7
    assert (plans[0].levels, plans[0].hf_port) == ([1, 4], 9000)


def test_ctrl_c_ends_with_130(headroom: Headroom, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compare", interrupt)
    code, _, err = headroom("compare")
    assert (code, err) == (130, "headroom: interrupted\n")


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--concurrency", "0", "concurrency.0"),
        ("--concurrency", "4,4", "levels"),
        ("--concurrency", "abc", "concurrency.0"),
        ("--levels", "-1", "levels.0"),
        ("--hf-args", 'one "two', "hf_args"),
        ("--vllm-args", "it's", "vllm_args"),
        ("--hf-port", "70000", "hf_port"),
        ("--workload", "other", "workload"),
        ("--preset", "other", "preset"),
        ("--hf-url", "there", "hf_url"),
    ],
)
def test_a_bad_value_ends_with_2_and_one_line_that_names_key_and_value(
    headroom: Headroom, plans: list[Plan], option: str, value: str, key: str
) -> None:
    code, _, err = headroom("compare", f"{option}={value}")
    assert (code, plans) == (2, [])
    assert err.count("\n") == 1
    assert err.startswith(f"headroom: {key}: ")
    assert value.split(",")[0] in err


@pytest.mark.parametrize(
    ("variable", "value"), [("CONCURRENCY", "abc"), ("CONCURRENCY", "[0]"), ("HF_PORT", "many"), ("HF_ARGS", "'")]
)
def test_a_bad_variable_ends_with_2_and_one_line(
    headroom: Headroom, plans: list[Plan], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(f"HEADROOM_{variable}", value)
    code, _, err = headroom("compare")
    assert (code, plans) == (2, [])
    assert err.startswith("headroom: ")
    assert err.count("\n") == 1
    assert variable.lower().replace("_", "-") in err.replace("_", "-").lower()


def test_each_bad_key_of_a_plan_has_a_line(headroom: Headroom, plans: list[Plan], tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("targets: [{name: a, kind: hf}, {name: b, kind: tgi}]\nlevls: [1]\nrepeats: 0\n")
    code, _, err = headroom("compare", str(file))
    assert (code, plans) == (2, [])
    assert err.splitlines() == [
        "headroom: targets.1.kind: 'tgi': Input should be 'hf', 'vllm' or 'url'",
        "headroom: repeats: 0: Input should be greater than or equal to 1",
        "headroom: levls: [1]: unknown key; expected levels?",
    ]


@pytest.mark.parametrize("others", [["plan.yaml"], ["--repeats", "2"]])
def test_resume_takes_no_other_option(headroom: Headroom, folder: Path, others: list[str]) -> None:
    code, _, err = headroom("compare", "--resume", str(folder), *others)
    assert code == 2
    assert err == f"headroom: --resume: takes no other option, as the plan is that of the run; got {others[0]!r}\n"


@pytest.mark.parametrize("command", ["up", "classic"])
def test_nothing_but_compare_resumes(headroom: Headroom, folder: Path, command: str) -> None:
    code, _, err = headroom(command, "--resume", str(folder))
    assert code == 2
    assert err == f"headroom: resume: {str(folder)!r}: expected headroom compare --resume DIR and nothing else\n"


def test_a_run_that_came_to_its_end_is_not_resumed(headroom: Headroom, folder: Path) -> None:
    code, _, err = headroom("compare", "--resume", str(folder))
    assert code == 2
    assert err == f"headroom: resume: {str(folder)!r}: the run came to its end; expected one that did not\n"


def test_an_unknown_option_ends_with_2(headroom: Headroom, plans: list[Plan]) -> None:
    code, _, err = headroom("compare", "--nonsense", "1")
    assert (code, plans) == (2, [])
    assert "nonsense" in err


@pytest.mark.parametrize("arguments", [("report",), ("report", "a", "b"), ("doctor", "now")])
def test_a_wrong_number_of_arguments_ends_with_2_and_one_line(headroom: Headroom, arguments: tuple[str, ...]) -> None:
    code, _, err = headroom(*arguments)
    assert code == 2
    assert err.startswith(f"headroom: {arguments[0]}: ")
    assert err.count("\n") == 1


def test_a_report_is_written_beside_the_records(headroom: Headroom, folder: Path) -> None:
    code, out, err = headroom("report", str(folder))
    assert (code, err) == (0, "")
    assert out.startswith("At concurrency 1 vLLM made 2.00 times ")
    assert f"The report is at {folder / 'report.html'}" in out
    assert {"report.html", "summary.json", "records.parquet"} <= {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("no_charts")
def test_a_report_can_be_written_again(headroom: Headroom, folder: Path) -> None:
    headroom("report", str(folder))
    first = (folder / "summary.json").read_bytes()
    code, _, _ = headroom("report", str(folder))
    assert (code, (folder / "summary.json").read_bytes()) == (0, first)


def damage(name: str, content: bytes | None) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    return do


def null_sent_ns(folder: Path) -> None:
    nothing: Any = None
    change_records(folder, CELL.split("/")[1], lambda records: [replace(records[0], sent_ns=nothing), *records[1:]])


DAMAGE = {
    "no plan": damage("plan.json", None),
    "no environment": damage("environment.json", None),
    "no status": damage("status.json", None),
    "plan is a list": damage("plan.json", b"[]"),
    "plan is empty": damage("plan.json", b""),
    "plan says nothing": damage("plan.json", b"{}"),
    "plan is null": damage("plan.json", b"null"),
    "plan is not UTF-8": damage("plan.json", b"\xff\xfe{}"),
    "status says nothing": damage("status.json", b"{}"),
    "status is a number": damage("status.json", b"3"),
    "environment says nothing": damage("environment.json", b"{}"),
    "environment is a list": damage("environment.json", b"[]"),
    "timeline is empty": damage("timeline/1.arrow", b""),
    "timeline is cut": damage("timeline/1.arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00"),
    "cell says nothing": damage(f"{CELL}/cell.json", b"{}"),
    "cell is a list": damage(f"{CELL}/cell.json", b"[]"),
    "client says nothing": damage(f"{CELL}/client.json", b'{"other": 1}'),
    "client is not JSON": damage(f"{CELL}/client.json", b"{"),
    "records are lines of text": damage(f"{CELL}/records.arrow", b"{}\n"),
    "records have other columns": damage(f"{CELL}/records.arrow", bytes(pa.schema([("x", pa.int8())]).serialize())),
    "a record was never sent": null_sent_ns,
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.usefixtures("no_charts")
def test_a_damaged_folder_ends_with_2_and_one_line_that_names_it(
    headroom: Headroom, folder: Path, harm: Callable[[Path], None]
) -> None:
    harm(folder)
    code, out, err = headroom("report", str(folder))
    assert (code, out) == (2, "")
    assert err.startswith("headroom: ")
    assert err.count("\n") == 1
    assert str(folder) in err
    assert not (folder / "report.html").exists()


def test_a_file_in_place_of_a_folder_ends_with_2_and_one_line(headroom: Headroom, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    code, _, err = headroom("report", str(path))
    assert code == 2
    assert str(path) in err
    assert err.count("\n") == 1


def test_a_folder_that_is_not_there_ends_with_2_and_one_line(headroom: Headroom, tmp_path: Path) -> None:
    code, _, err = headroom("report", str(tmp_path / "nowhere"))
    assert code == 2
    assert str(tmp_path / "nowhere") in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_charts")
def test_a_last_batch_that_a_kill_cut_short_is_no_damage(headroom: Headroom, folder: Path) -> None:
    path = folder / CELL / "records.arrow"
    path.write_bytes(path.read_bytes() + to_bytes(read(path))[:-9])
    assert headroom("report", str(folder))[0] == 0


@pytest.mark.usefixtures("no_charts")
def test_a_run_in_which_every_request_failed_gets_a_report(headroom: Headroom, folder: Path) -> None:
    for cell in (folder / "cells").iterdir():
        change_records(folder, cell.name, lambda records: [replace(record, error="reset") for record in records])
    code, out, err = headroom("report", str(folder))
    assert (code, err) == (0, "")
    assert out.startswith("Not valid: no comparison")


@pytest.mark.usefixtures("no_charts")
def test_a_cell_without_records_gets_a_report(headroom: Headroom, folder: Path) -> None:
    change_records(folder, "01-hf-c1-r1", lambda _: [])
    assert headroom("report", str(folder))[0] == 0


def test_the_command_that_is_installed_is_this_one() -> None:
    (command,) = entry_points(group="console_scripts", name="headroom")
    assert command.load() is cli.main
