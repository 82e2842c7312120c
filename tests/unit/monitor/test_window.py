"""Windows of the timeline as Arrow."""

import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor import window
from monitor.timeline import Clocks, Series, Timeline
from monitor.window import SCHEMA, Rows, stream, table, thin
from tests.unit.monitor.test_timeline import Clock

RSS = Series("host_rss_bytes", server="hf")
USED = Series("gpu_memory_used_bytes", gpu="1")
THROTTLED = Series("gpu_throttled", gpu="0/1", detail="hw_slowdown")
Sample = tuple[int, str, float]
samples = st.lists(st.tuples(st.integers(1, 20), st.sampled_from("ab"), st.integers(-3, 3).map(float)), max_size=60)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def times(whole: pa.Table) -> list[int]:
    return [int(time_ns) for time_ns in whole["time_ns"].to_pylist()]


def play(given: Sequence[Sample]) -> tuple[Timeline, list[Sample]]:
    """Put each sample, so many ns after the one before, in the ring of its series' name."""
    clock = Clock()
    timeline = Timeline(clock.both)
    rings = {name: timeline.ring(name, 1000, 1) for name in "ab"}
    stamped = []
    for gap, name, value in given:
        clock.time_ns += gap
        rings[name].append({Series(name): value})
        stamped.append((clock.time_ns, name, value))
    return timeline, stamped


def rows(whole: pa.Table) -> list[Sample]:
    return [(row["time_ns"], row["metric"], row["value"]) for row in whole.to_pylist()]


def extremes(stamped: Sequence[Sample], step_ns: int) -> set[tuple[int, str, float]]:
    """Of each step and series the smallest and the largest value, without their moments."""
    groups: dict[tuple[int, str], list[float]] = {}
    for time_ns, name, value in stamped:
        groups.setdefault((time_ns // step_ns, name), []).append(value)
    return {(step, name, edge(kept)) for (step, name), kept in groups.items() for edge in (min, max)}


def test_a_window_holds_its_start_and_not_its_end(clock: Clock) -> None:
    timeline = Timeline(clock.both)
    ring = timeline.ring("host", 100, 1)
    for clock.time_ns in (10, 20, 30, 40):
        ring.append({RSS: clock.time_ns})
    assert times(table(timeline.rings, 20, 40)) == [20, 30]


def test_rows_carry_both_clocks_and_null_for_what_does_not_apply(clock: Clock) -> None:
    timeline = Timeline(clock.both)
    clock.time_ns = 5
    timeline.ring("host", 9, 2).append({RSS: 7.0})
    timeline.ring("gpu1", 9, 2).append({USED: 8.5, THROTTLED: 1.0})
    common = {"time_ns": 5, "wall_ns": 1_000_005, "server": None, "gpu": None, "detail": None}
    assert table(timeline.rings, 0, 10).to_pylist() == [
        common | {"metric": "host_rss_bytes", "server": "hf", "value": 7.0},
        common | {"metric": "gpu_memory_used_bytes", "gpu": "1", "value": 8.5},
        common | {"metric": "gpu_throttled", "gpu": "0/1", "detail": "hw_slowdown", "value": 1.0},
    ]


def test_values_stay_with_their_series_when_a_column_is_given_to_another(clock: Clock) -> None:
    timeline = Timeline(clock.both)
    ring = timeline.ring("host", 4, 2)
    series = {name: Series(name) for name in "abc"}
    stays, leaves, comes = series.values()
    for clock.time_ns in range(12):
        ring.append({leaves if clock.time_ns < 5 else comes: clock.time_ns, stays: -clock.time_ns})
        kept = range(max(0, clock.time_ns - 3), clock.time_ns + 1)
        expected = {(moment, "a", -float(moment)) for moment in kept}
        expected |= {(moment, "b", float(moment)) for moment in kept if moment < 5}
        # There is room for it once the other is forgotten.
        expected |= {(moment, "c", float(moment)) for moment in kept if moment >= 9}
        assert set(rows(table(timeline.rings, 0, 100))) == expected


@pytest.mark.parametrize("until_ns", [0, 100])
@pytest.mark.parametrize("step_ns", [None, 10])
def test_the_stream_has_the_same_columns_with_and_without_rows(
    clock: Clock, until_ns: int, step_ns: int | None
) -> None:
    timeline = Timeline(clock.both)
    timeline.ring("host", 100, 1).append({RSS: 7.0})
    timeline.ring("gpu0", 100, 1)
    read = pa.ipc.open_stream(b"".join(stream(timeline.rings, 0, until_ns, step_ns))).read_all()
    assert read.schema == SCHEMA
    assert read.num_rows == min(until_ns, 1)


@given(samples, st.integers(1, 5), st.integers(0, 300), st.integers(0, 300))
def test_rows_of_all_rings_come_in_the_order_of_time_in_batches_of_any_size(
    given: list[Sample], batch: int, since_ns: int, until_ns: int
) -> None:
    timeline, stamped = play(given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "BATCH_TICKS", batch)
        pieces = list(window.batches(timeline.rings, since_ns, until_ns))
        read = pa.ipc.open_stream(b"".join(stream(timeline.rings, since_ns, until_ns))).read_all()
    assert rows(read) == [sample for sample in stamped if since_ns <= sample[0] < until_ns]
    assert all(piece.num_rows <= 2 * batch for piece in pieces)


@given(samples, st.integers(1, 5), st.integers(1, 60))
def test_a_step_keeps_the_extremes_of_each_series_at_their_own_times(
    given: list[Sample], batch: int, step_ns: int
) -> None:
    timeline, stamped = play(given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "BATCH_TICKS", batch)
        kept = rows(table(timeline.rings, 0, 10**6, step_ns))
    assert set(kept) <= set(stamped)
    assert times(table(timeline.rings, 0, 10**6, step_ns)) == sorted(time_ns for time_ns, _, _ in kept)
    assert extremes(kept, step_ns) == extremes(stamped, step_ns)
    assert len(kept) <= len({(step, name) for step, name, _ in extremes(stamped, step_ns)}) * 2


def test_a_spike_of_one_sample_survives_a_step_of_the_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "BATCH_TICKS", 100)
    timeline, _ = play([(1, "a", 5.0)] * 400 + [(1, "a", 99.0)] + [(1, "a", 5.0)] * 400)
    assert rows(table(timeline.rings, 0, 10**6, 10**6)) == [(1, "a", 5.0), (401, "a", 99.0)]


def test_thinning_nothing_leaves_nothing() -> None:
    empty = np.empty(0, np.int64)
    assert len(thin(Rows(empty, empty, empty, empty.astype(float)), 10).time_ns) == 0


def test_a_reader_beside_a_writer_that_wraps_the_ring_sees_whole_rows_in_order() -> None:
    timeline = Timeline()
    ring = timeline.ring("gpu0", 500, 2)
    one, other = (ring.column(Series(name)) for name in ("a", "b"))
    assert (one, other) == (0, 1)
    done = threading.Event()

    def write() -> None:
        number = 0.0
        while not done.is_set():
            ring.put((number, number))
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            read = table(timeline.rings, 0, 2**63 - 1)
            values = read["value"].to_numpy().reshape(-1, 2)
            assert (values[:, 0] == values[:, 1]).all()
            assert (np.diff(values[:, 0]) == 1).all()
    finally:
        done.set()
        writer.join()


def test_what_was_asked_for_up_to_now_is_never_followed_by_something_older() -> None:
    now_ns, waiting = 0, threading.Event()

    def wall_ns() -> int:
        # The stamp is taken; the row is not yet written.
        waiting.set()
        threading.Event().wait(0.02)
        return 0

    timeline = Timeline(Clocks(lambda: now_ns, wall_ns))
    ring = timeline.ring("gpu0", 10, 1)
    writer = threading.Thread(target=ring.append, args=({RSS: 1.0},))
    writer.start()
    waiting.wait()
    now_ns = 5
    assert times(table(timeline.rings, 0, now_ns)) == [0]
    writer.join()
