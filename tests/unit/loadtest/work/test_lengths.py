"""Distributions of lengths: their means, their spreads and their bounds."""

import math
import random
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.work.lengths import DISTRIBUTIONS, Length, empirical

DRAWS = 20_000
LONGEST = 1024


def draw(length: Length, number: int = DRAWS, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [length(rng) for _ in range(number)]


def histogram(path: Path, text: str, longest: int = LONGEST, skip: bool = False) -> tuple[Length, Counter[str]]:
    file, skipped = path / "lengths.csv", Counter[str]()
    file.write_text(text)
    return empirical(file, longest, skip, skipped), skipped


@settings(max_examples=150)
@given(
    kind=st.sampled_from(list(DISTRIBUTIONS)),
    longest=st.integers(1, 4096),
    share=st.floats(0, 0.5),
    sigma=st.floats(0, 3),
    seed=st.integers(0),
)
def test_every_length_is_a_whole_number_from_one_to_the_longest(
    kind: str, longest: int, share: float, sigma: float, seed: int
) -> None:
    mean = 1 + share * (longest - 1)
    drawn = draw(DISTRIBUTIONS[kind](mean, sigma, longest), 50, seed)
    assert all(isinstance(length, int) and 1 <= length <= longest for length in drawn)
    assert drawn == draw(DISTRIBUTIONS[kind](mean, sigma, longest), 50, seed)


@pytest.mark.parametrize("kind", ["uniform", "normal", "lognormal", "zipf"])
@pytest.mark.parametrize(("mean", "sigma"), [(2, 1.0), (60, 0.4), (300, 1.5), (500, 0.8)])
def test_the_mean_is_the_one_asked_for_though_lengths_are_cut_at_both_ends(
    kind: str, mean: float, sigma: float
) -> None:
    drawn = draw(DISTRIBUTIONS[kind](mean, sigma, LONGEST))
    # Within 4 standard deviations of a mean of so many draws, and half a token that rounding may shift it by.
    rounding = 0.02 * mean if mean < 10 else 0.1
    assert fmean(drawn) == pytest.approx(mean, abs=4 * stdev(drawn) / math.sqrt(DRAWS) + rounding)


def test_constant_is_the_mean_every_time() -> None:
    assert set(draw(DISTRIBUTIONS["constant"](33.4, 2, LONGEST), 50)) == {33}


def test_uniform_lengths_fill_their_range_evenly() -> None:
    drawn = Counter(draw(DISTRIBUTIONS["uniform"](100, 0.1, LONGEST)))
    assert (min(drawn), max(drawn)) == (90, 110)
    assert all(drawn[length] == pytest.approx(DRAWS / 20, rel=0.15) for length in range(91, 110))


def test_uniform_keeps_its_mean_where_its_range_does_not_fit() -> None:
    drawn = draw(DISTRIBUTIONS["uniform"](3, 3, LONGEST))
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert fmean(drawn) == pytest.approx(3, abs=0.04)


def test_normal_has_the_standard_deviation_asked_for() -> None:
    drawn = draw(DISTRIBUTIONS["normal"](400, 0.2, LONGEST))
    assert stdev(drawn) == pytest.approx(80, rel=0.03)
    assert fmean(320 <= length <= 480 for length in drawn) == pytest.approx(0.6827, abs=0.015)


def test_lognormal_has_the_sigma_asked_for() -> None:
    drawn = draw(DISTRIBUTIONS["lognormal"](200, 0.5, 100_000))
    logs = [math.log(length) for length in drawn]
    assert stdev(logs) == pytest.approx(0.5, rel=0.03)
    assert fmean(logs) == pytest.approx(math.log(200) - 0.5**2 / 2, abs=0.015)


def test_zipf_falls_by_a_power_of_the_length() -> None:
    drawn = Counter(draw(DISTRIBUTIONS["zipf"](20, 0, LONGEST), 200_000))
    # ln(P(k)) is a straight line over ln(k): the same fall from 1 to 4 as from 4 to 16.
    fall = math.log(drawn[1] / drawn[4])
    assert fall > 1
    assert math.log(drawn[4] / drawn[16]) == pytest.approx(fall, rel=0.08)
    assert max(drawn) > LONGEST / 2


def test_zipf_refuses_a_mean_that_it_cannot_have() -> None:
    DISTRIBUTIONS["zipf"](50.5, 0, 100)
    with pytest.raises(ValueError, match=r"51 tokens is too much for zipf: at most 50\.5"):
        DISTRIBUTIONS["zipf"](51, 0, 100)


def test_more_spread_gives_longer_and_shorter_lengths() -> None:
    for kind in ("uniform", "normal", "lognormal"):
        narrow, wide = (draw(DISTRIBUTIONS[kind](100, sigma, LONGEST), 500) for sigma in (0.1, 0.8))
        assert min(wide) < min(narrow) < 100 < max(narrow) < max(wide)


def test_empirical_lengths_come_as_often_as_the_file_has_them(tmp_path: Path) -> None:
    length, skipped = histogram(tmp_path, "length,count\n5,1\n100,0\n7,3\n")
    drawn = Counter(draw(length))
    assert set(drawn) == {5, 7}
    assert drawn[7] / DRAWS == pytest.approx(0.75, abs=0.015)
    assert not skipped


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,1", "line 3: length: 'x': expected a whole number of 1 or more"),
        ("0,1", "line 3: length: '0': expected a whole number of 1 or more"),
        ("65,1", "line 3: length: '65': expected at most 64 (what max_context leaves)"),
        ("5,-1", "line 3: count: '-1': expected a whole number of 0 or more"),
        ("5,1.5", "line 3: count: '1.5': expected"),
        ("5", "line 3: count: None: expected"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: str, message: str) -> None:
    text = f"length,count\n5,1\n{line}\n"
    with pytest.raises(ValueError, match=r"lengths\.csv: ") as refused:
        histogram(tmp_path, text, longest=64)
    assert message in str(refused.value)
    length, skipped = histogram(tmp_path, text, longest=64, skip=True)
    assert set(draw(length, 20)) == {5}
    assert skipped == {"bad line": 1}


@pytest.mark.parametrize("text", ["", "length,count\n", "length,count\n5,0\n"])
def test_a_histogram_without_any_count_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="expected lines of length,count with a count above 0"):
        histogram(tmp_path, text)
