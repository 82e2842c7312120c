"""What is sent: seeded lists of requests."""

from collections import Counter
from itertools import islice
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.options import Options
from loadtest.workloads import PAPER_MEANS, PROMPT_TOKEN_IDS, WORKLOADS, Request

SYNTHETIC = ["lognormal", "sharegpt", "alpaca"]


def draw(count: int, **options: Any) -> list[Request]:
    chosen = Options(**options)
    return list(islice(WORKLOADS[chosen.workload](chosen), count))


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_the_same_seed_gives_the_same_requests(workload: str) -> None:
    assert draw(20, workload=workload, seed=5) == draw(20, workload=workload, seed=5)


@pytest.mark.parametrize("workload", SYNTHETIC)
def test_another_seed_gives_other_requests(workload: str) -> None:
    pairs = zip(draw(20, workload=workload, seed=5), draw(20, workload=workload, seed=6), strict=True)
    assert all(one.prompt != other.prompt and one.seed != other.seed for one, other in pairs)


def test_a_request_depends_on_its_index_alone_and_not_on_those_before_it() -> None:
    narrow, wide = (draw(50, output_mean=mean, seed=5) for mean in (20, 200))
    assert [one.prompt for one in narrow] == [one.prompt for one in wide]
    assert [one.max_tokens for one in narrow] != [one.max_tokens for one in wide]


@pytest.mark.parametrize("workload", SYNTHETIC)
def test_no_prompt_comes_twice(workload: str) -> None:
    # Alpaca has prompts of one or two tokens, of which there are not many.
    prompts = Counter(one.prompt for one in draw(2000, workload=workload) if len(one.prompt) > 4)
    assert len(prompts) > 1500
    assert max(prompts.values()) == 1


def test_prompt_tokens_are_in_every_usual_vocabulary() -> None:
    used = {token for one in draw(200) for token in one.prompt}
    assert used <= set(PROMPT_TOKEN_IDS)
    assert len(used) > 900


@pytest.mark.parametrize("workload", ["sharegpt", "alpaca"])
def test_mean_lengths_are_those_of_the_paper(workload: str) -> None:
    requests = draw(20_000, workload=workload)
    means = fmean(len(one.prompt) for one in requests), fmean(one.max_tokens for one in requests)
    assert means == pytest.approx(PAPER_MEANS[workload], rel=0.02)


def test_the_means_are_the_published_ones() -> None:
    assert PAPER_MEANS == {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}


@pytest.mark.parametrize(("mean", "sigma"), [(2, 1.0), (300, 1.5), (900, 1.0)])
def test_mean_lengths_are_those_asked_for_though_lengths_are_cut_at_both_ends(mean: float, sigma: float) -> None:
    requests = draw(20_000, input_mean=1, output_mean=mean, sigma=sigma)
    assert fmean(one.max_tokens for one in requests) == pytest.approx(mean, rel=0.03)


@settings(max_examples=40, deadline=None)
@given(
    max_context=st.integers(16, 4096),
    shares=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    sigma=st.floats(0, 3),
    seed=st.integers(0, 2**40),
)
def test_prompt_and_output_fit_into_the_context(
    max_context: int, shares: tuple[float, float], sigma: float, seed: int
) -> None:
    means = [1 + share * (max_context // 2 - 1) for share in shares]
    requests = draw(30, max_context=max_context, input_mean=means[0], output_mean=means[1], sigma=sigma, seed=seed)
    assert all(len(one.prompt) >= 1 and one.max_tokens >= 1 for one in requests)
    assert max(len(one.prompt) + one.max_tokens for one in requests) <= max_context


def test_without_spread_every_length_is_the_mean() -> None:
    requests = draw(50, input_mean=33, output_mean=21, sigma=0)
    assert {(len(one.prompt), one.max_tokens) for one in requests} == {(33, 21)}


def test_more_spread_gives_longer_and_shorter_outputs() -> None:
    spans = [
        (min(lengths), max(lengths))
        for sigma in (0.2, 1.0)
        if (lengths := [one.max_tokens for one in draw(500, sigma=sigma, output_mean=100)])
    ]
    assert spans[1][0] < spans[0][0] < 100 < spans[0][1] < spans[1][1]


def test_classic_sends_the_four_inputs_of_the_original_experiment_in_turn() -> None:
    requests = draw(8, workload="classic", seed=40)
    prompts = [str(one.prompt) for one in requests]
    assert prompts[:4] == [
        "Hello!",
        "How are you doing today? I hope everything is going well.",
        "Tell me a story about artificial intelligence and machine learning. " * 10,
        "Thanks!",
    ]
    assert prompts[4:] == prompts[:4]
    assert [len(prompt) for prompt in prompts[:4]] == [6, 57, 680, 7]
    assert {(one.max_tokens, one.temperature) for one in requests} == {(50, 0.7)}
    assert [one.seed for one in requests] == list(range(40, 48))


@pytest.mark.parametrize(
    "options",
    [
        {"input_mean": 1024},
        {"output_mean": 5000},
        {"input_mean": float("inf")},
        {"workload": "sharegpt", "max_context": 512},
    ],
)
def test_a_mean_that_does_not_fit_is_refused_before_anything_is_drawn(options: dict[str, Any]) -> None:
    # Not with the first request: a run must not begin that cannot send anything.
    with pytest.raises(ValueError, match=r"does not fit: at most \d+ \(half of max_context\)"):
        WORKLOADS[options.get("workload", "lognormal")](Options(**options))


def test_the_body_asks_for_an_exact_amount_of_work_and_for_its_count() -> None:
    request = Request(0, (300, 301), 12, 0.0, 5)
    assert request.body("m") == {
        "model": "m",
        "prompt": (300, 301),
        "max_tokens": 12,
        "temperature": 0.0,
        "seed": 5,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
