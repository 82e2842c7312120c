"""A run's folder: what is resumed, what is refused, and what is put aside."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiment.analysis.results import load
from experiment.plan.plan import Plan, Target
from experiment.run import parts
from experiment.run.parts import ResumeError
from loadtest.records import Record
from tests.unit.experiment.folders import PART, SECOND, change_json, change_records, make_folder, make_plan, write_kv
from tests.unit.experiment.run.conftest import Serve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts.begin(tmp_path / "run", make_plan())
    return tmp_path / "run"


def make_cell(folder: Path, name: str, *, complete: bool) -> None:
    (folder / "cells" / name).mkdir(parents=True)
    (folder / "cells" / name / "cell.json").write_text(json.dumps({"complete": complete}))


def test_a_run_that_was_stopped_goes_on_with_its_plan(folder: Path) -> None:
    assert parts.read(folder) == (make_plan(), 2)


def test_servers_that_run_already_tell_what_they_are(tmp_path: Path, serve: Serve) -> None:
    vllm, other, silent = serve({"/version": b'{"version": "9.9"}'}), serve({"/version": b"[1]"}), serve({})
    urls = {"hf": silent, "vllm": vllm, "other": other, "gone": "http://127.0.0.1:9"}
    targets = [Target(name=name, kind="url", url=url) for name, url in urls.items()]
    parts.begin(tmp_path / "run", make_plan(targets=targets))
    packages = json.loads((tmp_path / "run" / "environment.json").read_text())["packages"]
    assert {name: value for name, value in packages.items() if "'s" in name} == {"vllm's version": "9.9"}


def test_the_environment_does_not_change_the_plan_of_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_REPEATS", "9")
    assert parts.read(folder)[0].repeats == make_plan().repeats


def test_complete_cells_stay_and_others_are_put_aside(folder: Path) -> None:
    make_cell(folder, "01-hf-c1-r1", complete=True)
    make_cell(folder, "02-vllm-c1-r1", complete=False)
    (folder / "cells" / "03-hf-c1-r2").mkdir()  # killed before it had a cell.json
    parts.resume(folder, make_plan(), 2)
    assert [cell.name for cell in (folder / "cells").iterdir()] == ["01-hf-c1-r1"]
    assert sorted(cell.name for cell in (folder / "set-aside").iterdir()) == ["1-02-vllm-c1-r1", "1-03-hf-c1-r2"]
    make_cell(folder, "02-vllm-c1-r1", complete=False)
    parts.resume(folder, make_plan(), 3)
    assert "2-02-vllm-c1-r1" in [cell.name for cell in (folder / "set-aside").iterdir()]


def test_a_cell_is_put_aside_with_those_that_ran_beside_it(folder: Path) -> None:
    plan = make_plan(together=True)
    for number, (name, complete) in enumerate([("hf", True), ("vllm", True), ("vllm", True), ("hf", False)]):
        make_cell(folder, f"0{number + 1}-{name}-c2-r{number // 2 + 1}", complete=complete)
    parts.resume(folder, plan, 2)
    assert sorted(cell.name for cell in (folder / "cells").iterdir()) == ["01-hf-c2-r1", "02-vllm-c2-r1"]


def test_each_part_says_when_it_began_and_what_was_different(folder: Path) -> None:
    change_json(folder / "environment.json", python="2.7")
    parts.resume(folder, make_plan(), 2)
    environment = json.loads((folder / "environment.json").read_text())
    first, second = environment["parts"]
    assert environment["python"] == "2.7"
    assert "changed" not in first
    assert set(second["changed"]) == {"python"}
    assert first["boot_id"] == second["boot_id"]
    assert parts.read(folder)[1] == 3


def test_a_run_that_came_to_its_end_is_refused(folder: Path) -> None:
    parts.write_status(folder, "complete", None)
    with pytest.raises(ResumeError, match="the run came to its end"):
        parts.read(folder)


def test_a_run_whose_plan_was_changed_is_refused(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps(Plan(seed=2).model_dump()))
    with pytest.raises(ResumeError, match=r"plan\.json is not what the run began with"):
        parts.read(folder)


def test_a_run_that_is_still_running_is_refused(folder: Path) -> None:
    with parts.held(folder), pytest.raises(ResumeError, match="it is still running"):
        parts.read(folder)
    parts.read(folder)


@pytest.mark.parametrize("name", ["plan", "environment", "status"])
@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"concurrency": [1]}'])
def test_what_is_no_run_is_refused_in_one_message(folder: Path, name: str, content: str | None) -> None:
    path = folder / f"{name}.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResumeError) as refused:
        parts.read(folder)
    assert str(folder) in str(refused.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="nowhere"):
        parts.read(tmp_path / "nowhere")


def test_parts_before_and_after_a_new_start_of_the_machine_are_on_one_axis(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    write_kv(folder)
    before = load(folder)
    # The last cell as it would be had the machine been started anew 7 s after the run's clock began.
    moved = -7 * SECOND
    *_, last = sorted((folder / "cells").iterdir())
    cell = before.cells[-1]
    chunks = [one.ns.tolist() for one in cell.requests.chunks()]
    change_json(last / "cell.json", boot_id="b", start_ns=cell.start_ns + moved, end_ns=cell.end_ns + moved)
    change_records(folder, last.name, lambda records: [later(record, moved) for record in records])
    second = {"boot_id": "b", "wall_minus_monotonic_ns": -moved}
    change_json(folder / "environment.json", parts=[PART, PART | second])
    (folder / "kv-2").mkdir()
    (folder / "kv" / f"{cell.target}.arrow").rename(folder / "kv-2" / f"{cell.target}.arrow")
    after = load(folder)
    assert (after.cells[-1].start_ns, after.cells[-1].end_ns) == (cell.start_ns, cell.end_ns)
    for name in ("sent_ns", "end_ns", "first_ns", "last_ns", "scheduled_ns"):
        assert getattr(after.cells[-1].requests, name).tolist() == getattr(cell.requests, name).tolist()
    assert [one.ns.tolist() for one in after.cells[-1].requests.chunks()] == chunks
    old, new = (results.memory.caches[cell.target].time_ns for results in (before, after))
    assert (new - old == -moved).all()


def later(record: Record, ns: int) -> Record:
    stamps = [stamp + ns for stamp in record.chunk_ns]
    return replace(record, sent_ns=record.sent_ns + ns, end_ns=record.end_ns + ns, chunk_ns=stamps)
