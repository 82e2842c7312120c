"""Plain Locust, done with care: a `FastHttpUser` that keeps a schedule, stamps each line, and parses after the end.

Lines are read with `readline` of the stream; `iter_lines` would wait until 1,024 bytes have come. The environment says
REQUESTS, RATE (a second), TOKENS and OUT, the file for what was seen: lines of request id, TTFT and gaps (seconds).
"""

import itertools
import json
import os
import time
from pathlib import Path

import gevent
from locust import FastHttpUser, task

REQUESTS, RATE, TOKENS = int(os.environ["REQUESTS"]), float(os.environ["RATE"]), int(os.environ["TOKENS"])


class Plain(FastHttpUser):
    """One user, who starts every request at its time in a greenlet of its own."""

    fixed_count = 1
    concurrency = REQUESTS

    @task
    def send_all(self) -> None:
        """Send all requests, write what was seen, and end the run."""
        begun = time.monotonic()
        waiting = []
        for number in range(REQUESTS):
            gevent.sleep(max(0.0, begun + number / RATE - time.monotonic()))
            waiting.append(gevent.spawn(self._send, number))
        seen = [greenlet.get() for greenlet in waiting]
        Path(os.environ["OUT"]).write_text("".join(json.dumps(row) + "\n" for row in seen if row))
        gevent.spawn(self.environment.runner.quit)
        gevent.sleep(10)

    def _send(self, number: int) -> dict[str, object] | None:
        body = {"model": "reference", "prompt": [300] * 8, "max_tokens": TOKENS, "stream": True}
        lines: list[tuple[int, bytes]] = []
        sent = time.monotonic_ns()
        name = {"X-Request-Id": f"plain-{number}"}
        with self.client.post("/v1/completions", json=body, headers=name, stream=True, catch_response=True) as answer:
            while line := answer.stream.readline(b"\n"):
                lines.append((time.monotonic_ns(), line))
            answer.success()
        return read(number, sent, lines)


def read(number: int, sent: int, lines: list[tuple[int, bytes]]) -> dict[str, object] | None:
    """From stamped lines to what the benchmark compares; nothing where tokens are missing."""
    stamps = []
    for stamp, line in lines:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]") and json.loads(line[6:])["choices"]:
            stamps.append(stamp)
    if len(stamps) != TOKENS:
        return None
    gaps = [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(stamps)]
    return {"key": f"plain-{number}", "ttft": (stamps[0] - sent) / 1e9, "gaps": gaps}
