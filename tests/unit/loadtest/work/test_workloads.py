"""What is sent: seeded lists of requests."""

from collections import Counter
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.options import Options
from loadtest.work.prompts import TOKEN_IDS
from loadtest.work.workloads import PAPER_MEANS, WORKLOADS, Request, next_turn, skipped

SYNTHETIC = ["lognormal", "synthetic", "sharegpt", "alpaca"]


def draw(count: int, **options: Any) -> list[Request]:
    chosen = Options(**options)
    return list(islice(WORKLOADS[chosen.workload](chosen), count))


def conversation(options: Options, request: Request | None) -> list[Request]:
    """All turns, each answered with the token 7 as often as was asked for."""
    turns = []
    while request:
        turns.append(request)
        request = next_turn(options, request, [7] * request.max_tokens)
    return turns


@pytest.mark.parametrize("workload", ["classic", *SYNTHETIC])
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


@pytest.mark.parametrize("workload", ["classic", *SYNTHETIC])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_request_is_in_the_part_of_one_worker(workload: str, workers: int) -> None:
    options = Options(workload=workload, seed=5)
    parts = [list(islice(WORKLOADS[workload](options, rank, workers), 60 // workers)) for rank in range(workers)]
    assert sorted((one for part in parts for one in part), key=lambda one: one.index) == draw(60, **dict(options))


@pytest.mark.parametrize("workload", SYNTHETIC)
def test_no_prompt_comes_twice_and_none_begins_like_another(workload: str) -> None:
    # In more than a thousand requests, prompts of one token do come again.
    prompts = Counter(one.prompt[:4] for one in draw(3000, workload=workload) if len(one.prompt) > 1)
    assert len(prompts) > 2500
    assert max(prompts.values()) == 1


@settings(max_examples=30)
@given(mean=st.floats(1, 4), sigma=st.floats(0, 3), seed=st.integers(0), start=st.integers(0, 10**9))
def test_no_prompt_comes_twice_in_a_thousand_however_short_they_are(
    mean: float, sigma: float, seed: int, start: int
) -> None:
    options = Options(input_mean=mean, sigma=sigma, seed=seed)
    prompts = {one.prompt for one in islice(WORKLOADS["lognormal"](options, start), 1000)}
    assert len(prompts) == 1000


def test_prompt_tokens_are_in_every_usual_vocabulary() -> None:
    used = {token for one in draw(200) for token in one.prompt}
    assert used <= set(TOKEN_IDS)
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


@settings(max_examples=40)
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


@pytest.mark.parametrize("kind", ["constant", "uniform", "normal", "zipf"])
def test_prompts_and_outputs_have_the_distributions_asked_for(kind: str) -> None:
    requests = draw(
        4000,
        workload="synthetic",
        input_lengths=kind,
        output_lengths="constant",
        input_mean=90,
        output_mean=17,
        sigma=0.3,
    )
    lengths = [len(one.prompt) for one in requests]
    assert {one.max_tokens for one in requests} == {17}
    assert fmean(lengths) == pytest.approx(90, rel=0.15 if kind == "zipf" else 0.02)
    assert (min(lengths), max(lengths)) == {
        "constant": (90, 90),
        "uniform": (63, 117),
        "normal": (min(lengths), max(lengths)),
        "zipf": (1, max(lengths)),
    }[kind]
    assert {"normal": 150, "zipf": 900}.get(kind, 0) < max(lengths) <= 1024


def test_lengths_can_be_those_of_a_histogram(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("length,count\n3,1\nx,1\n50,1\n")
    given = {"workload": "synthetic", "output_lengths": "empirical", "output_histogram": str(file)}
    requests = draw(100, **given, skip_bad_lines=True)
    assert {one.max_tokens for one in requests} == {3, 50}
    assert skipped(Options(**given, skip_bad_lines=True)) == {"bad line": 1}
    with pytest.raises(ValueError, match=r"lengths\.csv: line 3: length: 'x'"):
        draw(1, **given)
    with pytest.raises(ValueError, match=r"^output_histogram: '/none': No such file"):
        draw(1, **given | {"output_histogram": "/none"})


def test_prompts_of_a_group_share_their_prefix_and_nothing_else() -> None:
    requests = draw(12, prefix_groups=3, prefix_tokens=40, input_mean=30, sigma=0)
    assert {len(one.prompt) for one in requests} == {70}
    prefixes = [one.prompt[:40] for one in requests]
    assert prefixes == prefixes[:3] * 4
    assert len({prefix[:4] for prefix in prefixes}) == 3
    assert len({one.prompt[40:44] for one in requests}) == 12


def test_a_turn_holds_the_one_before_it_and_its_answer() -> None:
    options = Options(turns=3, input_mean=10, output_mean=6, sigma=0, prefix_groups=1, prefix_tokens=5)
    first, second, third = conversation(options, draw(1, **dict(options))[0])
    assert [len(one.prompt) for one in (first, second, third)] == [15, 15 + 6 + 10, 31 + 6 + 10]
    assert second.prompt[:21] == (*first.prompt, *[7] * 6)
    assert third.prompt[:37] == (*second.prompt, *[7] * 6)
    assert len({first.prompt[5:9], second.prompt[21:25], third.prompt[37:41]}) == 3
    assert [(one.index, one.conversation, one.turn) for one in (first, second, third)] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 0, 2),
    ]


def test_conversations_are_listed_by_their_first_turn_and_shared_out_whole() -> None:
    options = Options(turns=4)
    assert [(one.index, one.conversation) for one in draw(3, **dict(options))] == [(0, 0), (4, 1), (8, 2)]
    parts = [
        [turn for one in islice(WORKLOADS["lognormal"](options, rank, 2), 5) for turn in conversation(options, one)]
        for rank in (0, 1)
    ]
    assert sorted(turn.index for part in parts for turn in part) == list(range(40))


@settings(max_examples=30)
@given(turns=st.integers(1, 6), prefix=st.integers(0, 300), seed=st.integers(0))
def test_a_whole_conversation_fits_into_the_context(turns: int, prefix: int, seed: int) -> None:
    options = Options(
        turns=turns,
        prefix_groups=bool(prefix),
        prefix_tokens=prefix,
        seed=seed,
        sigma=2,
        max_context=1000,
        input_mean=20,
    )
    for one in draw(5, **dict(options)):
        last = conversation(options, one)[-1]
        assert last.turn == turns - 1
        assert len(last.prompt) + last.max_tokens <= 1000


def test_a_conversation_goes_on_after_a_failed_turn() -> None:
    options = Options(turns=2)
    first = draw(1, **dict(options))[0]
    for second in (next_turn(options, first, ""), next_turn(options, first, [])):
        assert second
        assert second.prompt[: len(first.prompt)] == first.prompt
    with pytest.raises(ValueError, match=r"^tokenizer: '': needed to put an answer's text into the next prompt"):
        next_turn(options, first, "some")


def test_only_a_turn_that_another_follows_asks_for_the_ids_of_its_answer() -> None:
    options = Options(turns=2)
    first, second = conversation(options, draw(1, **dict(options))[0])
    assert first.body("m")["return_token_ids"] is True
    assert "return_token_ids" not in second.body("m")


@pytest.mark.parametrize(
    "options",
    [
        {"input_mean": 300, "turns": 4},
        {"output_mean": 600, "prefix_groups": 1, "prefix_tokens": 1000},
        {"prefix_groups": 1, "prefix_tokens": 2047},
    ],
)
def test_what_turns_and_prefixes_leave_no_room_for_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(input_mean|output_mean|max_context): .*less the prefix, split over all"):
        draw(1, **options)


def test_a_mean_that_zipf_cannot_have_is_named_with_its_option() -> None:
    with pytest.raises(ValueError, match=r"^output_mean: .* too much for zipf: at most 512.5"):
        draw(1, workload="synthetic", output_lengths="zipf", output_mean=600)


@pytest.mark.parametrize(
    "options",
    [
        {"input_mean": 1024},
        {"output_mean": 5000},
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


def test_a_chat_asks_for_the_same_work_as_a_completion() -> None:
    request = Request(0, "Hello", 12, 0.0, 5, history=(("Hi", "Ho"),))
    completion, chat = request.body("m"), request.chat_body("m")
    assert chat.pop("messages") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hello"},
    ]
    assert completion.pop("prompt") == "Hello"
    assert chat == completion


def test_token_ids_are_no_chat() -> None:
    with pytest.raises(ValueError, match="request 3: a chat needs text"):
        Request(3, (300, 301), 12, 0.0, 5).chat_body("m")
