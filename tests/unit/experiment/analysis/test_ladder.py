"""Which targets of a plan are rungs, and what is new from one to the next."""

from dataclasses import asdict

import pytest

from experiment.analysis import ladder, stats
from experiment.analysis.results import JSON


def hf(name: str, args: str = "") -> JSON:
    return {"name": name, "kind": "hf", "args": args}


VLLM = {"name": "vllm", "kind": "vllm", "args": "--enforce-eager"}
BATCH, STATIC = hf("batch", "--engine batch --max-batch 8"), hf("static", "--engine=batch --cache=static")
CONTINUOUS = hf("continuous", "--max-batch 8 --engine continuous")


@pytest.mark.parametrize(
    ("target", "rung"),
    [
        (hf("a"), "sequential"),
        (hf("a", "--engine sequential --compile"), "sequential-compile"),
        (hf("a", "--compile --dtype float32"), "sequential-compile"),
        (hf("a", "--compile false"), "sequential"),
        (hf("a", "--cache static"), "sequential-static"),
        (BATCH, "batch"),
        (STATIC, "batch-static"),
        (hf("a", "--engine batch --compile"), "batch-static-compile"),
        (CONTINUOUS, "continuous"),
        (VLLM, "vllm"),
        ({"name": "other", "kind": "url", "url": "http://x"}, None),
    ],
)
def test_the_rung_of_a_target_is_told_by_its_kind_and_its_arguments(target: JSON, rung: str | None) -> None:
    assert ladder.rung(target) == rung


def test_each_step_of_the_ladder_says_what_is_new_whatever_the_order_of_the_targets() -> None:
    found = list(ladder.steps([VLLM, STATIC, hf("one"), CONTINUOUS, BATCH]))
    assert found == [
        ("one", "batch", "batching"),
        ("batch", "continuous", "continuous batching and paging"),
        ("continuous", "vllm", "kernels and scheduling"),
        ("batch", "static", "cache reserved for the maximum length"),
    ]


def test_a_step_over_a_rung_that_is_not_there_adds_all_that_is_between() -> None:
    found = list(ladder.steps([hf("one"), CONTINUOUS, VLLM]))
    assert found[0] == ("one", "continuous", "batching + continuous batching and paging")


def test_the_factors_of_a_gain_multiply_in_each_repeat_and_give_it_an_interval() -> None:
    ratios = {("a", "b"): [2.0, 3.0, 2.5], ("b", "c"): [1.5, 1.0, 1.2]}
    steps: list[JSON] = [
        {"from": low, "to": up, "adds": "", "level": 4, "ratio": {"repeats": own} | asdict(stats.ratio_of_pairs(own))}
        for (low, up), own in ratios.items()
    ]
    product = ladder.product(steps)
    assert product is not None
    assert {name: product[name] for name in ("value", "low", "high", "verdict")} == pytest.approx(
        asdict(stats.ratio_of_pairs([3.0, 3.0, 3.0]))
    )
    steps[0]["ratio"]["verdict"] = "invalid"
    assert (ladder.product(steps) or {})["verdict"] == "invalid"
    steps[0]["ratio"]["repeats"] = [2.0]
    assert ladder.product(steps) is None


def test_two_servers_with_everything_between_them_are_no_ladder() -> None:
    assert list(ladder.steps([hf("hf"), VLLM])) == []
    assert list(ladder.steps([hf("hf"), hf("fast", "--compile")])) == [("hf", "fast", "compile")]
