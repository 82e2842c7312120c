"""The monitor beside the real servers."""

import time
from collections import Counter

import psutil
import pyarrow as pa
import pytest

from experiment.environment import find_gpus
from experiment.run.stack import Stack, get
from tests.integration.harness import KV_BUDGET

GPUS = find_gpus()[0]

pytestmark = pytest.mark.alone


def samples(stack: Stack, seconds: float) -> pa.Table:
    since = time.monotonic_ns()
    time.sleep(seconds)
    body = get(f"{stack.programs['monitor'].url}/timeline?since_ns={since}&until_ns={time.monotonic_ns()}")
    assert body is not None
    return pa.ipc.open_stream(body).read_all()


def test_each_server_is_sampled_ten_times_a_second_or_five_beside_gpus(stack: Stack) -> None:
    hz = 5 if GPUS else 10
    taken = Counter((row["metric"], row["server"]) for row in samples(stack, 3).to_pylist())
    for metric in ("host_rss_bytes", "host_pss_bytes", "host_cpu_seconds_total"):
        for server in ("hf", "vllm"):
            assert 2.7 * hz <= taken[metric, server] <= 3.3 * hz, (metric, server)


def test_memory_of_a_server_is_that_of_all_its_processes(stack: Stack) -> None:
    launcher = psutil.Process(stack.programs["vllm"].process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    assert len(family) >= 3  # the launcher, vLLM's API server and its engine
    expected = sum(process.memory_info().rss for process in family)
    rows = [r for r in samples(stack, 1).to_pylist() if r["metric"] == "host_rss_bytes" and r["server"] == "vllm"]
    assert rows[-1]["value"] == pytest.approx(expected, rel=0.05)


def test_metrics_name_both_servers(stack: Stack) -> None:
    text = (get(stack.programs["monitor"].url + "/metrics") or b"").decode()
    for server in ("hf", "vllm"):
        assert f'headroom_host_rss_bytes{{server="{server}"}}' in text


@pytest.mark.skipif(not GPUS, reason="there is no GPU")
def test_the_memory_of_a_gpu_is_that_of_both_servers_and_the_rest(stack: Stack) -> None:
    rows = [row for row in samples(stack, 2).to_pylist() if row["metric"].startswith("gpu_")]
    used = {row["gpu"]: row["value"] for row in rows if row["metric"] == "gpu_memory_used_bytes"}
    parts = {(row["gpu"], row["server"]): row["value"] for row in rows if row["metric"] == "gpu_process_memory_bytes"}
    gpu = next(gpu for gpu, server in parts if server == "hf")
    # A context of CUDA alone is some hundred MB; vLLM has a KV cache besides.
    assert parts[gpu, "hf"] > 100e6
    assert parts[gpu, "vllm"] > 100e6 + KV_BUDGET
    assert sum(size for (other, _), size in parts.items() if other == gpu) == pytest.approx(used[gpu], rel=0.01)
    ticks = [row for row in rows if row["metric"] == "gpu_memory_used_bytes" and row["gpu"] == gpu]
    assert 150 <= len(ticks) <= 210  # 100 a second
