"""When requests are sent: the statistics of each process, and that it is the same everywhere."""

import math
import random
from collections.abc import Iterator
from itertools import islice, pairwise, takewhile
from statistics import NormalDist, fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.work.arrivals import Stage, constant, gamma, parse_stages, poisson, replay, staged

EVEN = math.inf
rates = st.floats(0.01, 10_000)
stages = st.lists(st.builds(Stage, st.floats(0, 200), st.floats(0, 200), st.floats(0.1, 20)), min_size=1, max_size=4)


def gaps(offsets: Iterator[float], number: int = 30_000) -> list[float]:
    return [later - earlier for earlier, later in pairwise(islice(offsets, number))]


def variation(values: list[float]) -> float:
    return stdev(values) / fmean(values)


def processes(seed: int) -> dict[str, Iterator[float]]:
    return {
        "constant": constant(50),
        "poisson": poisson(50, random.Random(seed)),
        "gamma": gamma(50, 0.5, random.Random(seed)),
        "steps": staged(parse_stages("50x10,100x10"), 1, random.Random(seed)),
        "ramp": staged(parse_stages("1-100x20"), 1, random.Random(seed)),
    }


@pytest.mark.parametrize("name", ["constant", "poisson", "gamma", "steps", "ramp"])
def test_the_same_seed_gives_every_worker_the_same_offsets(name: str) -> None:
    first, second = (list(islice(processes(7)[name], 500)) for _ in range(2))
    assert first == second
    assert len(first) == 500


@pytest.mark.parametrize("name", ["poisson", "gamma", "steps", "ramp"])
def test_another_seed_gives_other_offsets(name: str) -> None:
    assert list(islice(processes(7)[name], 5)) != list(islice(processes(8)[name], 5))


@pytest.mark.parametrize("name", ["constant", "poisson", "gamma", "steps", "ramp"])
@pytest.mark.parametrize("workers", [2, 3])
def test_the_parts_of_the_workers_are_the_whole_process(name: str, workers: int) -> None:
    whole = list(islice(processes(7)[name], 600))
    parts = [list(islice(processes(7)[name], rank, 600, workers)) for rank in range(workers)]
    assert sorted(offset for part in parts for offset in part) == whole


@pytest.mark.parametrize("burstiness", [0.25, 1, 4])
def test_gamma_gaps_have_the_rate_and_the_variation_asked_for(burstiness: float) -> None:
    drawn = gaps(gamma(200, burstiness, random.Random(1)))
    # The mean within 4 of its standard deviations.
    assert fmean(drawn) * 200 == pytest.approx(1, abs=4 / math.sqrt(burstiness * len(drawn)))
    assert variation(drawn) == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)


@pytest.mark.parametrize("rate", [50, 200, 1000])
def test_poisson_gaps_are_exponential(rate: float) -> None:
    drawn = gaps(poisson(rate, random.Random(1)))
    assert fmean(drawn) == pytest.approx(1 / rate, rel=0.02)
    assert variation(drawn) == pytest.approx(1, abs=0.02)
    # Of an exponential, half lie below ln 2 of the mean, and one in twenty above ln 20.
    assert fmean(gap < math.log(2) / rate for gap in drawn) == pytest.approx(0.5, abs=0.01)
    assert fmean(gap > math.log(20) / rate for gap in drawn) == pytest.approx(0.05, abs=0.004)


def test_gamma_of_burstiness_one_is_poisson() -> None:
    drawn = [list(islice(process, 50)) for process in (gamma(9, 1, random.Random(3)), poisson(9, random.Random(3)))]
    assert drawn[0] == drawn[1]


def test_gamma_of_infinite_burstiness_is_constant() -> None:
    assert list(islice(gamma(9, EVEN, random.Random(3)), 50)) == list(islice(constant(9), 50))


def test_a_constant_rate_does_not_drift_in_a_long_run() -> None:
    offsets = list(islice(constant(0.3), 1_000_001))
    assert offsets[0] == 0
    assert offsets[1_000_000] == 1_000_000 / 0.3
    assert variation(gaps(constant(0.3))) < 1e-9


@given(rate=rates, seed=st.integers(0), burstiness=st.sampled_from([0.3, 1, 5, EVEN]))
def test_offsets_never_go_back(rate: float, seed: int, burstiness: float) -> None:
    offsets = list(islice(gamma(rate, burstiness, random.Random(seed)), 300))
    assert offsets[0] >= 0
    assert all(earlier <= later for earlier, later in pairwise(offsets))


@given(stages=stages, seed=st.integers(0), burstiness=st.sampled_from([0.3, 1, EVEN]))
def test_staged_offsets_never_go_back_nor_past_the_end(stages: list[Stage], seed: int, burstiness: float) -> None:
    offsets = list(islice(staged(stages, burstiness, random.Random(seed)), 5000))
    assert all(earlier <= later for earlier, later in pairwise(offsets))
    assert all(0 <= offset <= sum(stage.seconds for stage in stages) * (1 + 1e-12) for offset in offsets)


@given(stage=st.builds(Stage, st.floats(0, 500), st.floats(0.001, 500), st.floats(0.1, 100)), share=st.floats(0, 1))
def test_the_offset_is_where_the_cumulated_rate_has_the_value(stage: Stage, share: float) -> None:
    arrivals = share * stage.arrivals
    t = stage.offset(arrivals)
    cumulated = stage.begin * t + (stage.end - stage.begin) * t**2 / (2 * stage.seconds)
    assert cumulated == pytest.approx(arrivals, rel=1e-6, abs=1e-9 * stage.arrivals)


@pytest.mark.parametrize("stage", [Stage(28.97, 0, 14.08), Stage(3.41, 32.98, 14.41)])
def test_rounding_takes_no_arrival_past_the_end_of_its_stage(stage: Stage) -> None:
    last = math.nextafter(stage.arrivals, 0)
    assert 0.999 * stage.seconds < stage.offset(last) <= stage.seconds


def test_even_steps_are_evenly_spaced_inside_each_stage() -> None:
    offsets = list(staged(parse_stages("2x2,0x3,4x1"), EVEN, random.Random(0)))
    assert offsets == pytest.approx([0, 0.5, 1, 1.5, 5, 5.25, 5.5, 5.75])


def test_each_step_has_its_own_rate_and_exponential_gaps() -> None:
    offsets = list(staged(parse_stages("100x100,400x50"), 1, random.Random(2)))
    slow = [offset for offset in offsets if offset < 100]
    fast = offsets[len(slow) :]
    for part, rate, seconds in ((slow, 100, 100), (fast, 400, 50)):
        # Counts of a Poisson process: within 4 standard deviations.
        assert len(part) == pytest.approx(rate * seconds, abs=4 * math.sqrt(rate * seconds))
        assert variation(gaps(iter(part))) == pytest.approx(1, abs=0.04)
    assert offsets[-1] <= 150


def test_a_ramp_is_a_poisson_process_whose_rate_grows_in_a_straight_line() -> None:
    offsets = list(staged(parse_stages("10-190x200"), 1, random.Random(4)))
    assert len(offsets) == pytest.approx(20_000, abs=4 * math.sqrt(20_000))
    for quarter, rate in enumerate((32.5, 77.5, 122.5, 167.5)):
        within = sum(50 * quarter <= offset < 50 * (quarter + 1) for offset in offsets)
        assert within == pytest.approx(rate * 50, abs=4 * math.sqrt(rate * 50))
    # Put through the cumulated rate, the gaps must be exponential of mean 1.
    units = [10 * t + 180 * t**2 / 400 for t in offsets]
    unit_gaps = [later - earlier for earlier, later in pairwise(units)]
    assert variation(unit_gaps) == pytest.approx(1, abs=0.03)
    assert fmean(unit_gaps) == pytest.approx(1, abs=4 / math.sqrt(20_000))


def test_counts_of_a_ramp_vary_from_seed_to_seed_as_poisson_counts_do() -> None:
    counts = [len(list(staged(parse_stages("0-20x10"), 1, random.Random(seed)))) for seed in range(400)]
    assert fmean(counts) == pytest.approx(100, abs=2)
    # The spread of a standard deviation over 400 draws is some 3.5 %.
    assert stdev(counts) == pytest.approx(10, rel=NormalDist().inv_cdf(0.9999) * 0.036)


def test_a_ramp_down_ends_with_its_stage() -> None:
    offsets = list(staged([Stage(10, 0, 10)], EVEN, random.Random(0)))
    assert len(offsets) == 50
    assert offsets[-1] < 10
    assert list(takewhile(lambda offset: offset < 5, offsets)) == offsets[:38]


def test_a_trace_is_replayed_at_another_speed() -> None:
    assert list(replay([0, 1.5, 4], 0.5)) == [0, 0.75, 2]


def test_stages_are_read_from_text() -> None:
    assert parse_stages("5x30, 1.5-20x60") == (Stage(5, 5, 30), Stage(1.5, 20, 60))


@pytest.mark.parametrize(
    "text",
    ["", "5", "5x", "x30", "5x0", "-5x30", "5x30,", "5x30x2", "ax30", "5-x30", "1-2-3x4", "infx3", "nanx3", "5xinf"],
)
def test_a_bad_stage_is_named_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"stage '.*': expected RATExSECONDS or FROM-TOxSECONDS"):
        parse_stages(text)


def test_stages_without_any_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="sends nothing"):
        parse_stages("0x30,0-0x5")
