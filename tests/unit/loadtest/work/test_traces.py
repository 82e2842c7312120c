"""Traces of the three public kinds, in the form in which they are published."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.options import Options
from loadtest.work.schedule import schedule
from loadtest.work.traces import Trace, read
from loadtest.work.workloads import WORKLOADS, skipped

# With the line ends and the digits of the published file.
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 19:15:51.1805900,804,6"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,10,4\n"
    "2024-05-10 00:00:01.009930+00:00,8,3\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,108,0,108,API log\n"
    "118,GPT-4,417,276,693,Conversation log\n"
)
BURSTGPT_2 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "19440110.0,a-b-c,2.5,ChatGPT,20,18,38,Conversation log\n"
    "19440112.5,,1.5,GPT-4,10,7,17,API log\n"
)
MOONCAKE = [
    {"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [0, 14]},
    {"timestamp": 1000, "input_length": 1024, "output_length": 7, "hash_ids": [0, 15]},
    {"timestamp": 4500, "input_length": 300, "output_length": 9, "hash_ids": [0]},
]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def options(tmp_path: Path, text: str | bytes, **given: Any) -> Options:
    path = tmp_path / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Options(**{"trace": str(path), "workload": "trace", "arrival": "trace", "max_context": 4096} | given)


def columns(trace: Trace) -> tuple[list[float], list[int], list[int]]:
    return list(trace.seconds), list(trace.input_tokens), list(trace.output_tokens)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AZURE, ([0, 4.314579, 3604.5], [374, 396, 804], [44, 109, 6])),
        (AZURE_2024, ([0, 1], [10, 8], [4, 3])),
        ("\ufeff" + AZURE_2024, ([0, 1], [10, 8], [4, 3])),
        (BURSTGPT_2, ([0, 2.5], [20, 10], [18, 7])),
        (jsonl(MOONCAKE), ([0, 0, 3.5], [600, 1024, 300], [5, 7, 9])),
    ],
)
def test_a_trace_is_read_with_offsets_from_its_first_request(
    tmp_path: Path, text: str, expected: tuple[list[float], list[int], list[int]]
) -> None:
    seconds, inputs, outputs = columns(read(options(tmp_path, text)))
    assert seconds == pytest.approx(expected[0], abs=1e-5)
    assert (inputs, outputs) == expected[1:]


def test_failures_of_burstgpt_are_left_out_and_counted(tmp_path: Path) -> None:
    trace = read(chosen := options(tmp_path, BURSTGPT))
    assert columns(trace) == ([0, 113], [472, 417], [18, 276])
    assert skipped(chosen) == {"failed when it was recorded": 1}


def test_what_does_not_fit_into_the_context_is_left_out_and_counted(tmp_path: Path) -> None:
    chosen = options(tmp_path, AZURE, max_context=505)
    assert columns(read(chosen)) == ([0, pytest.approx(4.314579, abs=1e-5)], [374, 396], [44, 109])
    assert skipped(chosen) == {"more than max_context (505 tokens)": 1}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (AZURE.replace("2023-11-16 18:15:50.9951690", "yesterday"), "line 3: TIMESTAMP: 'yesterday': expected a time"),
        (AZURE.replace(",396,", ",many,"), "line 3: ContextTokens: 'many': expected a whole number of 1 or more"),
        (AZURE.replace(",109", ""), "line 3: GeneratedTokens: None: expected a whole number of 1 or more"),
        (AZURE.replace("18:15:50", "18:15:40"), "line 3: TIMESTAMP: 1700158540.995169: expected a time in seconds not"),
        (BURSTGPT.replace("45,", "inf,"), "line 3: Timestamp: 'inf': expected a number of 0 or more"),
        (BURSTGPT.replace(",108,0", ",108,-1"), "line 3: Response tokens: '-1': expected a whole number of 0 or more"),
        (BURSTGPT.replace("45,GPT-4,108", "4,GPT-4,108").replace(",0,", ",1,"), "line 3: Timestamp: 4.0: expected"),
        (jsonl(MOONCAKE).replace("1024", '"x"'), "line 2: input_length: 'x': expected a whole number"),
        (jsonl(MOONCAKE).replace("1024", "true"), "line 2: input_length: True: expected a whole number"),
        (jsonl(MOONCAKE).replace("[0, 15]", "[0]"), "line 2: hash_ids: [0]: expected a list of 2 whole numbers"),
        (jsonl(MOONCAKE).replace("[0, 15]", "[0, -1]"), "line 2: hash_ids: [0, -1]: expected"),
        (jsonl(MOONCAKE).replace("[0, 15]", "null"), "line 2: hash_ids: None: expected"),
        (jsonl(MOONCAKE).replace('"timestamp": 4500', '"timestamp": 999'), "line 3: timestamp: 0.999: expected a time"),
        (
            AZURE.replace(",396,", ',"396,'),
            "line 3: line: '2023-11-16 18:15:50.9951690,\"396,109': expected fields with",
        ),
        (
            BURSTGPT.replace("45,GPT-4", '45,"GPT-4').replace(",0,", ",1,"),
            "line 3: line: '45,\"GPT-4,108,1,108,API log'",
        ),
        (AZURE.replace(",396,", ",39_6,"), "line 3: ContextTokens: '39_6': expected a whole number of 1 or more"),
        (BURSTGPT.replace("45,", "4_5,"), "line 3: Timestamp: '4_5': expected a number of 0 or more"),
        (
            jsonl(MOONCAKE[:1]) + '{"timestamp" 5}\n' + jsonl(MOONCAKE[2:]),
            "line 2: line: '{\"timestamp\" 5}': expected a JSON object: column 14: Expecting ':' delimiter",
        ),
        (jsonl(MOONCAKE[:1]) + "{oops\n" + jsonl(MOONCAKE[2:]), "line 2: line: '{oops': expected a JSON object"),
        (jsonl(MOONCAKE[:1]) + "[]\n" + jsonl(MOONCAKE[2:]), "line 2: line: '[]': expected a JSON object"),
        (AZURE.encode().replace(b"396", b"\xff"), "line 3: ContextTokens: '\\udcff': expected a whole number"),
        (jsonl(MOONCAKE[:1]).encode() + b'{"\xff"}\n' + jsonl(MOONCAKE[2:]).encode(), "line 2: line: "),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_column_or_counted(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(ValueError, match="expected") as refused:
        read(options(tmp_path, text))
    assert str(refused.value).startswith(f"{tmp_path / 'trace'}: {place}")
    chosen = options(tmp_path, text, skip_bad_lines=True)
    assert len(read(chosen).seconds) == 2
    assert skipped(chosen)["bad line"] == 1


def test_a_file_of_another_kind_is_refused_with_the_columns_that_are_known(tmp_path: Path) -> None:
    for text in ("", "a,b,c\n1,2,3\n", b"\xff\xfe\x00"):
        with pytest.raises(ValueError, match=r"line 1: header: .* expected TIMESTAMP,ContextTokens,GeneratedTokens or"):
            read(options(tmp_path, text))


def test_a_file_that_is_not_there_is_named_with_its_option() -> None:
    with pytest.raises(ValueError, match=r"^trace: '/no/trace.csv': No such file or directory"):
        read(Options(trace="/no/trace.csv", workload="trace"))


def test_a_trace_with_too_few_requests_is_refused_with_what_was_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"requests: 3 with warmup and drain, but .* holds 2, 1 left out: failed when"):
        read(options(tmp_path, BURSTGPT, requests=2, warmup=1))
    with pytest.raises(ValueError, match=r"no request in it that can be sent, 3 left out: more than max_context"):
        read(options(tmp_path, AZURE, max_context=16))


def test_only_as_many_lines_are_read_as_are_sent(tmp_path: Path) -> None:
    assert len(read(options(tmp_path, AZURE + "\nbad", requests=2)).seconds) == 2


def test_a_file_that_was_changed_is_read_again(tmp_path: Path) -> None:
    assert len(read(options(tmp_path, AZURE)).seconds) == 3
    assert len(read(options(tmp_path, BURSTGPT)).seconds) == 2


def test_the_schedule_of_a_trace_is_scaled_and_cut_at_the_duration(tmp_path: Path) -> None:
    offsets = schedule(options(tmp_path, jsonl(MOONCAKE), time_scale=2))
    assert list(offsets or []) == [0, 0, 7]
    assert list(schedule(options(tmp_path, jsonl(MOONCAKE), time_scale=2, duration=7)) or []) == [0, 0]


def test_requests_of_a_trace_are_as_long_as_it_says_and_unique(tmp_path: Path) -> None:
    requests = list(WORKLOADS["trace"](options(tmp_path, AZURE)))
    assert [(len(one.prompt), one.max_tokens) for one in requests] == [(374, 44), (396, 109), (804, 6)]
    assert len({one.prompt[:4] for one in requests}) == 3


def test_requests_of_a_trace_are_shared_out_over_workers_and_read_once(tmp_path: Path) -> None:
    chosen = options(tmp_path, AZURE)
    first, second = (list(WORKLOADS["trace"](chosen, rank, 2)) for rank in (0, 1))
    assert [*first[:1], *second, *first[1:]] == list(WORKLOADS["trace"](chosen))
    assert read(chosen) is read(chosen)


def test_equal_block_hashes_are_equal_tokens_and_others_are_not(tmp_path: Path) -> None:
    one, two, three = (list(request.prompt) for request in WORKLOADS["trace"](options(tmp_path, jsonl(MOONCAKE))))
    assert (len(one), len(two), len(three)) == (600, 1024, 300)
    assert one[:512] == two[:512]
    assert three == one[:300]
    assert one[512:516] != two[512:516]


def test_lengths_of_a_trace_can_come_at_another_rate_and_its_times_with_other_lengths(tmp_path: Path) -> None:
    constant = options(tmp_path, AZURE, arrival="constant", rate=2)
    assert [len(one.prompt) for one in WORKLOADS["trace"](constant)] == [374, 396, 804]
    assert next(schedule(constant) or iter([])) == 0
    other = options(tmp_path, AZURE, workload="lognormal")
    assert len(list(schedule(other) or [])) == 3
    assert skipped(other) == {}


@pytest.mark.parametrize("text", [AZURE, BURSTGPT.replace(",0,", ",1,"), jsonl(MOONCAKE)])
def test_only_where_the_lengths_are_sent_does_max_context_leave_arrivals_out(tmp_path: Path, text: str) -> None:
    for arrivals, workload in ((3, "lognormal"), (1, "trace")):
        chosen = options(tmp_path, text, workload=workload, max_context=420)
        assert len(list(schedule(chosen) or [])) == arrivals
        assert skipped(chosen).total() == 3 - arrivals
