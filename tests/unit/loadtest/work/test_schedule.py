"""From options to times: that each arrival process is the one that its option names."""

from itertools import islice, pairwise
from statistics import fmean, stdev
from typing import Any

import pytest

from loadtest.options import Options
from loadtest.work.schedule import ARRIVALS, schedule


def offsets(number: int = 4000, **given: Any) -> list[float]:
    return list(islice(schedule(Options(**given)) or [], number))


def test_a_closed_loop_has_no_schedule() -> None:
    assert schedule(Options()) is None


@pytest.mark.parametrize(
    ("given", "variation"),
    [
        ({"arrival": "constant", "rate": 40}, 0),
        ({"arrival": "poisson", "rate": 40}, 1),
        ({"arrival": "gamma", "rate": 40, "burstiness": 0.25}, 2),
        ({"arrival": "steps", "stages": "40x1000"}, 1),
        ({"arrival": "steps", "stages": "40x1000", "burstiness": "inf"}, 0),
        ({"arrival": "ramp", "stages": "40-40x1000", "burstiness": 4}, 0.5),
    ],
)
def test_each_arrival_has_its_rate_and_its_variation(given: dict[str, Any], variation: float) -> None:
    gaps = [later - earlier for earlier, later in pairwise(offsets(**given))]
    assert fmean(gaps) == pytest.approx(1 / 40, rel=0.001 + 4 * variation / 4000**0.5)
    assert stdev(gaps) / fmean(gaps) == pytest.approx(variation, rel=0.1, abs=1e-6)


@pytest.mark.parametrize("given", [{"arrival": "poisson"}, {"arrival": "gamma", "burstiness": 0.25}])
@pytest.mark.parametrize(("turns", "count"), [(1, 42), (4, 11)])
def test_a_known_number_of_arrivals_has_exactly_the_rate(given: dict[str, Any], turns: int, count: int) -> None:
    given = given | {"rate": 2, "seed": 10_000_002_000_000_001}
    known = offsets(count, **given, requests=30, warmup=6, drain=6, turns=turns)
    plain = offsets(count, **given)
    assert known[-1] == pytest.approx(count / 2)
    assert known == pytest.approx([offset * known[-1] / plain[-1] for offset in plain])
    assert known[-1] != pytest.approx(plain[-1], rel=0.01)


def test_more_requests_than_can_be_looked_at_before_the_start_are_not_waited_for() -> None:
    given = {"arrival": "poisson", "rate": 2}
    assert offsets(50, requests=10**12, **given) == offsets(50, **given)


def test_the_seed_of_the_options_decides() -> None:
    given = {"arrival": "poisson", "rate": 3}
    assert offsets(50, seed=4, **given) == offsets(50, seed=4, **given) != offsets(50, seed=5, **given)


def test_nothing_is_scheduled_after_the_duration() -> None:
    assert offsets(arrival="constant", rate=2, duration=2) == [0, 0.5, 1, 1.5]
    assert max(offsets(arrival="poisson", rate=50, duration=10)) < 10
    assert max(offsets(arrival="poisson", rate=50, duration=10, requests=1000)) < 10


def test_every_open_arrival_has_a_process() -> None:
    field = Options.model_fields["arrival"].annotation
    assert set(ARRIVALS) | {"closed"} == set(getattr(field, "__args__", ()))
