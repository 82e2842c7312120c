"""What Locust's own table is told of each request."""

from typing import Any

import pytest
from locust.env import Environment

from loadtest.live.statistics import Live
from loadtest.records import Record
from loadtest.users import Table

MS = 1_000_000


def request(**changes: Any) -> Record:
    fields: dict[str, Any] = {"index": 0, "target": "hf", "phase": "measured", "max_tokens": 2, "sent_ns": 5 * MS}
    return Record(**fields | {"end_ns": 300 * MS, "chunk_ns": [105 * MS, 205 * MS]} | changes)


@pytest.fixture
def table() -> Table:
    environment = Environment()
    environment.create_local_runner()
    return Table(environment, Live())


def test_a_failure_is_counted_and_is_in_no_latency(table: Table) -> None:
    for changes in ({}, {"error": "connect", "chunk_ns": [], "end_ns": 6 * MS}, {"error": "truncated"}):
        table.add(request(**changes))
    total = table._environment.stats.total
    assert (total.num_requests, total.num_failures) == (3, 2)
    assert (total.min_response_time, total.avg_response_time, total.max_response_time) == (200, 200, 200)
    assert total.get_response_time_percentile(0.01) == 200


def test_a_request_that_the_end_of_the_test_cut_off_is_neither_a_success_nor_a_failure(table: Table) -> None:
    table.add(request(error="cancelled"))
    total = table._environment.stats.total
    assert (total.num_requests, total.num_failures) == (0, 0)
