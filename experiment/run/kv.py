"""What the KV caches of the servers hold while a run goes on: sampled from their /metrics and kept on disk as it goes.

Each server has a thread and a connection of its own, so that a slow answer delays neither the other server's samples
nor piles up: the moments that it misses are skipped and counted. Only the server under load is sampled at full rate.
"""

import math
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import pyarrow as pa

from experiment.run.model import Token
from loadtest.records import STREAM_BEGINS

# A little over ten samples a second, so that there are ten when one is skipped now and then.
LOADED_NS, IDLE_NS, NEVER_NS = 80_000_000, 1_000_000_000, 10**18
WRITE_NS = 500_000_000
TIMEOUT_SECONDS = 5.0

REASONS = ("reserved", "padding", "finished", "fragmentation")
# Counts of tokens, or of blocks where `unit` says so; those of `live` and of the reasons are null where the server does
# not say.
TOKENS = ("capacity", "allocated", "live", *REASONS)
_NUMBERS = ("running", "waiting", "preemptions", *TOKENS, "block_size", "bytes_per_token")
_ALLOCATOR = ("torch_allocated_bytes", "torch_reserved_bytes")
SCHEMA = pa.schema(
    # When the sample was asked for and answered (CLOCK_MONOTONIC), and the moments skipped since the one before.
    [(name, pa.int64()) for name in ("asked_ns", "answered_ns", "skipped")]
    + [(name, pa.int64()) for name in (*_NUMBERS, *_ALLOCATOR)]
    + [("unit", pa.string()), ("cache_dtype", pa.string()), ("prefix_caching", pa.bool_()), ("error", pa.string())]
)
Row = dict[str, int | str | bool | None]

_NAMES = (
    *("num_requests_running", "num_requests_waiting", "num_preemptions_total"),
    *("kv_cache_usage_perc", "cache_config_info"),
    *("kv_capacity_tokens", "kv_allocated_tokens", "kv_live_tokens", "kv_waste_tokens", "kv_capacity_bytes"),
    *_ALLOCATOR,
)
_LINE = re.compile(rf"^(?:hf|vllm):({'|'.join(_NAMES)})\{{(.*)\}} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse(text: str, token: Token | None = None) -> Row:
    """Read the columns of a sample from the text of /metrics, summed over the engines of the server.

    `token` is what one takes in vLLM's cache, if that is known. Raises ValueError that says what is missing when the
    text has no figures of a KV cache.
    """
    engines: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name, labels, value in _LINE.findall(text):
        given = dict(_LABEL.findall(labels))
        engine = engines[given.get("engine", "")]
        if name == "cache_config_info":
            engine |= given
        else:
            engine[given.get("reason", name)] = value
    if not engines:
        raise ValueError("no figures of a KV cache")
    try:
        rows = [_paged(e, len(engines), token) if "kv_cache_usage_perc" in e else _ledger(e) for e in engines.values()]
    except KeyError as error:
        raise ValueError(f"no {error.args[0]}") from None
    except OverflowError as error:
        raise ValueError(str(error)) from None
    summed = {name for name in rows[0] if name in ("running", "waiting", "preemptions", *TOKENS, *_ALLOCATOR)}
    return rows[0] | {name: sum(int(row[name] or 0) for row in rows) for name in summed}


def _ledger(engine: Mapping[str, str]) -> Row:
    """The HF server counts its slots itself."""
    capacity = _whole(engine["kv_capacity_tokens"])
    row: Row = {name: _whole(engine[f"kv_{name}_tokens"]) for name in ("capacity", "allocated", "live")}
    row |= {reason: _whole(engine[reason]) for reason in REASONS}
    row |= {name: _whole(engine[name]) for name in _ALLOCATOR if name in engine}
    size = _whole(engine["kv_capacity_bytes"]) // capacity if capacity else None
    return row | _queue(engine) | {"unit": "tokens", "bytes_per_token": size}


def _paged(engine: Mapping[str, str], engines: int, token: Token | None) -> Row:
    """Of vLLM the share of its blocks that is in use is known; the pool keeps one back, which the share leaves out.

    With data parallelism each engine has a pool of its own, and each tells the blocks of all of them.
    """
    size, total = int(engine["block_size"]), int(engine["num_gpu_blocks"]) // engines
    blocks = total - 1
    used = round(float(engine["kv_cache_usage_perc"]) * blocks)
    row: Row = {"block_size": size, "cache_dtype": engine["cache_dtype"]}
    if _has_one_group(engine, total):
        row |= {"unit": "tokens", "capacity": blocks * size, "allocated": used * size}
        row["bytes_per_token"] = token.size(engine["cache_dtype"]) if token else None
    else:
        row |= {"unit": "blocks", "capacity": blocks, "allocated": used}
    row["prefix_caching"] = engine["enable_prefix_caching"] == "True"
    return row | _queue(engine) | {"preemptions": _whole(engine["num_preemptions_total"])}


def _has_one_group(engine: Mapping[str, str], blocks: int) -> bool:
    """Whether a block holds the keys and values of its tokens in all layers, and a sequence keeps all of its tokens.

    Layers with a sliding window or a state are groups of their own, each of which takes blocks from the one pool. vLLM
    says how many sequences of the longest context fit; such a sequence then takes another number of blocks than its
    tokens fill. A version that does not say so is taken to have one group.
    """
    sequences, tokens = (engine.get(name, "None") for name in ("kv_cache_max_concurrency", "kv_cache_size_tokens"))
    if "None" in (sequences, tokens):
        return True
    longest = math.ceil(int(tokens) / float(sequences) - 1e-6)
    return round(float(sequences) * math.ceil(longest / int(engine["block_size"]))) == blocks


def _queue(engine: Mapping[str, str]) -> Row:
    return {name: _whole(engine[f"num_requests_{name}"]) for name in ("running", "waiting")}


def _whole(text: str) -> int:
    return int(float(text))


def next_due(due_ns: int, period_ns: int, now_ns: int) -> tuple[int, int]:
    """The first moment of the schedule after both `due_ns` and now, and how many before it were missed."""
    missed = max(0, (now_ns - due_ns) // period_ns)
    return due_ns + (missed + 1) * period_ns, missed


class Sampler:
    """Samples one server in a thread of its own and appends the samples to a new Arrow IPC stream.

    `prefix` is that of the server's metrics, `token` what one takes in vLLM's cache, if that is known. Raises
    FileExistsError for a file that is there. A scrape that fails is a row with its `error`.
    """

    def __init__(self, prefix: str, url: str, path: Path, token: Token | None = None):
        address = urlsplit(url)
        names = "&".join(f"name[]={prefix}:{name}" for name in _NAMES)
        # At the first path vLLM makes only what is asked for; at the second it makes everything, as servers.hf does.
        self._paths = [f"{address.path}/metrics/?{names}", f"{address.path}/metrics?{names}"]
        self._connection = HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_SECONDS)
        self._token = token
        self._file = path.open("xb")
        self._rows: list[Row] = []
        self._period_ns = IDLE_NS
        self._changed = threading.Event()
        self._ending = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"kv-{path.stem}", daemon=True)
        self._thread.start()

    def pace(self, period_ns: int) -> None:
        """Sample once in so many ns from now on."""
        if period_ns != self._period_ns:
            self._period_ns = period_ns
            self._changed.set()

    def check(self) -> None:
        """Raise what ended the sampling before its time: an OSError when the disk is full."""
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Take no more samples and close the file."""
        self._ending = True
        self._changed.set()
        self._thread.join(TIMEOUT_SECONDS + 1)

    def scrape(self) -> Row:
        """Ask the server once, at the path that has answered before; raises OSError, HTTPException, ValueError."""
        refused = ValueError()
        for path in self._paths:
            self._connection.request("GET", path)
            response = self._connection.getresponse()
            body = response.read()
            try:
                row = parse(body.decode(), self._token) if response.status == 200 else None
            except ValueError as error:
                refused = error
                continue
            if row:
                self._paths = [path]
                return row
            refused = ValueError(f"HTTP {response.status}")
        raise refused

    def _run(self) -> None:
        if hasattr(os, "sched_setscheduler"):
            # vLLM's processes spin while they wait, which would leave gaps in the samples of a machine with few cores.
            with suppress(PermissionError):
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        try:
            with self._file, pa.ipc.new_stream(self._file, SCHEMA) as stream:
                self._sample_all(stream)
        except (OSError, pa.ArrowException) as error:
            self._failure = error
        finally:
            self._connection.close()

    def _sample_all(self, stream: pa.RecordBatchStreamWriter) -> None:
        due_ns = written_ns = time.monotonic_ns()
        missed = 0
        while not self._ending:
            self._rows.append({**self._sample(), "skipped": missed})
            now_ns = time.monotonic_ns()
            due_ns, missed = next_due(due_ns, self._period_ns, now_ns)
            if due_ns - written_ns > WRITE_NS:
                self._write(stream)
                written_ns = now_ns
            if self._changed.wait(max(0.0, (due_ns - time.monotonic_ns()) / 1e9)):
                self._changed.clear()
                due_ns = time.monotonic_ns()
        self._write(stream)

    def _write(self, stream: pa.RecordBatchStreamWriter) -> None:
        stream.write_batch(pa.RecordBatch.from_pylist(self._rows, SCHEMA))
        self._file.flush()
        self._rows.clear()

    def _sample(self) -> Row:
        asked_ns = time.monotonic_ns()
        try:
            row = self.scrape()
        except (OSError, HTTPException, ValueError) as error:
            self._connection.close()
            row = {"error": f"{type(error).__name__}: {error}"}
        return {**row, "asked_ns": asked_ns, "answered_ns": time.monotonic_ns()}


class Sampling:
    """Samples the servers of a run into `folder`; a context manager that ends with it.

    Once in `rest_ns` those that are not under load; with NEVER_NS not at all.
    """

    def __init__(self, folder: Path, rest_ns: int = IDLE_NS):
        self._folder = folder
        self._rest_ns = rest_ns
        self._samplers: dict[str, Sampler] = {}

    def __enter__(self) -> "Sampling":
        self._folder.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sampler in self._samplers.values():
            sampler.stop()
        for sampler in self._samplers.values():
            if error is None:
                sampler.check()

    def add(self, target: str, prefix: str, url: str, token: Token | None = None) -> None:
        """Sample a server from now on; `prefix` is that of its metrics, `token` what one takes in vLLM's cache."""
        self._samplers[target] = Sampler(prefix, url, self._folder / f"{target}.arrow", token)

    def __contains__(self, target: str) -> bool:
        return target in self._samplers

    def focus(self, targets: Collection[str]) -> None:
        """Sample these servers at full rate and the others at rest; raises what ended a sampling early."""
        for name, sampler in self._samplers.items():
            sampler.check()
            sampler.pace(LOADED_NS if name in targets else self._rest_ns)


def read(path: Path) -> pa.Table:
    """Read a file of samples; what a kill cut off is left out. Raises ValueError for another file, OSError."""
    content = path.read_bytes()
    if not content.startswith(STREAM_BEGINS[: len(content)]):
        raise ValueError("not a file of KV samples")
    batches: list[pa.RecordBatch] = []
    with suppress(StopIteration, pa.ArrowInvalid, OSError):  # the end, or where it was cut off
        reader = pa.ipc.open_stream(content)
        while True:
            batches.append(reader.read_next_batch())
    return pa.Table.from_batches(batches, SCHEMA)
