"""Live statistics over time and over processes."""

from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.live.statistics import HISTORY_SECONDS, WINDOW_SECONDS, Live
from loadtest.records import ErrorKind, Phase, Record


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(clock: Clock) -> Live:
    return Live(clock=clock)


def ended(target: str = "hf", ttft: float = 0.1, error: ErrorKind | None = None, phase: Phase = "measured") -> Record:
    first = int(ttft * 1e9)
    return Record(
        index=0, target=target, phase=phase, max_tokens=5, scheduled_ns=-1_000_000, sent_ns=0, end_ns=first,
        error=error, prompt_tokens=3, output_tokens=5, chunk_ns=[first, first + 400_000_000],
    )  # fmt: skip


def send(live: Live, count: int = 1, **fields: Any) -> None:
    for _ in range(count):
        record = ended(**fields)
        live.begin(record.target)
        live.add(record)


def deliver(worker: Live, master: Live) -> None:
    master.merge(worker.name, msgpack.loads(msgpack.dumps(worker.report()), strict_map_key=False))


def test_a_request_is_in_flight_from_begin_until_its_record(live: Live) -> None:
    live.begin("hf")
    live.begin("hf")
    live.begin("vllm")
    live.add(ended("hf", error="reset"))
    assert {target: tally.in_flight for target, tally in live.run.items()} == {"hf": 1, "vllm": 1}


def test_the_whole_test_counts_all_requests_but_times_only_measured_ones(live: Live) -> None:
    send(live, 3, phase="warmup", ttft=9)
    send(live, 2, phase="measured", ttft=0.1)
    send(live, 1, phase="drain", ttft=9)
    send(live, 1, phase="measured", error="timeout")
    tally = live.run["hf"]
    assert tally.outcomes == {"ok": 6, "timeout": 1}
    assert tally.times["ttft"].count == 2
    assert tally.percentiles("ttft", 1) == pytest.approx([0.1], rel=0.01)


def test_a_point_is_over_the_last_seconds_warm_up_included(live: Live, clock: Clock) -> None:
    for phase in ("warmup", "measured"):
        for _ in range(5):
            send(live, 4, phase=phase, ttft=0.1 if phase == "warmup" else 0.8)
            send(live, 1, phase=phase, error="reset")
            clock.now += 1
    at_5, at_10 = (live.points(-1, running=True)[second].targets["hf"] for second in (4, 9))
    assert at_5.requests_per_second == at_10.requests_per_second == 4
    assert at_10.output_tokens_per_second == 25
    assert at_10.failed_per_second == {"reset": 1}
    assert at_5.times["ttft"] == pytest.approx([0.1] * 3, rel=0.01)
    assert at_10.times["ttft"] == pytest.approx([0.8] * 3, rel=0.01)


def test_the_first_points_are_means_over_the_seconds_there_were(live: Live, clock: Clock) -> None:
    for _ in range(3):
        send(live, 6)
        clock.now += 1
    assert [point.targets["hf"].requests_per_second for point in live.points(-1, running=True)] == [6, 6, 6]


def test_a_point_knows_what_was_in_flight_then_also_when_asked_later(live: Live, clock: Clock) -> None:
    for change in (+3, +1, 0, -2, -2):
        for _ in range(change):
            live.begin("hf")
        for _ in range(-change):
            live.add(ended("hf"))
        clock.now += 1
    assert [point.targets["hf"].in_flight for point in live.points(-1, running=True)] == [3, 4, 4, 2, 0]


def test_a_second_is_told_once_it_is_over_and_what_is_told_is_not_told_again(live: Live, clock: Clock) -> None:
    send(live)
    assert live.points(-1, running=True) == []
    clock.now += 2.5
    assert [point.second for point in live.points(-1, running=True)] == [0, 1]
    assert [point.second for point in live.points(0, running=True)] == [1]
    assert live.points(1, running=True) == []


def test_a_server_that_has_stalled_shows_as_zero_while_the_test_runs(live: Live, clock: Clock) -> None:
    send(live)
    clock.now += WINDOW_SECONDS + 1
    last = live.points(-1, running=True)[-1].targets["hf"]
    assert last.requests_per_second == 0
    assert last.times["ttft"] is None


def test_after_the_test_the_points_stop_at_its_last_request(live: Live, clock: Clock) -> None:
    clock.now += 3
    send(live)
    clock.now += 500
    assert [point.second for point in live.points(-1, running=False)] == [0, 1, 2, 3]


def test_a_long_test_keeps_the_last_points_and_not_more(live: Live, clock: Clock) -> None:
    for _ in range(3 * HISTORY_SECONDS):
        send(live)
        clock.now += 1
    seconds = [point.second for point in live.points(-1, running=True)]
    assert seconds == list(range(2 * HISTORY_SECONDS, 3 * HISTORY_SECONDS))
    assert all(point.targets["hf"].requests_per_second == 1 for point in live.points(-1, running=True))
    assert len(live._seconds) <= HISTORY_SECONDS + WINDOW_SECONDS + 1


def test_a_page_that_is_opened_after_months_gets_the_last_points_at_once(live: Live, clock: Clock) -> None:
    clock.now += 1e7
    assert len(live.points(-1, running=True)) == HISTORY_SECONDS


def test_a_new_test_starts_from_nothing(live: Live, clock: Clock) -> None:
    send(live, 5)
    live.client(0.5, 0.001)
    clock.now += 2
    live.points(-1, running=True)
    clock.now += 7
    live.reset()
    clock.now += 1
    send(live, 2)
    clock.now += 1
    points = live.points(-1, running=True)
    assert [point.second for point in points] == [0, 1]
    assert points[1].targets["hf"].requests_per_second == 1
    assert live.run["hf"].outcomes == {"ok": 2}
    assert live.clients == {}


def test_what_the_client_measures_of_itself_stands_beside_how_late_it_sent(live: Live, clock: Clock) -> None:
    send(live, 3)
    live.client(cpu_share=0.25, lag_p99=0.002)
    (name, client), *others = live.clients.items()
    assert (name, others) == ("local", [])
    assert (client.cpu_share, client.lag_p99_seconds) == (0.25, 0.002)
    assert client.send_lateness_p99_seconds == pytest.approx(0.001, rel=0.01)
    clock.now += 1
    assert live.points(-1, running=True)[0].cpu_shares == {"local": 0.25}


parts = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["hf", "vllm"]),
        st.floats(1e-4, 100),
        st.sampled_from([None, "reset", "http_5xx"]),
        st.sampled_from(["warmup", "measured"]),
        st.booleans(),
    ),
    max_size=60,
)


@given(parts)
def test_three_workers_make_the_numbers_of_one_process(requests: list[Any]) -> None:
    clock = Clock()
    alone, master = Live(clock=clock), Live("master", clock=clock)
    workers = [Live(f"worker-{i}", clock=clock) for i in range(3)]
    for worker, target, ttft, error, phase, time_passes in requests:
        for live in (alone, workers[worker]):
            send(live, target=target, ttft=ttft, error=error, phase=phase)
        clock.now += time_passes
        if time_passes:
            deliver(workers[worker], master)
    for worker in workers:
        deliver(worker, master)
    clock.now += 1
    assert master.points(-1, running=True) == alone.points(-1, running=True)
    assert master.run.keys() == alone.run.keys()
    for target, tally in alone.run.items():
        merged = master.run[target]
        assert merged.outcomes == tally.outcomes
        assert (merged.in_flight, merged.prompt_tokens, merged.output_tokens) == (
            (tally.in_flight, tally.prompt_tokens, tally.output_tokens)
        )
        for metric, times in tally.times.items():
            assert merged.percentiles(metric, 0.5, 0.99) == pytest.approx(times.percentiles(0.5, 0.99), rel=1e-9)


def test_a_report_holds_only_what_is_new(clock: Clock) -> None:
    worker, master = Live("worker-0", clock=clock), Live("master", clock=clock)
    send(worker, 3)
    for _ in range(2):
        deliver(worker, master)
    assert master.run["hf"].outcomes == {"ok": 3}


def test_a_worker_whose_clock_began_elsewhere_counts_in_the_right_second(clock: Clock) -> None:
    there = Clock(7.0)
    worker, master = Live("worker-0", clock=there), Live("master", clock=clock)
    for _ in range(3):
        send(worker)
        there.now += 1
        clock.now += 1
        deliver(worker, master)
    clock.now += 1
    assert [point.targets["hf"].requests_per_second for point in master.points(-1, running=True)] == [1, 1, 1, 0.75]


def test_the_master_waits_for_the_workers_before_it_tells_of_a_second(clock: Clock) -> None:
    master = Live("master", delay_seconds=5, clock=clock)
    clock.now += 5.9
    assert master.points(-1, running=True) == []
    clock.now += 0.2
    assert [point.second for point in master.points(-1, running=True)] == [0]


def test_the_requests_of_a_lost_worker_are_no_longer_in_flight(clock: Clock) -> None:
    master = Live("master", clock=clock)
    lost, stays = workers = [Live("worker-0", clock=clock), Live("worker-1", clock=clock)]
    for worker in workers:
        send(worker, 2)
        worker.begin("hf")
        worker.client(0.1, 0.001)
        deliver(worker, master)
    clock.now += 3
    assert master.processes() == {"worker-0", "worker-1"}
    master.forget(lost.name)
    clock.now += 1
    assert master.run["hf"].in_flight == 1
    assert master.run["hf"].outcomes == {"ok": 4}
    assert [point.targets["hf"].in_flight for point in master.points(-1, running=True)] == [2, 2, 2, 1]
    assert master.processes() == set(master.clients) == {stays.name}


def test_a_worker_that_was_only_taken_for_lost_is_back_with_its_requests(clock: Clock) -> None:
    worker, master = Live("worker-0", clock=clock), Live("master", clock=clock)
    for _ in range(3):
        worker.begin("hf")
    deliver(worker, master)
    master.forget(worker.name)
    assert master.run["hf"].in_flight == 0
    worker.add(ended("hf"))
    deliver(worker, master)
    assert master.run["hf"].in_flight == 2
    clock.now += 1
    assert [point.targets["hf"].in_flight for point in master.points(-1, running=True)] == [2]
