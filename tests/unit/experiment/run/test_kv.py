"""Reading a KV cache from /metrics, on a schedule, into a file that survives a kill."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.run import kv
from experiment.run.model import Token

LEDGER = """# HELP hf:kv_capacity_tokens The most that may be set aside
# TYPE hf:kv_capacity_tokens gauge
hf:generation_tokens_total{engine="batch"} 77.0
hf:num_requests_running{engine="batch"} 3.0
hf:num_requests_waiting{engine="batch"} 2.0
hf:kv_capacity_tokens{engine="batch"} 2048.0
hf:kv_allocated_tokens{engine="batch"} 100.0
hf:kv_live_tokens{engine="batch"} 60.0
hf:kv_waste_tokens{engine="batch",reason="reserved"} 20.0
hf:kv_waste_tokens{engine="batch",reason="padding"} 12.0
hf:kv_waste_tokens{engine="batch",reason="finished"} 8.0
hf:kv_waste_tokens{engine="batch",reason="fragmentation"} 0.0
hf:kv_capacity_bytes{engine="batch"} 8.388608e+06
hf:kv_allocated_bytes{engine="batch"} 409600.0
"""
TORCH = """hf:torch_allocated_bytes{engine="batch"} 1.5e+09
hf:torch_reserved_bytes{engine="batch"} 2e+09
"""
LABELS = (
    'block_size="16",cache_dtype="auto",enable_prefix_caching="False",kv_cache_memory_bytes="1",num_gpu_blocks="101"'
)
PAGED = """# TYPE vllm:kv_cache_usage_perc gauge
vllm:num_requests_running{engine="%(e)s",model_name="a \\"b\\" c"} 4.0
vllm:num_requests_waiting{engine="%(e)s",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="%(e)s",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="%(e)s",model_name="m"} 0.37
vllm:num_preemptions_total{engine="%(e)s",model_name="m"} 5.0
vllm:num_preemptions_created{engine="%(e)s",model_name="m"} 1.79e+09
vllm:cache_config_info{%(labels)s,engine="%(e)s"} 1.0
"""


def paged(engine: int = 0, labels: str = LABELS) -> str:
    return PAGED % {"e": engine, "labels": labels}


def pool(blocks: int, size: int, sequences: object, tokens: object) -> str:
    """Labels of a vLLM that says how many sequences of the longest context fit, and how many tokens that is."""
    told = f'kv_cache_max_concurrency="{sequences}",kv_cache_size_tokens="{tokens}"'
    return LABELS.replace('"101"', f'"{blocks}"').replace('block_size="16"', f'block_size="{size}"') + "," + told


def test_a_ledger_is_read_in_tokens_with_the_bytes_of_each() -> None:
    row = kv.parse(LEDGER)
    assert [row[name] for name in kv.TOKENS] == [2048, 100, 60, 20, 12, 8, 0]
    assert (row["running"], row["waiting"], row["bytes_per_token"]) == (3, 2, 4096)
    assert "torch_allocated_bytes" not in row


def test_the_allocator_is_read_where_there_is_one() -> None:
    row = kv.parse(LEDGER + TORCH)
    assert (row["torch_allocated_bytes"], row["torch_reserved_bytes"]) == (1_500_000_000, 2_000_000_000)


def test_blocks_in_use_are_a_share_of_all_but_the_one_kept_back() -> None:
    row = kv.parse(paged())
    assert (row["capacity"], row["allocated"], row["block_size"]) == (1600, 37 * 16, 16)
    assert (row["running"], row["waiting"], row["preemptions"]) == (4, 1, 5)
    assert (row["cache_dtype"], row["prefix_caching"]) == ("auto", False)
    assert row.get("live") is None


def test_the_engines_of_a_server_are_added_up_though_each_tells_the_blocks_of_all() -> None:
    # What vLLM says of random:tiny with two engines, each of which has 2,048 blocks.
    labels = pool(4096, 128, 128.0, 262144)
    row = kv.parse(paged(0, labels) + paged(1, labels), Token(1024, "float32"))
    assert (row["unit"], row["block_size"], row["bytes_per_token"]) == ("tokens", 128, 4096)
    assert (row["capacity"], row["allocated"]) == (2 * 2047 * 128, 2 * 757 * 128)
    assert (row["running"], row["preemptions"]) == (8, 10)


@pytest.mark.parametrize(
    ("labels", "unit"),
    [
        (pool(101, 16, 101 / 63, int(101 / 63 * 1000)), "tokens"),  # a context of 1,000 tokens fills 63 blocks of 16
        (pool(101, 16, 101.0, 101 * 16), "tokens"),
        (pool(101, 16, "None", "None"), "tokens"),
        (pool(2048, 128, 128.0, 262144), "tokens"),  # what vLLM says of random:tiny
        (pool(16384, 128, 129.00787401574803, 528416), "blocks"),  # and of a Gemma 3, whose windows are another group
        (pool(101, 16, 101 / 126, int(101 / 126 * 1000)), "blocks"),  # two groups that keep all
        (pool(101, 16, 101 / 9, int(101 / 9 * 1000)), "blocks"),  # all layers have a window
    ],
)
def test_blocks_are_tokens_where_a_sequence_takes_as_many_as_its_tokens_fill(labels: str, unit: str) -> None:
    row = kv.parse(paged(labels=labels))
    blocks, size = (int(re.findall(rf'{name}="(\d+)"', labels)[0]) for name in ("num_gpu_blocks", "block_size"))
    assert row["unit"] == unit
    assert row["capacity"] == (blocks - 1) * (size if unit == "tokens" else 1)
    assert row["allocated"] == round(0.37 * (blocks - 1)) * (size if unit == "tokens" else 1)


@pytest.mark.parametrize(("dtype", "size"), [("auto", 400), ("fp8", 100), ("float16", 200), ("nvfp4", None)])
def test_the_dtype_of_the_cache_decides_what_a_token_takes(dtype: str, size: int | None) -> None:
    text = paged(labels=LABELS.replace('"auto"', f'"{dtype}"'))
    assert kv.parse(text, Token(100, "float32"))["bytes_per_token"] == size
    assert kv.parse(text)["bytes_per_token"] is None


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", "no figures of a KV cache"),
        ("python_info 1.0\n", "no figures of a KV cache"),
        (LEDGER.replace("kv_live_tokens", "kv_lively_tokens"), "no kv_live_tokens"),
        (paged().replace("cache_config_info", "config_info"), "no block_size"),
        (paged(labels=LABELS.replace('"101"', '"None"')), "None"),
        (LEDGER.replace(" 60.0", " NaN"), "NaN"),
        (LEDGER.replace(" 60.0", " +Inf"), "infinity"),
    ],
)
def test_figures_that_are_missing_are_named(text: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        kv.parse(text)


@given(st.integers(0, 10**12), st.integers(1, 10**10), st.integers(0, 10**12))
def test_the_next_sample_is_the_first_of_the_schedule_that_is_still_to_come(due: int, period: int, late: int) -> None:
    now = due + late
    following, missed = kv.next_due(due, period, now)
    assert now < following <= now + period
    assert following == due + (missed + 1) * period


class Server:
    """A server whose answers are played: a function from the number of the request and its path."""

    def __init__(self, answer: Callable[[int, str], tuple[int, str]]):
        self.paths: list[str] = []
        self.clients: set[Any] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.paths.append(self.path)
                outer.clients.add(self.client_address)
                status, text = answer(len(outer.paths), self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(answer: Callable[[int, str], tuple[int, str]] = lambda *_: (200, LEDGER)) -> Server:
        started.append(Server(answer))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def sampled(server: Server, path: Path, count: int, target: str = "hf") -> pa.Table:
    """What is in the file after so many requests at full rate."""
    sampler = kv.Sampler(target, server.url, path)
    sampler.pace(kv.LOADED_NS)
    until(lambda: len(server.paths) >= count)
    sampler.stop()
    sampler.check()
    return kv.read(path)


def test_samples_are_stamped_kept_and_taken_over_one_connection(serve: Any, tmp_path: Path) -> None:
    before = time.monotonic_ns()
    server = serve()
    table = sampled(server, tmp_path / "a.arrow", 4)
    assert table.num_rows >= 4
    assert set(table["live"].to_pylist()) == {60}
    assert table["error"].null_count == table.num_rows
    pairs = zip(table["asked_ns"].to_pylist(), table["answered_ns"].to_pylist(), strict=True)
    stamps = [before, *(stamp for pair in pairs for stamp in pair), time.monotonic_ns()]
    assert stamps == sorted(stamps)
    assert len(server.clients) == 1


def test_only_the_figures_that_are_needed_are_asked_for_where_the_server_can_do_so(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda _, path: (200, paged()) if path.startswith("/metrics/?") else (200, "too much"))
    assert sampled(server, tmp_path / "a.arrow", 3, "vllm")["error"].null_count >= 3
    assert all("name[]=vllm:kv_cache_usage_perc" in path for path in server.paths)


@pytest.mark.parametrize("first", [(404, "no such page"), (200, "")])
def test_a_server_that_cannot_do_so_is_asked_once_and_then_for_all(
    serve: Any, tmp_path: Path, first: tuple[int, str]
) -> None:
    server = serve(lambda _, path: first if path.startswith("/metrics/") else (200, LEDGER))
    table = sampled(server, tmp_path / "a.arrow", 4)
    assert table["error"].null_count == table.num_rows
    assert [path.startswith("/metrics/?") for path in server.paths] == [True] + [False] * (len(server.paths) - 1)


def test_a_scrape_that_fails_is_a_row_with_its_error_and_the_next_one_goes_on(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda number, _: (500, "sorry") if number == 3 else (200, LEDGER))
    errors = sampled(server, tmp_path / "a.arrow", 6)["error"].to_pylist()
    assert [error for error in errors if error] == ["ValueError: HTTP 500"]
    assert errors.index("ValueError: HTTP 500") < len(errors) - 1


def test_a_server_that_does_not_answer_gives_rows_with_an_error(tmp_path: Path) -> None:
    sampler = kv.Sampler("hf", "http://127.0.0.1:9", tmp_path / "a.arrow")
    until(lambda: kv.read(tmp_path / "a.arrow").num_rows > 0)
    sampler.stop()
    errors = kv.read(tmp_path / "a.arrow")["error"].to_pylist()
    assert all(error.startswith("ConnectionRefusedError") for error in errors)


def test_a_slow_answer_delays_the_next_sample_and_what_was_missed_is_counted(serve: Any, tmp_path: Path) -> None:
    def answer(number: int, _: str) -> tuple[int, str]:
        if number == 3:
            time.sleep(4.5 * kv.LOADED_NS / 1e9)
        return 200, LEDGER

    server = serve(answer)
    table = sampled(server, tmp_path / "a.arrow", 5)
    took = [b - a for a, b in zip(table["asked_ns"].to_pylist(), table["answered_ns"].to_pylist(), strict=True)]
    slow = took.index(max(took))
    assert table["skipped"].to_pylist()[slow + 1] >= 4


def test_a_server_that_hangs_costs_one_sample_and_the_next_one_has_a_new_connection(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(number: int, _: str) -> tuple[int, str]:
        if number == 2:
            time.sleep(1)
        return 200, LEDGER

    monkeypatch.setattr(kv, "TIMEOUT_SECONDS", 0.4)
    server = serve(answer)
    errors = sampled(server, tmp_path / "a.arrow", 5)["error"].to_pylist()
    assert errors[:3] == [None, "TimeoutError: timed out", None]
    assert len(server.clients) == 2


def test_the_server_under_load_is_sampled_at_full_rate_and_the_other_now_and_then(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = {"hf": serve(), "vllm": serve(lambda *_: (200, paged()))}
    with kv.Sampling(tmp_path / "kv", rest_ns=3600 * 10**9) as sampling:
        for name, server in servers.items():
            sampling.add(name, name, server.url)
        for name, server in servers.items():
            sampling.focus(name)
            enough = len(server.paths) + 8
            until(partial(lambda server, enough: len(server.paths) > enough, server, enough))
    assert len(servers["hf"].paths) < 20
    rows = {name: kv.read(tmp_path / "kv" / f"{name}.arrow").num_rows for name in servers}
    assert rows["hf"] > 8
    assert rows["vllm"] > 8


def test_samples_are_on_disk_while_sampling_goes_on(serve: Any, tmp_path: Path) -> None:
    server = serve()
    sampler = kv.Sampler("hf", server.url, tmp_path / "a.arrow")
    sampler.pace(kv.LOADED_NS)
    until(lambda: len(server.paths) > 2 * kv.WRITE_NS // kv.LOADED_NS)
    assert kv.read(tmp_path / "a.arrow").num_rows >= kv.WRITE_NS // kv.LOADED_NS - 1
    sampler.stop()


def test_a_full_disk_ends_the_sampling_and_is_raised(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full").open("wb")  # noqa: SIM115 - the sampler closes it
    monkeypatch.setattr(Path, "open", lambda *_: full)
    sampler = kv.Sampler("hf", serve().url, tmp_path / "a.arrow")
    sampler.stop()
    with pytest.raises(OSError, match="No space left"):
        sampler.check()


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_text("mine")
    with pytest.raises(FileExistsError):
        kv.Sampler("hf", "http://127.0.0.1:9", tmp_path / "a.arrow")
    assert (tmp_path / "a.arrow").read_text() == "mine"


def test_a_file_cut_off_anywhere_keeps_the_batches_before(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    whole = sampled(serve(), path, 15)
    content = path.read_bytes()
    kept = []
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        table = kv.read(path)
        assert table.equals(whole.slice(0, table.num_rows))
        kept.append(table.num_rows)
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert kept[-1] > 0


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_text("something else")
    with pytest.raises(ValueError, match="not a file of KV samples"):
        kv.read(tmp_path / "a.arrow")
