"""The texts of a report: the same in both languages, and the verdict in one sentence."""

import re
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from experiment import report, words
from experiment.analysis import gates
from experiment.analysis.results import JSON
from experiment.report import look, sentence
from experiment.words import LANGUAGES, Words, findings

RATIO = {
    "repeats": [2.0],
    "value": 2.0,
    "low": 1.5,
    "high": 2.5,
    "verdict": "faster",
    "first": 1234.4,
    "second": 2468.8,
}
EQUAL = RATIO | {"value": 1.01, "low": 0.9, "high": 1.1, "verdict": "no detectable difference"}
ALONE = RATIO | {"low": None, "high": None, "verdict": "no detectable difference"}


def placeholders(text: str) -> set[tuple[str, str | None]]:
    return {(name, form) for _, name, form, _ in Formatter().parse(text) if name is not None}


def test_both_languages_have_the_same_keys_with_the_same_placeholders() -> None:
    english, chinese = (words.read(language) for language in LANGUAGES)
    assert list(english) == list(chinese)
    assert {key: placeholders(text) for key, text in english.items()} == {
        key: placeholders(text) for key, text in chinese.items()
    }


def test_every_text_of_the_chinese_is_chinese_but_for_names_and_signs() -> None:
    same = {key for key, text in words.read("zh").items() if not re.search("[\u4e00-\u9fff]", text)}
    names = {"ttft", "tpot", "limit.ttft_seconds", "limit.tpot_seconds", "limit.e2e_seconds", "col.throughput"}
    signs = {
        "ladder.factor",
        "axis.plain",
        "verdict.of",
        "verdict.short",
        "join.clauses",
        "join.list",
        "ratio",
        "col.part",
        "column.allocator",
        "verdict.level",
    }
    assert same <= names | signs | {"row.percentiles"}


def test_every_text_is_used() -> None:
    folders = (Path(package.__path__[0]) for package in (report, words))
    source = "".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.[pj]*"))
    used = set(re.findall(r'"([a-z0-9_.]+)"', source))
    # Beginnings of keys whose ends are names of other things.
    found = re.findall(r'(?:named|words|t)\(f?"([a-z_]+)(?:"|\.(?:"|\{))', source)
    groups = tuple(f"{group}." for group in [*found, "h", "fig", "why", "is", "unit", "metric", "gate", "found"])
    assert [key for key in words.read("en") if key not in used and not key.startswith(groups)] == []


def test_every_rule_and_everything_that_it_may_find_has_a_text() -> None:
    source = Path(gates.__file__).read_text(encoding="utf-8")
    found = set(re.findall(r'_finding\(\s*"(\w+)"', source)) | {"rose", "fell"}
    texts = {key.removeprefix("found.") for key in words.read("en") if key.startswith("found.")}
    assert {text for text in texts if not text.startswith("at_most_")} == found
    rules = set(re.findall(r'_gate\(\s*"([\w-]+)"', source))
    assert rules == {key.removeprefix("gate.") for key in words.read("en") if key.startswith("gate.")}


SEARCHES = [
    ({"rate": None, "missed": None}, "no rate was tried", "没有试过"),
    ({"rate": None, "missed": 2}, "no rate met the limits; the lowest tried was 2 requests/s", "最低速率为 2"),
    ({"rate": 8, "missed": None}, "every rate tried met the limits; the highest tried was 8", "最高为 8"),
    ({"rate": 2.83, "missed": 2.85}, "2.83 requests/s met the limits and 2.85 did not", "2.85 不满足"),
    ({"rate": 4, "missed": 8, "exact": False}, "further apart than 5%, as the search ended early", "搜索提前结束"),
    ({"rate": 2, "missed": 3, "unsure": [2, 3]}, "chance may have decided at 2, 3: the 95 % interval", "可能出于偶然"),
    ({"rate": 2, "missed": 4, "above": 8}, "8 met them too, which does not count", "8 也满足"),
]


@pytest.mark.parametrize(("found", "english", "chinese"), SEARCHES)
def test_how_a_search_ended_is_told_in_each_language(found: JSON, english: str, chinese: str) -> None:
    whole: JSON = {"above": None, "exact": True, "precision": 0.05, "unsure": [], "wanted": 0.99} | found
    assert english in findings.search_end(Words("en"), whole)
    assert chinese in findings.search_end(Words("zh"), whole)


def test_what_a_rule_found_names_the_server_and_the_level_in_each_language() -> None:
    gate = {
        "id": "cells",
        "found": [{"id": "missing", "target": "vllm", "level": 4.0, "repeat": 2}, {"id": "more", "count": 3}],
    }
    assert findings.found(Words("en"), gate, "closed") == "vLLM, 4 in flight, repeat 2: missing or short; and 3 more"
    assert findings.found(Words("zh"), gate, "poisson") == "vLLM，4 请求/秒，第 2 次重复：缺失或不完整；另有 3 项"  # noqa: RUF001


def frame(language: str, targets: tuple[str, ...] = ("hf", "vllm"), closed: bool = True) -> look.Frame:
    return look.Frame(Words(language), targets, closed)


def summary(ratios: JSON, **changes: Any) -> JSON:
    levels = [{"level": 1, "ratios": {"vllm": {"output_throughput": EQUAL}}}, {"level": 4, "ratios": ratios}]
    whole: JSON = {"state": "complete", "valid": True, "together": False, "kv_budget": None, "baseline": "hf"}
    whole |= {"saturation": {}}
    return whole | {"levels": levels} | changes


@pytest.mark.parametrize(
    ("ratios", "changes", "english", "chinese"),
    [
        (
            {"vllm": {"output_throughput": RATIO}},
            {},
            "At concurrency 4 vLLM made 2.00 times (95 % interval 1.50 to 2.50) the output tokens per second of HF: "
            "2,469 against 1,234.",
            "并发 4 时，vLLM 每秒输出的 token 数是 HF 的 2.00 倍（95% 置信区间 1.50 至 2.50）：2,469 对 1,234。",  # noqa: RUF001
        ),
        (
            {"vllm": {"output_throughput": EQUAL}},
            {"state": "partial"},
            "Partial run: at concurrency 4 vLLM made 1.01 times (95 % interval 0.90 to 1.10) the output tokens per "
            "second of HF: 2,469 against 1,234, which is no detectable difference.",
            "未检测到差异",
        ),
        ({"vllm": {"output_throughput": ALONE}}, {}, "(one repeat, so no interval and no verdict)", "只有一次重复"),
        ({}, {"levels": []}, "No comparison: there is no level that two servers ran to its end.", "无法比较"),
        (
            {"vllm": {"output_throughput": RATIO | {"verdict": "invalid"}}},
            {"valid": False},
            "Not valid: at concurrency 4 vLLM made 2.00 times",
            "无效：并发 4 时，vLLM",  # noqa: RUF001
        ),
        (
            {"vllm": {"output_throughput": EQUAL | {"verdict": "invalid"}}},
            {"valid": False, "state": "partial"},
            "2,469 against 1,234, which is no detectable difference.",
            "无效：并发 4 时",  # noqa: RUF001
        ),
        ({}, {}, "At concurrency 1 vLLM made 1.01 times", "并发 1 时"),
        (
            {},
            {"levels": [], "saturation": {"hf": {"rate": None, "cells": []}, "vllm": {"rate": 12.345, "cells": []}}},
            "The highest rate at which the limits were met: HF met them at no rate that was tried; "
            "vLLM 12.3 requests/s.",
            "vLLM 为 12.3 请求/秒",
        ),
    ],
)
def test_the_verdict_is_one_sentence_in_each_language(ratios: JSON, changes: JSON, english: str, chinese: str) -> None:
    assert english in sentence.verdict(frame("en"), summary(ratios, **changes))
    assert chinese in sentence.verdict(frame("zh"), summary(ratios, **changes))


ONE = {"output_throughput_mean": 1234.5, "ttft_seconds": {"mean": 0.0321}, "attainment": 0.987}


@pytest.mark.parametrize(
    ("figures", "english", "chinese"),
    [
        (
            {},
            "At concurrency 4 vLLM made 1,234 output tokens per second, with a mean time to first token of 32.1 ms; "
            "98.7% of its requests met the limits.",
            "98.7% 的请求满足全部上限",
        ),
        ({"attainment": None}, "of 32.1 ms.", "32.1 毫秒。"),
        ({"output_throughput_mean": None}, "No comparison", "无法比较"),
    ],
)
def test_of_one_target_its_own_figures_are_told(figures: JSON, english: str, chinese: str) -> None:
    levels = [{"level": 4, "targets": {"vllm": ONE | figures}, "ratios": {}}]
    for language, text in (("en", english), ("zh", chinese)):
        assert text in sentence.verdict(frame(language, ("vllm",)), summary({}, levels=levels))


def test_a_search_does_not_take_the_place_of_the_verdict() -> None:
    found = summary({"vllm": {"output_throughput": RATIO}}, saturation={"vllm": {"rate": 12.345, "cells": []}})
    assert sentence.verdict(frame("en"), found).startswith("At concurrency 4 vLLM made 2.00 times")
    assert sentence.details(frame("en"), found) == [
        "The highest rate at which the limits were met: vLLM 12.3 requests/s."
    ]


def cache(mean: float, most: float, allocated: float) -> JSON:
    running, capacity = {"mean": mean, "max": most}, {"mean": 100, "max": 100}
    return {"memory": {"kv": {"running": running, "capacity": capacity, "allocated": {"mean": 1, "max": allocated}}}}


@pytest.mark.parametrize(
    ("vllm", "told"),
    [
        (cache(20, 31, 90), ["Sequences held at once where 8.0 MiB of KV cache was the limit: vLLM 20.0, HF 6.1."]),
        # Room was left.
        (cache(20, 31, 89), []),
        # All that were offered were held.
        (cache(20, 32, 100), []),
    ],
)
def test_sequences_held_at_once_are_told_of_servers_that_memory_limited(vllm: JSON, told: list[str]) -> None:
    held = {"hf": cache(6.14, 8, 100), "vllm": vllm}
    levels = [{"level": 32, "targets": held, "ratios": {"vllm": {"output_throughput": RATIO}}}]
    whole = summary({}, levels=levels, kv_budget=2**23)
    assert sentence.details(frame("en"), whole) == told
    assert sentence.details(frame("en"), summary({}, levels=levels)) == []
    assert "held" not in sentence.verdict(frame("en"), whole)


def test_a_load_on_all_at_once_is_told() -> None:
    found = summary({"vllm": {"output_throughput": RATIO}}, together=True)
    assert sentence.verdict(frame("en"), found).startswith(
        "At concurrency 4, all servers under load at once, vLLM made"
    )
    assert sentence.verdict(frame("zh"), found).startswith("并发 4 时所有服务器同时承受负载，vLLM")  # noqa: RUF001


def test_of_many_targets_the_one_that_gains_most_is_told_in_full() -> None:
    slow = RATIO | {"value": 1.5}
    found = {"a": {"output_throughput": slow}, "vllm": {"output_throughput": RATIO}, "b": {"ttft_seconds": RATIO}}
    told = sentence.verdict(frame("en", ("hf", "a", "b", "vllm")), summary(found))
    assert told.startswith("At concurrency 4 vLLM made 2.00 times")
    assert told.endswith("against 1,234.")
    assert sentence.details(frame("en", ("hf", "a", "b", "vllm")), summary(found)) == [
        "At concurrency 4, output tokens per second against HF: a 1.50× (1.50 to 2.50, faster)."  # noqa: RUF001
    ]


@pytest.mark.parametrize(
    ("held_on", "first", "unlike"),
    [
        ({"hf": ["0"], "one": ["0"], "two": ["0", "1"]}, "one", "two"),
        # Which GPUs a server is on says nothing of how many.
        ({"hf": ["0"], "one": ["1"], "two": ["2", "3"]}, "one", "two"),
        ({"hf": ["0", "1"], "one": ["0"], "two": ["0", "1"]}, "two", "one"),
        # There is none on as many, or the monitor cannot tell.
        ({"hf": ["0"], "one": ["0", "1"], "two": ["0", "1"]}, "two", "one, two"),
        ({"hf": [], "one": ["0"], "two": ["0", "1"]}, "two", ""),
        ({"hf": ["0"], "one": [], "two": []}, "two", ""),
    ],
)
def test_the_headline_is_of_servers_on_as_many_gpus_as_the_baseline(
    held_on: dict[str, list[str]], first: str, unlike: str
) -> None:
    ratios = {name: {"output_throughput": RATIO | {"value": value}} for name, value in (("one", 2.0), ("two", 3.0))}
    targets = {name: {"held_on": gpus, "memory": {}} for name, gpus in held_on.items()}
    found = summary({}, levels=[{"level": 4, "ratios": ratios, "targets": targets}])
    told = frame("en", ("hf", "one", "two"))
    assert f"At concurrency 4 {first} made" in sentence.verdict(told, found)
    named = [one for one in sentence.details(told, found) if "GPUs" in one]
    assert named == ([f"Not on as many GPUs as HF: {unlike}."] if unlike else [])


def test_in_an_open_loop_the_time_from_the_schedule_is_compared() -> None:
    found = {"vllm": {"output_throughput": EQUAL, "e2e_seconds": EQUAL, "response_seconds": RATIO | {"value": 3}}}
    told = sentence.verdict(frame("en", closed=False), summary(found))
    assert told.startswith("At 4 requests/s vLLM answered 3.00 times (95 % interval 1.50 to 2.50) as fast as HF")


QUEUE = {"output_throughput": RATIO, "e2e_seconds": RATIO, "response_seconds": RATIO | {"verdict": "invalid"}}


def open_loop(*levels: JSON, **changes: Any) -> JSON:
    """A summary of levels 2, 4, ... with the ratios of vLLM at each; where there is no verdict a queue of HF grew."""

    def targets(ratios: JSON) -> JSON:
        return {"hf": {"unstable": [1] if ratios is QUEUE else []}, "vllm": {"unstable": []}}

    rows = [{"level": 2 * n, "targets": targets(one), "ratios": {"vllm": one}} for n, one in enumerate(levels, 1)]
    return summary({}, levels=rows, **changes)


def test_a_latency_of_a_level_at_which_a_queue_grew_is_not_told() -> None:
    calm = {"output_throughput": EQUAL, "e2e_seconds": EQUAL, "response_seconds": RATIO | {"value": 3}}
    for changes in ({}, {"valid": False}):
        found = open_loop(calm, QUEUE, **changes)
        assert "t 2 requests/s vLLM answered 3.00 times" in sentence.verdict(frame("en", closed=False), found)
        assert sentence.details(frame("en", closed=False), found) == [
            "At 4 requests/s the requests of HF waited in a queue that grew, or for long beside the length of the "
            "cells: their latencies have no mean (\N{UPWARDS ARROW}) and are compared with none."
        ]
        assert "4 请求/秒时，HF 的请求在不断增长的队列中等待" in sentence.details(frame("zh", closed=False), found)[0]  # noqa: RUF001


def test_where_every_latency_is_without_a_verdict_the_throughput_is_told() -> None:
    invalid = dict.fromkeys(("e2e_seconds", "response_seconds"), QUEUE["response_seconds"])
    told = sentence.verdict(frame("en", closed=False), open_loop(QUEUE | invalid, QUEUE | invalid))
    assert told.startswith("At 4 requests/s vLLM made 2.00 times")


def test_a_name_without_a_text_is_said_as_it_is() -> None:
    assert Words("zh").named("gate", "new", "a new rule") == "a new rule"
    assert Words("zh").named("line", "GPU 0 used") == "GPU 0 used"
    with pytest.raises(KeyError, match="nothing"):
        Words("en")("nothing")
