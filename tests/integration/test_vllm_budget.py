"""A budget in bytes, held against the KV pool that the real vLLM makes of it."""

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from experiment.run.stack import Program, end, get, spawn
from tests.integration.harness import free_ports

# random:tiny holds keys and values of 4 layers, each 128 numbers of 4 bytes.
BYTES_PER_TOKEN = 2 * 4 * 128 * 4
MAX_MODEL_LEN = 2048


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start servers.vllm with a budget and more options; ended after the test."""
    started: list[Program] = []

    def start(kv_budget: int, *options: str) -> Program:
        (port,) = free_ports(1)
        # Float32 has the same size everywhere; the share matters only on a GPU that other programs use too.
        given = ["--dtype", "float32", "--gpu-memory-utilization", "0.1", "--kv-budget", str(kv_budget), *options]
        command = [sys.executable, "-m", "servers.vllm", "--port", str(port), "--enforce-eager", *given]
        log = tmp_path / "vllm.log"
        process = spawn(command, log, {"HF_HUB_OFFLINE": "1"})
        started.append(Program("vllm", process, log, f"http://127.0.0.1:{port}"))
        return started[-1]

    yield start
    for program in started:
        program.process.terminate()
        end(program.process, 30)


def wait_until_healthy(program: Program) -> None:
    deadline = time.monotonic() + 240
    while get(program.url + "/health") is None:
        program.check()
        assert time.monotonic() < deadline, program.tail()
        time.sleep(0.2)


def test_the_pool_is_as_many_blocks_as_fit_in_the_budget(serve: Callable[..., Program]) -> None:
    budget = 20_000_000
    vllm = serve(budget, "--per-request-metrics")
    wait_until_healthy(vllm)
    families = text_string_to_metric_families((get(vllm.url + "/metrics") or b"").decode())
    (info,) = next(family.samples for family in families if family.name == "vllm:cache_config_info")
    block = int(info.labels["block_size"]) * BYTES_PER_TOKEN
    assert int(info.labels["num_gpu_blocks"]) == budget // block

    body = {"model": "random:tiny", "prompt": "Hello!", "max_tokens": 8, "ignore_eos": True}
    request = urllib.request.Request(  # noqa: S310
        vllm.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        metrics = json.load(response)["metrics"]
    assert metrics["time_to_first_token_ms"] > 0
    assert metrics["queue_time_ms"] >= 0


def test_a_budget_below_one_sequence_ends_with_1_and_is_named(serve: Callable[..., Program]) -> None:
    budget = MAX_MODEL_LEN * BYTES_PER_TOKEN - 1
    vllm = serve(budget)
    assert vllm.process.wait(240) == 1
    last = vllm.tail().splitlines()[-1]
    assert f"--kv-budget {budget}: vLLM cannot hold one sequence of {MAX_MODEL_LEN} tokens; give more bytes" in last
