"""What Locust's own table is told of each request."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# A process of its own: Locust changes the whole process as soon as it is imported.
PROGRAM = """
import json

from locust.env import Environment

from loadtest.live.statistics import Live
from loadtest.records import Record
from loadtest.users import Table

environment = Environment()
environment.create_local_runner()
table = Table(environment, Live())
MS = 1_000_000
good = {"index": 0, "target": "hf", "phase": "measured", "max_tokens": 2, "sent_ns": 5 * MS, "end_ns": 300 * MS}
good |= {"chunk_ns": [105 * MS, 205 * MS]}
for changes in ({}, {"error": "connect", "chunk_ns": [], "end_ns": 6 * MS}, {"error": "reset"}, {"error": "cancelled"}):
    table.add(Record(**good | changes))
total = environment.stats.total
times = total.min_response_time, total.avg_response_time, total.max_response_time, total.get_response_time_percentile(0)
print(json.dumps({"requests": total.num_requests, "failures": total.num_failures, "times": times}))
environment.runner.quit()
"""


def test_a_failure_is_counted_and_in_no_latency_and_one_cut_off_by_the_end_of_the_test_is_neither() -> None:
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(said.stdout) == {"requests": 3, "failures": 2, "times": [200, 200, 200, 200]}
