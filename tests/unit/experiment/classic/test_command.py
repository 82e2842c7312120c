"""The classic experiment: nothing is said that its own figures do not show, in either language."""

import json
import string
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiment import doctor
from experiment.classic.client import Answer, ask_at_once
from experiment.classic.command import INPUTS, Show, classic
from experiment.classic.findings import Finding, Served, find, total_seconds
from experiment.classic.memory import Reading, read
from experiment.classic.words import LANGUAGES, TEXTS, amount, say
from experiment.plan.plan import Plan
from experiment.run.stack import RunError, Stack
from loadtest.work.workloads import CLASSIC_PROMPTS
from tests.unit.experiment.folders import kv_row, kv_table, make_plan, paged_row, write_timeline

SECOND = 10**9
LENGTHS = (5, 34, 410, 6)
POOL = Reading(1, None, 1000, 4096, 0, 0, "bytes", 3, 16, 1024)


def answers(seconds: Sequence[float], *, at_once: bool = False, tokens: int = 50) -> list[Answer]:
    sent, found = 0, []
    for prompt, took in zip(LENGTHS, seconds, strict=True):
        last = sent + round(took * SECOND)
        found.append(Answer(sent, sent + 1, last, prompt, tokens, 200))
        sent = sent if at_once else last + SECOND
    return found


def served(seconds: Sequence[float], at_once: Sequence[float] = (), kv: Sequence[int | None] = (1, 2, 3, 1)) -> Served:
    readings = [replace(POOL, allocated=one, last=0) for one in kv]
    together = answers(at_once, at_once=True) if at_once else []
    busiest = replace(POOL, allocated=64) if at_once else None
    return Served(POOL, answers(seconds), readings, POOL, together, busiest)


def keys(hf: Served, vllm: Served) -> dict[str, Finding]:
    return {one.key: one for one in find(hf, vllm, 512)}


times = st.lists(st.floats(0.01, 100), min_size=4, max_size=4)


@given(times, times, times)
def test_who_was_faster_is_what_the_times_say(hf: list[float], single: list[float], together: list[float]) -> None:
    found = keys(served(hf), served(single, together))
    total = [total_seconds(answers(hf), at_once=False), max(round(one * SECOND) / SECOND for one in together)]
    assert ("faster" in found) == (total[1] < total[0])
    assert ("slower" in found) == (total[1] >= total[0])
    split = found["split"].figures
    assert split["batching"] * split["engine"] == pytest.approx(total[0] / total[1])


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=4, max_size=4))
def test_growth_is_said_only_where_the_samples_show_it(kv: list[int | None]) -> None:
    found = keys(served([1, 1, 1, 1], kv=kv), served([1] * 4, [1] * 4))
    shortest, longest = kv[0], kv[2]
    expected = "kv_hf_unseen"
    if shortest and longest:
        expected = "kv_hf_grows" if longest > shortest else "kv_hf_does_not_grow"
    assert {key for key in found if key.startswith("kv_hf") and key != "kv_hf_given_back"} == {expected}


def test_what_is_left_after_an_input_is_not_called_given_back() -> None:
    hf = served([1] * 4)
    assert "kv_hf_given_back" in keys(hf, served([1] * 4, [1] * 4))
    left = replace(hf, readings=[*hf.readings[:3], replace(hf.readings[3], last=1)])
    assert "kv_hf_given_back" not in keys(left, served([1] * 4, [1] * 4))


@given(st.integers(1, 2000))
def test_memory_is_called_flat_only_within_one_percent(held: int) -> None:
    vllm = served([1] * 4, [1] * 4)
    vllm = replace(vllm, busiest=replace(POOL, held=held))
    found = keys(served([1] * 4), vllm)
    assert ("vllm_flat" in found) == (abs(held - 1000) < 10)
    assert ("vllm_moves" in found) == (abs(held - 1000) >= 10)


def test_a_pool_is_said_to_be_set_aside_only_when_it_was_as_large_before_and_after() -> None:
    vllm = served([1] * 4, [1] * 4)
    assert {"pool", "pool_used"} <= keys(served([1] * 4), vllm).keys()
    assert keys(served([1] * 4), vllm)["pool"].figures["sequences"] == 2
    grown = replace(vllm, after=replace(POOL, capacity=8192))
    assert not {"pool", "pool_used"} & keys(served([1] * 4), grown).keys()


def test_without_equal_work_no_times_are_compared() -> None:
    vllm = served([1] * 4, [1] * 4)
    short = [*vllm.answers[:2], replace(vllm.answers[2], output_tokens=49), vllm.answers[3]]
    found = keys(served([9] * 4), replace(vllm, answers=short))
    assert found["other_work"].figures == {"inputs": "3"}
    assert not {"same_work", "faster", "slower", "split"} & found.keys()


def test_inputs_that_did_not_leave_at_once_are_not_compared() -> None:
    vllm = served([1] * 4, [1] * 4)
    late = [replace(vllm.at_once[0], sent_ns=-SECOND), *vllm.at_once[1:]]
    found = keys(served([9] * 4), replace(vllm, at_once=late))
    assert found["not_at_once"].figures == {"apart": 1}
    assert not {"faster", "slower", "split"} & found.keys()


def test_blocks_are_worked_out_from_the_lengths() -> None:
    figures = keys(served([1] * 4), served([1] * 4, [1] * 4))["blocks"].figures
    assert figures["lengths"] == "55, 84, 460, 56"
    assert (figures["tokens"], figures["blocks"], figures["reserved"]) == (655, 4 + 6 + 29 + 4, 2048)
    assert figures["share"] == pytest.approx(655 / (43 * 16))


def test_nothing_is_said_of_memory_that_is_not_known() -> None:
    unknown = Reading(1)
    hf = replace(served([1] * 4), loaded=unknown, readings=[unknown] * 4, after=unknown)
    vllm = replace(served([1] * 4, [1] * 4), loaded=unknown, readings=[unknown] * 4, after=unknown, busiest=unknown)
    assert list(keys(hf, vllm)) == ["same_work", "slower", "split", "kv_hf_unseen", "no_verdict"] or list(
        keys(hf, vllm)
    ) == ["same_work", "faster", "split", "kv_hf_unseen", "no_verdict"]


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_have_the_same_texts_with_the_same_figures() -> None:
    english, *others = (TEXTS[language] for language in LANGUAGES)
    for other in others:
        assert list(other) == list(english)
        assert {key: placeholders(text) for key, text in other.items()} == {
            key: placeholders(text) for key, text in english.items()
        }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_finding_has_words(language: str) -> None:
    slow, quick = served([9] * 4), served([1] * 4, [1] * 4)
    moved = replace(quick, busiest=replace(POOL, held=2000))
    other = replace(quick, answers=answers([1] * 4, tokens=49))
    apart = replace(quick, at_once=[replace(quick.at_once[0], sent_ns=-SECOND), *quick.at_once[1:]])
    runs = [
        (slow, apart),
        (slow, quick),
        (served([0.1] * 4, kv=[1, 1, 1, 1]), moved),
        (slow, other),
        (served([1] * 4, kv=[0] * 4), quick),
    ]
    for hf, vllm in runs:
        for one in find(hf, vllm, 512):
            text = say(language, one.key, one.figures)
            assert "{" not in text
            assert "None" not in text


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "bytes", "-"),
        (0, "bytes", "0"),
        (512, "bytes", "0.50 KiB"),
        (3 * 2**20, "bytes", "3.00 MiB"),
        (2**40, "bytes", "1,024.00 GiB"),
        (1234, "blocks", "1,234 blocks"),
    ],
)
def test_amounts_are_in_the_largest_unit(value: float | None, unit: str, shown: str) -> None:
    assert amount(value, unit) == shown


def test_the_inputs_are_those_of_the_load_generator() -> None:
    assert INPUTS == CLASSIC_PROMPTS
    assert [len(text) for text in INPUTS] == [6, 57, 680, 7]


# The client, against a server that answers what a test gives it.


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes], list[dict[str, Any]]]]:
    """The address of a server, what it answers to every POST (the first is the status), and the bodies it got."""
    reply: list[bytes] = [b"200"]
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(int(reply[0]))
            self.end_headers()
            for part in reply[1:]:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:  # keep the tests' output clean
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", reply, got
        http.shutdown()
        thread.join()


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


USAGE = event(choices=[], usage={"prompt_tokens": 6, "completion_tokens": 3})


def test_tokens_are_counted_by_the_server_and_the_first_is_one_that_holds_output(
    server: tuple[str, list[bytes], list[dict[str, Any]]],
) -> None:
    url, reply, got = server
    empty = event(choices=[{"text": "", "token_ids": []}])
    held_back = event(choices=[{"text": "", "token_ids": [7]}])
    reply += [b": a comment\n\n", empty, held_back, event(choices=[{"text": "abc"}]), USAGE, b"data: [DONE]\n\n"]
    found = ask_at_once(url, "m", ["one", "two"])
    assert [(one.prompt_tokens, one.output_tokens, one.characters) for one in found] == [(6, 3, 3)] * 2
    assert all(0 < one.ttft_seconds <= one.e2e_seconds for one in found)
    assert {body["prompt"]: body["seed"] for body in got} == {"one": 1, "two": 2}
    assert all(body["ignore_eos"] and body["max_tokens"] == 50 and body["temperature"] == 0.7 for body in got)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([b"503", b"too busy"], "HTTP 503: too busy"),
        ([b"200", event(error={"message": "no"})], "'message': 'no'"),
        ([b"200", event(choices=[{"text": "a"}])], "no output token, or does not say how many"),
        ([b"200", USAGE], "no output token, or does not say how many"),
        ([b"200", b"data: {\n\n"], "JSONDecodeError"),
    ],
)
def test_a_failed_request_ends_the_experiment_with_its_reason(
    server: tuple[str, list[bytes], list[dict[str, Any]]], reply: list[bytes], message: str
) -> None:
    url, replies, _ = server
    replies[:] = reply
    with pytest.raises(RunError, match=message):
        ask_at_once(url, "m", ["one"])


def test_a_server_that_is_not_there_ends_it_at_once() -> None:
    with pytest.raises(RunError, match="a request failed: ConnectionRefusedError"):
        ask_at_once("http://127.0.0.1:1", "m", ["one", "two"])


# Memory.


def test_a_cache_is_that_of_the_samples_in_the_window(tmp_path: Path) -> None:
    rows = [paged_row(at * SECOND, allocated=16 * at) for at in range(1, 6)]
    path = tmp_path / "vllm.arrow"
    write_timeline(path, kv_table(*rows))
    reading = read(samples=path, window=(2 * SECOND, 4 * SECOND))
    assert (reading.allocated, reading.last, reading.samples) == (64 * 4096, 64 * 4096, 3)
    assert (reading.capacity, reading.capacity_tokens, reading.block_size) == (1600 * 4096, 1600, 16)
    assert read(samples=path, window=(9 * SECOND, 10 * SECOND)).allocated is None


def test_a_cache_without_bytes_keeps_its_unit(tmp_path: Path) -> None:
    path = tmp_path / "hf.arrow"
    write_timeline(path, kv_table(kv_row(1, bytes_per_token=None), kv_row(2, error="x")))
    reading = read(samples=path, window=(0, 5))
    assert (reading.allocated, reading.unit, reading.samples, reading.block_size) == (10, "tokens", 1, None)


# The command.


def quiet() -> Console:
    return Console(highlight=False, soft_wrap=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lang", "fr"], "headroom: classic: argument --lang: invalid choice: 'fr'"),
        ([], "headroom: classic: targets: expected one of kind hf and one of kind vllm"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_plan(targets=[{"name": "vllm", "kind": "vllm"}], max_model_len=64)
    with pytest.raises(SystemExit) as ended:
        classic(arguments, lambda _: one, quiet())
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given_", "variable", "expected"),
    [
        ([], None, ["--model=random:gpt2", "--max-model-len=512", "--gpu-memory-utilization=0.8", "--resident=one"]),
        (
            ["--model", "x"],
            None,
            ["--max-model-len=512", "--gpu-memory-utilization=0.8", "--model", "x", "--resident=one"],
        ),
        (["--model=x"], "MAX_MODEL_LEN", ["--gpu-memory-utilization=0.8", "--model=x", "--resident=one"]),
    ],
)
def test_the_originals_settings_give_way_to_those_that_are_given(
    monkeypatch: pytest.MonkeyPatch, given_: list[str], variable: str | None, expected: list[str]
) -> None:
    if variable:
        monkeypatch.setenv(f"HEADROOM_{variable}", "64")
    seen: list[list[str]] = []

    def plan_of(arguments: Sequence[str]) -> Plan:
        seen.append(list(arguments))
        raise SystemExit(2)

    with pytest.raises(SystemExit):
        classic(given_, plan_of, quiet())
    assert seen == [expected]


@pytest.mark.parametrize(
    ("error", "code", "reason"), [(RunError("hf ended"), 1, "hf ended"), (KeyboardInterrupt(), 130, "interrupted")]
)
def test_what_ends_it_early_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    reason: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "doctor", lambda *_: 0)
    monkeypatch.setattr(Stack, "start", fail)
    assert classic([], lambda _: make_plan(out=str(tmp_path), max_model_len=64), quiet()) == code
    assert reason in capsys.readouterr().err
    kept = json.loads(next(tmp_path.glob("*-classic/classic.json")).read_text())
    assert (kept["state"], kept["reason"]) == ("partial", reason)
    assert [one["stage"] for one in kept["stages"]] == ["before"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_tables_fit_a_terminal(language: str, capsys: pytest.CaptureFixture[str]) -> None:
    show = Show(Console(highlight=False, soft_wrap=True, width=80), language)
    slow = served([123.4] * 4, [234.5] * 4)
    show.answers("one_by_one", slow.answers, slow.readings)
    show.answers("all_at_once", slow.at_once, [POOL])
    big = replace(POOL, machine=10**12, gpus=10**12, held=10**12, allocated=10**11, capacity=10**12)
    show.stages([(show.text("stage_input", name="vLLM", place=4), big)])
    assert "…" not in capsys.readouterr().out
