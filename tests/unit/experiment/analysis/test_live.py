"""Live tokens: the ledger held against itself, and the bounds held against servers that are played step by step."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiment.analysis import requests
from experiment.analysis.live import Cache, caches
from loadtest.records import Record
from tests.unit.experiment.folders import kv_row, kv_table, make_record, paged_row

STEP = 1_000_000


def request(**changes: Any) -> Record:
    """Prompt of 40, then tokens at 10, 20, 30 and 40."""
    fields = {"target": "vllm", "sent_ns": 0, "end_ns": 41, "prompt_tokens": 40, "chunk_tokens": [1] * 4}
    return make_record(**fields | {"chunk_ns": [10, 20, 30, 40]} | changes)


def bounds(row: dict[str, Any], *records: Record) -> tuple[float, float]:
    cache = caches({"vllm": kv_table(row)}, {"vllm": [requests.of(records)]})["vllm"]
    return float(cache.counts["live_low"][0]), float(cache.counts["live_high"][0])


def test_a_ledger_that_adds_up_is_taken_as_it_is() -> None:
    cache = caches({"hf": kv_table(kv_row(10))}, {})["hf"]
    assert (cache.source, cache.token_bytes, cache.block_size) == ("ledger", 4096, None)
    assert (cache.time_ns.tolist(), cache.broken.tolist()) == ([10], [False])
    assert {name: values.tolist() for name, values in cache.counts.items() if name.endswith("_high")} == {
        "live_high": [6],
        "reserved_high": [3],
        "padding_high": [1],
        "finished_high": [0],
        "fragmentation_high": [0],
    }


@pytest.mark.parametrize("wrong", [{"live": 7}, {"padding": 0}, {"allocated": 9}, {"capacity": 9}])
def test_a_ledger_that_does_not_add_up_is_marked(wrong: dict[str, int]) -> None:
    cache = caches({"hf": kv_table(kv_row(0), kv_row(10, **wrong), kv_row(20))}, {})["hf"]
    assert cache.broken.tolist() == [False, True, False]
    assert len(cache.counts["allocated"]) == 3


def test_failed_and_skipped_scrapes_are_counted_as_missed() -> None:
    failed = {"asked_ns": 10, "answered_ns": 11, "skipped": 2, "error": "TimeoutError: "}
    cache = caches({"hf": kv_table(kv_row(0), failed, kv_row(20, skipped=4))}, {})["hf"]
    assert len(cache.time_ns) == 2
    assert (cache.missed_ns.tolist(), cache.missed.tolist()) == ([0, 10, 20], [0, 3, 4])


def test_a_server_without_a_good_sample_has_no_cache() -> None:
    assert caches({"hf": kv_table({"asked_ns": 0, "answered_ns": 1, "error": "x"}), "vllm": kv_table()}, {}) == {}


def test_what_a_token_takes_is_known_of_each_server_without_the_other() -> None:
    def sizes(**rows: dict[str, Any]) -> dict[str, int | None]:
        tables = {target: kv_table(row) for target, row in rows.items()}
        return {target: cache.token_bytes for target, cache in caches(tables, {}).items()}

    assert sizes(vllm=paged_row(0, bytes_per_token=512)) == {"vllm": 512}
    assert sizes(vllm=paged_row(0, bytes_per_token=None), hf=kv_row(0)) == {"vllm": None, "hf": 4096}


def test_of_blocks_that_hold_no_known_number_of_tokens_only_capacity_and_use_are_known() -> None:
    rows = [paged_row(at, unit="blocks", capacity=100, allocated=used) for at, used in ((0, 7), (10, 101))]
    cache = caches({"vllm": kv_table(*rows)}, {"vllm": [requests.of([request()])]})["vllm"]
    assert (cache.source, cache.unit, cache.broken.tolist()) == ("unknown", "blocks", [False, True])
    assert {name: counts.tolist() for name, counts in cache.counts.items()} == {
        "capacity": [100, 100],
        "allocated": [7, 101],
    }


def test_a_request_in_the_middle_holds_what_was_seen_or_one_chunk_more() -> None:
    assert bounds(paged_row(15, allocated=48), request()) == (40, 42)
    assert bounds(paged_row(15, allocated=48, answered_ns=20), request()) == (40, 43)


def test_a_request_without_a_chunk_holds_nothing_or_all_of_its_prompt() -> None:
    assert bounds(paged_row(5, allocated=48), request()) == (0, 41)


def test_a_request_whose_last_chunk_is_next_may_have_been_freed() -> None:
    assert bounds(paged_row(35, allocated=0, running=0), request()) == (0, 0)
    assert bounds(paged_row(35, allocated=48), request()) == (32, 44)


def test_a_request_that_has_ended_holds_nothing() -> None:
    assert bounds(paged_row(40, allocated=16), request()) == (0, 0)
    assert bounds(paged_row(40, allocated=0, running=0), request()) == (0, 0)


def test_at_most_the_last_block_of_each_running_sequence_is_waste() -> None:
    many = [request(chunk_ns=[], chunk_tokens=[], error="timeout", output_tokens=None, prompt_tokens=None, end_ns=10)]
    assert bounds(paged_row(20, allocated=160, running=3), *many)[0] == 0
    busy = [request(prompt_tokens=500)]
    assert bounds(paged_row(35, allocated=160, running=3), *busy) == (160 - 48, 160)


def test_requests_that_wait_at_the_server_are_not_in_the_making() -> None:
    old, new = request(prompt_tokens=500), request(chunk_ns=[60, 70], chunk_tokens=[1, 1], end_ns=71)
    assert bounds(paged_row(35, allocated=480, running=1, waiting=1), old, new)[0] == 480 - 16
    assert bounds(paged_row(35, allocated=480, running=1, waiting=0), old, new)[0] == 480 - 16 - 40


def test_after_a_preemption_what_the_client_saw_is_no_lower_bound() -> None:
    rows = [paged_row(1, allocated=0, running=0), paged_row(15, allocated=0, running=0, waiting=1, preemptions=1)]
    cache = caches({"vllm": kv_table(*rows)}, {"vllm": [requests.of([request()])]})["vllm"]
    assert (cache.counts["live_low"][1], cache.broken[1]) == (0, False)
    before = [paged_row(-20, allocated=0, running=0), paged_row(-9, preemptions=1, allocated=0, running=0)]
    before.append(paged_row(15, preemptions=1, allocated=48))
    cache = caches({"vllm": kv_table(*before)}, {"vllm": [requests.of([request()])]})["vllm"]
    assert cache.counts["live_low"][2] == 40


def test_shared_prefixes_leave_the_bound_of_the_blocks() -> None:
    assert bounds(paged_row(15, allocated=48, prefix_caching=True), request()) == (32, 42)


def test_bounds_that_contradict_each_other_are_marked_and_kept() -> None:
    cache = caches({"vllm": kv_table(paged_row(15, allocated=32))}, {"vllm": [requests.of([request()])]})["vllm"]
    assert cache.broken.tolist() == [True]
    assert (cache.counts["live_low"][0], cache.counts["live_high"][0]) == (32, 32)
    nobody = caches({"vllm": kv_table(paged_row(15, allocated=32))}, {})["vllm"]
    assert nobody.broken.tolist() == [True]


@dataclass
class Sequence:
    """A request in a played server: how much of it is stored, when it was sent, when its chunks were seen."""

    prompt: int
    length: int
    sent: int
    stored: int = 0
    made: int = 0
    seen: list[int] = field(default_factory=list)

    @property
    def target(self) -> int:
        return self.prompt + max(0, self.made - 1) if self.made else self.prompt


def play(draw: random.Random, block: int, preempt: bool) -> tuple[list[dict[str, Any]], list[float], list[Record]]:
    """A paged server step by step: the samples of it, the true live tokens at each, and what its client recorded.

    A step takes STEP ns, computes a piece of each prompt and a token of each other sequence, and has the blocks of the
    next piece set aside already. A chunk reaches the client before the next step has ended.
    """
    todo = [Sequence(draw.randint(1, 60), draw.randint(2, 30), draw.randint(0, 20 * STEP)) for _ in range(8)]
    waiting: list[Sequence] = []
    running: list[Sequence] = []
    done: list[Sequence] = []
    rows: list[dict[str, Any]] = []
    truth: list[float] = []
    preemptions = 0
    for step in range(1, 400):
        now = step * STEP
        waiting += sorted((s for s in todo if s.sent < now - STEP), key=lambda s: s.sent)
        todo = [s for s in todo if s.sent >= now - STEP]
        if preempt and running and draw.random() < 0.1:
            victim = running.pop()
            victim.stored = 0
            waiting.insert(0, victim)
            preemptions += 1
        elif waiting and len(running) < 4:
            running.append(waiting.pop(0))
        for sequence in list(running):
            piece = 24 if not sequence.made else sequence.target + 1
            if sequence.stored < sequence.target:
                sequence.stored = min(sequence.target, sequence.stored + piece)
            else:
                sequence.stored += 1
            if sequence.stored >= sequence.target:
                sequence.made += 1
                sequence.seen.append(now + draw.randint(1, STEP - 1))
            if sequence.made == sequence.length:
                running.remove(sequence)
                done.append(sequence)
        ahead = [s.stored + (min(24, s.prompt - s.stored) if s.stored < s.prompt else 1) for s in running]
        allocated = sum(-(-tokens // block) * block for tokens in ahead)
        at = now + draw.randint(0, STEP - 1)
        row = {"asked_ns": max(at - draw.randint(0, STEP // 2), rows[-1]["answered_ns"] if rows else 0)}
        row |= {"answered_ns": at + draw.randint(0, STEP // 2), "allocated": allocated, "running": len(running)}
        row |= {"waiting": len(waiting), "preemptions": preemptions, "block_size": block, "capacity": 10**6}
        rows.append(paged_row(0) | row)
        truth.append(sum(s.stored for s in running))
        if len(done) == 8:
            break
    records = [
        request(
            prompt_tokens=s.prompt,
            output_tokens=s.length,
            sent_ns=s.sent,
            chunk_ns=s.seen,
            chunk_tokens=[1] * s.length,
            end_ns=s.seen[-1] + 1,
        )
        for s in done
    ]
    return rows, truth, records


@settings(max_examples=60)
@given(st.integers(0, 10**9), st.sampled_from([1, 4, 16, 64]), st.booleans())
def test_what_a_played_server_really_holds_is_within_the_bounds(seed: int, block: int, preempt: bool) -> None:
    rows, truth, records = play(random.Random(seed), block, preempt)
    cache: Cache = caches({"vllm": kv_table(*rows)}, {"vllm": [requests.of(records)]})["vllm"]
    assert not cache.broken.any()
    assert (cache.counts["live_low"] <= np.array(truth)).all()
    assert (np.array(truth) <= cache.counts["live_high"]).all()
