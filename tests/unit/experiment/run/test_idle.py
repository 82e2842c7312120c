"""Between cells: servers that have nothing to do any more, and prefix caches that are empty."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from experiment.run import idle
from experiment.run.idle import prefix_tokens, settle, since
from experiment.run.stack import Remote, RunError, Stack
from tests.unit.experiment.folders import make_plan

VLLM = """vllm:num_requests_running{} RUNNING
vllm:num_requests_waiting{} 0.0
vllm:num_preemptions_total{} 0.0
vllm:kv_cache_usage_perc{} 0.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="CACHING",num_gpu_blocks="101"} 1.0
"""
FOUND = (("queries", 1.2e3), ("hits", 32.0))


class Server:
    """A server whose requests are taken off `running` one by one, each time that it is asked."""

    def __init__(self, running: int = 0, caching: bool = False, resets: bool = False, metrics: bool = True):
        self.running, self.reset, self.more = running, 0, ""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                text = VLLM.replace("RUNNING", str(self.running)).replace("CACHING", str(caching))
                self.running -= self.running > 0
                text += self.more
                handler.answer(200 if metrics or "metrics" not in handler.path else 404, text.encode())

            def do_POST(handler) -> None:  # noqa: N805
                self.reset += handler.path == "/reset_prefix_cache"
                handler.answer(200 if resets else 404, b"")

            def answer(handler, code: int, body: bytes) -> None:  # noqa: N805
                handler.send_response(code)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *_: Any) -> None:  # noqa: N805
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def settled(tmp_path: Path) -> Iterator[Any]:
    servers: list[Server] = []

    def run(server: Server, kind: str = "url", **options: Any) -> dict[str, Any]:
        servers.append(server)
        target = {"name": "a", "kind": kind, "url": server.url}
        plan = make_plan(targets=[target], monitor_url=server.url, **options)
        stack = Stack(plan, tmp_path, lambda _: None)
        stack.start = None  # type: ignore[assignment, method-assign]
        stack._start({"a": server.url})
        return settle(plan, stack)

    yield run
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def test_a_cell_waits_until_the_server_is_idle(settled: Any) -> None:
    server = Server(running=3)
    found = settled(server)
    assert server.running == 0
    assert found["waited_seconds"] > 0.1


def test_a_server_that_stays_busy_ends_the_run(settled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.1)
    with pytest.raises(RunError, match=r"a still has \d+ requests after"):
        settled(Server(running=10**6))


def test_a_server_of_ours_that_does_not_answer_is_not_taken_for_idle(
    settled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.1)
    with pytest.raises(RunError, match=r"did not tell in .*/metrics whether it is idle"):
        settled(Server(metrics=False), kind="vllm")


@pytest.mark.parametrize(
    ("server", "state"),
    [
        ({}, "off"),
        ({"caching": True, "resets": True}, "reset"),
        ({"caching": True}, "on"),
        ({"metrics": False}, "unknown"),
    ],
)
def test_what_became_of_the_prefix_cache_is_kept(settled: Any, server: Any, state: str) -> None:
    made = Server(**server)
    assert settled(made)["prefix_cache"] == {"a": state}
    assert made.reset == (state in ("reset", "on"))


def test_there_is_a_rest_before_each_cell(settled: Any) -> None:
    begun = time.monotonic()
    settled(Server(), cooldown_seconds=0.3)
    assert time.monotonic() - begun > 0.3


def test_the_tokens_of_prompts_found_in_a_prefix_cache_are_counted_over_all_engines(settled: Any) -> None:
    server = Server()
    settled(server)
    assert prefix_tokens(Remote("a", server.url)) is None
    lines = [
        f'vllm:prefix_cache_{name}_total{{engine="{engine}"}} {value}' for engine in (0, 1) for name, value in FOUND
    ]
    other = 'vllm:external_prefix_cache_hits_total{engine="0"} 9.0'
    server.more = "\n".join([*lines, other, 'vllm:prefix_cache_hits_created{engine="0"} 1.7e+09'])
    now = prefix_tokens(Remote("a", server.url))
    assert now == {"queries": 2400, "hits": 64}
    assert since({"queries": 2000, "hits": 60}, now) == {"queries": 400, "hits": 4}
    assert since(None, now) is since(now, None) is None
