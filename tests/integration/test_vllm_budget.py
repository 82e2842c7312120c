"""A budget in bytes, held against the KV pool that the real vLLM makes of it."""

import json
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from experiment.run.stack import Stack, end, get, spawn
from tests.integration.harness import KV_BUDGET, free_ports, vllm_knows

# random:tiny holds keys and values of 4 layers, each 128 numbers of 4 bytes.
BYTES_PER_TOKEN = 2 * 4 * 128 * 4
MAX_MODEL_LEN = 2048


def test_the_pool_is_as_many_blocks_as_fit_in_the_budget(stack: Stack) -> None:
    families = text_string_to_metric_families((get(stack.programs["vllm"].url + "/metrics") or b"").decode())
    (info,) = next(family.samples for family in families if family.name == "vllm:cache_config_info")
    block = int(info.labels["block_size"]) * BYTES_PER_TOKEN
    assert int(info.labels["num_gpu_blocks"]) == KV_BUDGET // block


@pytest.mark.skipif(not vllm_knows("enable_per_request_metrics"), reason="this vLLM does not say them")
def test_a_request_is_told_its_own_times(stack: Stack) -> None:
    body = {"model": "random:tiny", "prompt": "Hello!", "max_tokens": 8, "ignore_eos": True}
    request = urllib.request.Request(  # noqa: S310
        stack.programs["vllm"].url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        metrics = json.load(response)["metrics"]
    assert metrics["time_to_first_token_ms"] > 0
    assert metrics["queue_time_ms"] >= 0


def test_a_budget_below_one_sequence_ends_with_1_and_is_named(tmp_path: Path) -> None:
    budget, (port,), log = MAX_MODEL_LEN * BYTES_PER_TOKEN - 1, free_ports(1), tmp_path / "vllm.log"
    # Float32 has the same size everywhere; the share matters only on a GPU that other programs use too.
    given = ["--dtype", "float32", "--gpu-memory-utilization", "0.1", "--kv-budget", str(budget), "--enforce-eager"]
    command = [sys.executable, "-m", "servers.vllm", "--port", str(port), *given]
    process = spawn(command, log, {"HF_HUB_OFFLINE": "1"})
    try:
        assert process.wait(480) == 1
    finally:
        process.terminate()
        end(process, 30)
    last = log.read_text(errors="replace").splitlines()[-1]
    assert f"--kv-budget {budget}: vLLM cannot hold one sequence of {MAX_MODEL_LEN} tokens; give more bytes" in last
