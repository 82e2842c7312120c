"""Drawing tokens, against the distribution that Transformers' own warpers make of the same scores."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from servers.hf.jobs import GREEDY_BELOW, Sampling
from servers.hf.sampling import Draw, Sampler

CPU = torch.device("cpu")
EOS = 2
# Probabilities from 0.45 down to 0.003, in no order.
SCORES = torch.tensor([1.5, -1.0, 3.0, 2.0, 0.0, -2.0, 2.5, 1.0])


def sampling(**fields: Any) -> Sampling:
    return Sampling(**{"max_tokens": 100, **fields})


def sampler(rows: list[Sampling], eos: int = EOS) -> Sampler:
    return Sampler([Draw.of(row, CPU) for row in rows], CPU, frozenset([eos]))


def tokens(rows: list[Sampling], scores: torch.Tensor, made: int = 0) -> list[int]:
    """The tokens of rows that begin to draw."""
    chosen: list[int] = sampler(rows)(scores.clone(), [made] * len(rows)).argmax(dim=-1).tolist()
    return chosen


def reference(row: Sampling, scores: torch.Tensor) -> torch.Tensor:
    """The probabilities of one row, as Transformers makes them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(row.temperature)])
    if row.top_k > 0:
        warpers.append(TopKLogitsWarper(row.top_k))
    if row.top_p < 1:
        warpers.append(TopPLogitsWarper(row.top_p))
    probabilities: torch.Tensor = warpers(None, scores[None].clone())[0].softmax(dim=-1)
    return probabilities


def assert_drawn_from(expected: torch.Tensor, drawn: list[int]) -> None:
    """Fail if the draws are unlikely to come from the probabilities, by Pearson's chi-square test."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0, f"drawn but not allowed: {counts}"
    wanted = expected.double() * len(drawn)
    # Rare ones are left out, as their counts are far from a normal distribution.
    often = wanted >= 5
    statistic = ((counts - wanted)[often] ** 2 / wanted[often]).sum()
    freedom = max(1, int(often.sum()) - 1)
    chance = torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2)
    assert chance > 1e-3, (counts, wanted)


WAYS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_k": -1},
    {"top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_draws_have_the_distribution_that_transformers_makes(way: dict[str, Any]) -> None:
    row, count = sampling(**way), 20_000
    torch.manual_seed(1)
    assert_drawn_from(reference(row, SCORES), tokens([row] * count, SCORES.repeat(count, 1)))


def test_one_seed_draws_from_the_distribution_token_after_token() -> None:
    row = sampling(seed=5, temperature=1.2, top_p=0.95)
    draw = sampler([row])
    drawn = [int(draw(SCORES[None].clone(), [made]).argmax()) for made in range(4000)]
    assert_drawn_from(reference(row, SCORES), drawn)


def test_neighbouring_seeds_draw_independently() -> None:
    rows = [sampling(seed=seed) for seed in range(4000)]
    drawn = tokens(rows, SCORES.repeat(len(rows), 1))
    assert_drawn_from(SCORES.softmax(dim=-1), drawn)
    pairs = [8 * first + second for first, second in zip(drawn[::2], drawn[1::2], strict=True)]
    assert_drawn_from(torch.outer(SCORES.softmax(dim=-1), SCORES.softmax(dim=-1)).flatten(), pairs)


@given(
    scores=st.lists(st.integers(-400, 400), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.3, 0.6, 0.9, 0.99, 1.0]),
)
@settings(max_examples=60)
def test_no_token_is_drawn_that_transformers_would_cut(
    scores: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    row = sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.tensor(scores) / 100
    expected = reference(row, logits)
    torch.manual_seed(0)
    drawn = set(tokens([row] * 400, logits.repeat(400, 1)))
    assert all(expected[token] > 0 for token in drawn)
    assert drawn >= {token for token, chance in enumerate(expected.tolist()) if chance > 0.1}


def test_the_least_top_p_leaves_the_likeliest_token() -> None:
    # Less than the least float32: it must not cut all there is.
    assert tokens([sampling(top_p=1e-50)], SCORES[None]) == [int(SCORES.argmax())]


def test_greedy_rows_are_left_as_they_are() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [sampling(temperature=0), sampling(seed=1), sampling(temperature=GREEDY_BELOW / 2)]
    changed = sampler(rows)(scores.clone(), [0] * 3)
    assert torch.equal(changed[[0, 2]], scores[[0, 2]])
    assert not torch.equal(changed[1], scores[1])


def test_a_batch_of_greedy_rows_is_not_touched_and_says_so() -> None:
    greedy = sampling(temperature=0)
    assert sampler([greedy] * 2).idle
    assert sampler([greedy, sampling(temperature=0, min_tokens=3, ignore_eos=True)]).idle
    scores = SCORES.repeat(2, 1)
    assert sampler([greedy] * 2)(scores, [0, 0]) is scores
    assert torch.equal(scores, SCORES.repeat(2, 1))
    assert not sampler([greedy, sampling()]).idle
    assert not sampler([greedy, sampling(temperature=0, min_tokens=3)]).idle


def test_a_temperature_just_above_greedy_takes_the_likeliest_token() -> None:
    assert tokens([sampling(temperature=GREEDY_BELOW)] * 50, 50 * SCORES.repeat(50, 1)) == [int(SCORES.argmax())] * 50


def sequence(row: Sampling, company: list[Sampling], at: int) -> list[int]:
    """Twenty tokens of a row that is at a place among others, each step with scores of its own."""
    rows = [*company[:at], row, *company[at:]]
    draw = sampler(rows)
    drawn = []
    for made in range(20):
        own = torch.randn(500, generator=torch.Generator().manual_seed(made))
        scores = torch.randn(len(rows), 500)
        scores[at] = own
        drawn.append(int(draw(scores, [made] * len(rows))[at].argmax()))
    return drawn


@pytest.mark.parametrize("way", [{}, {"top_k": 20, "top_p": 0.9}, {"temperature": 0.3}], ids=str)
def test_a_seed_gives_the_same_tokens_in_any_company(way: dict[str, Any]) -> None:
    row = sampling(seed=11, **way)
    alone = sequence(row, [], 0)
    others = [sampling(), sampling(temperature=0), sampling(seed=11), sampling(seed=3, top_k=2, top_p=0.5)]
    assert [sequence(row, others, at) for at in range(5)] == [alone] * 5
    assert sequence(row, others[:1], 1) == alone
    assert len(set(alone)) > 5
    assert sequence(sampling(seed=12, **way), [], 0) != alone


def test_a_seed_may_be_negative_and_64_bits_wide() -> None:
    rows = [sampling(seed=seed) for seed in (-(2**63), -1, 0, 2**63 - 1)]
    drawn = [sequence(row, [], 0) for row in rows]
    assert drawn == [sequence(row, [], 0) for row in rows]
    # A generator on a CPU takes the lower 32 bits.
    assert drawn[1] != drawn[2]


def test_rows_without_a_seed_draw_different_tokens() -> None:
    torch.manual_seed(0)
    assert len(set(tokens([sampling()] * 200, SCORES.repeat(200, 1)))) > 4


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_end_is_not_drawn_before_the_least_number_of_tokens(temperature: float) -> None:
    scores = SCORES.repeat(200, 1)
    scores[:, EOS] = 9.0
    short, free = (sampling(temperature=temperature, min_tokens=least) for least in (3, 0))
    torch.manual_seed(0)
    assert EOS not in tokens([short] * 200, scores, made=2)
    assert tokens([short] * 200, scores, made=3).count(EOS) > 150
    assert tokens([free] * 200, scores, made=0).count(EOS) > 150


def test_the_end_is_a_token_like_others_when_it_is_ignored() -> None:
    scores = SCORES.repeat(2, 1)
    scores[:, EOS] = 30.0
    rows = [sampling(min_tokens=3, ignore_eos=ignore, temperature=t) for ignore, t in ((True, 0), (True, 1.0))]
    assert tokens(rows, scores) == [EOS, EOS]


def test_each_row_counts_its_own_tokens() -> None:
    scores = SCORES.repeat(3, 1)
    scores[:, EOS] = 30.0
    row = sampling(temperature=0, min_tokens=4)
    assert sampler([row] * 3)(scores, [3, 4, 5]).argmax(dim=-1).tolist() == [6, EOS, EOS]


def test_a_model_without_an_end_can_have_a_least_number_of_tokens() -> None:
    row = sampling(temperature=0, min_tokens=4)
    draw = Sampler([Draw.of(row, CPU)], CPU, frozenset())
    assert draw(SCORES[None].clone(), [0]).argmax() == SCORES.argmax()
