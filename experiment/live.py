"""What a KV cache holds and wastes, from the samples of its server and, for vLLM, the records of the load test.

The HF server counts its live tokens itself. vLLM says only how many blocks are in use and how many sequences run, so
live tokens get a lower and an upper bound:

- The client knows the prompt of each request in flight and the tokens that have come. While a sample was taken the
  server was where the client saw it or one chunk ahead; a request without a first chunk may have stored nothing or its
  whole prompt, and one whose last chunk is next may have been freed.
- The server puts the tokens of a sequence into blocks and starts a block when the one before is full, so that at most
  the last block of each running sequence is waste. Room for prompts that may be in the making is left out: as many of
  the requests without a first chunk as the server does not count as waiting, each as long as the longest.

Layers with a sliding window or a state are groups of their own in vLLM, each of which takes blocks from one pool. Then
a block in use is a share of the pool, but how many tokens it holds is not known, and live tokens are not told.

What the client has seen is no lower bound once the server has preempted a sequence, whose tokens it drops for a while,
or where it shares the blocks of equal prefixes; the bound from the blocks stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from experiment.kv import REASONS
from experiment.stats import Floats
from loadtest.records import Record

Moments = NDArray[np.int64]
Flags = NDArray[np.bool_]
Source = Literal["ledger", "records", "unknown"]


@dataclass(frozen=True)
class Cache:
    """Samples of a server's KV cache.

    `counts` has a value per sample for each of capacity, allocated, live_low and live_high, and a lower and an upper
    one for each reason of waste that the server can have, such as fragmentation_low. Where they are blocks and not
    tokens, nothing but capacity and allocated is known. `broken` marks the samples whose allocated tokens cannot be
    live + waste. `missed` is how many scrapes were skipped or failed, and after which time. `token_bytes` is None where
    the KV bytes of a token are not known, `block_size` where there are no blocks.
    """

    source: Source
    unit: Literal["tokens", "blocks"]
    time_ns: Moments
    counts: dict[str, Floats]
    broken: Flags
    missed_ns: Moments
    missed: Moments
    token_bytes: int | None
    block_size: int | None


def caches(samples: Mapping[str, pa.Table], records: Mapping[str, Sequence[Record]]) -> dict[str, Cache]:
    """The KV cache of each server that gave a sample; the records are those of all requests that it got."""
    good = {target: table.filter(pc.is_null(table["error"])) for target, table in samples.items()}
    good = {target: table for target, table in good.items() if table.num_rows}
    found = {}
    for target, table in good.items():
        first = {name: table[name][0].as_py() for name in ("unit", "block_size", "bytes_per_token")}
        source, (counts, broken) = _read(table, records.get(target, ()), first["unit"], first["block_size"])
        found[target] = Cache(
            source=source,
            unit=first["unit"],
            time_ns=(numbers(table, "asked_ns") + numbers(table, "answered_ns")) // 2,
            counts=counts,
            broken=broken,
            missed_ns=numbers(samples[target], "asked_ns"),
            missed=numbers(samples[target], "skipped") + samples[target]["error"].is_valid().to_numpy(),
            token_bytes=first["bytes_per_token"],
            block_size=first["block_size"],
        )
    return found


def _read(
    table: pa.Table, records: Sequence[Record], unit: str, block_size: int | None
) -> tuple[Source, tuple[dict[str, Floats], Flags]]:
    """Where live tokens come from, and the counts and which of them are broken."""
    if unit == "blocks":
        counts = {name: numbers(table, name).astype(np.float64) for name in ("capacity", "allocated")}
        return "unknown", (counts, counts["allocated"] > counts["capacity"])
    return ("records", _bounded(table, records)) if block_size else ("ledger", _counted(table))


def numbers(table: pa.Table, name: str) -> Moments:
    """A column as whole numbers; a null is 0, and so is false."""
    return np.asarray(pc.fill_null(table[name].cast(pa.int64()), 0).to_numpy(), dtype=np.int64)


def _counted(table: pa.Table) -> tuple[dict[str, Floats], Flags]:
    """The server's own count, held against itself."""
    tokens = {name: numbers(table, name).astype(np.float64) for name in ("capacity", "allocated")}
    tokens["live_low"] = tokens["live_high"] = numbers(table, "live").astype(np.float64)
    total = tokens["live_low"].copy()
    for reason in REASONS:
        tokens[f"{reason}_low"] = tokens[f"{reason}_high"] = numbers(table, reason).astype(np.float64)
        total += tokens[f"{reason}_low"]
    return tokens, (tokens["allocated"] != total) | (tokens["allocated"] > tokens["capacity"])


def _bounded(table: pa.Table, records: Sequence[Record]) -> tuple[dict[str, Floats], Flags]:
    """Blocks in use against what the client knows; bounds that cross are put in order and marked as broken."""
    tokens = {name: numbers(table, name).astype(np.float64) for name in ("capacity", "allocated")}
    allocated = tokens["allocated"]
    seen = seen_by_client(numbers(table, "asked_ns"), numbers(table, "answered_ns"), records)
    last_blocks = numbers(table, "running") * numbers(table, "block_size")
    by_blocks = allocated - last_blocks - seen.in_the_making(numbers(table, "waiting"))
    trusted = ~(_preempted(table, seen.oldest_ns) | (numbers(table, "prefix_caching") > 0))
    low = np.maximum(by_blocks, np.where(trusted, seen.low, 0))
    high = np.minimum(allocated, seen.high)
    tokens["live_low"] = np.clip(np.minimum(low, high), 0, allocated)
    tokens["live_high"] = np.clip(np.maximum(low, high), 0, allocated)
    tokens["fragmentation_low"] = allocated - tokens["live_high"]
    tokens["fragmentation_high"] = allocated - tokens["live_low"]
    return tokens, (low > high) | (allocated > tokens["capacity"])


def _preempted(table: pa.Table, oldest_ns: Moments) -> Flags:
    """Whether a sequence was preempted since the oldest request in flight was sent."""
    counter, answered_ns = numbers(table, "preemptions"), numbers(table, "answered_ns")
    before = np.maximum(0, np.searchsorted(answered_ns, oldest_ns) - 1)
    return np.asarray(counter > counter[before])


@dataclass(frozen=True)
class Seen:
    """What a client knows at each sample.

    Least and most live tokens; of the requests without a first chunk how many there are and the longest prompt; and
    when the oldest request in flight was sent.
    """

    low: Floats
    high: Floats
    unseen: Moments
    longest: Floats
    oldest_ns: Moments

    def in_the_making(self, waiting: Moments) -> Floats:
        """The most tokens of prompts that the server may be working on while so many requests wait."""
        count = np.maximum(0, self.unseen - waiting)
        return np.asarray(np.where(count > 0, self.longest, 0) * count)


def seen_by_client(asked_ns: Moments, answered_ns: Moments, records: Sequence[Record]) -> Seen:
    """Add up the requests in flight at samples that were asked for and answered at these times, both ascending."""
    low, high, longest = np.zeros((3, len(asked_ns)))
    unseen, oldest_ns = np.zeros(len(asked_ns), dtype=np.int64), answered_ns.copy()
    for record in records:
        first = np.searchsorted(answered_ns, record.sent_ns)
        span = slice(first, max(first, np.searchsorted(asked_ns, record.end_ns, "right")))
        prompt, begun, least, most = _one(record, asked_ns[span], answered_ns[span])
        low[span] += least
        high[span] += most
        unseen[span] += ~begun
        longest[span] = np.maximum(longest[span], np.where(begun, 0, prompt))
        oldest_ns[span] = np.minimum(oldest_ns[span], record.sent_ns)
    return Seen(low, high, unseen, longest, oldest_ns)


def _one(record: Record, asked_ns: Moments, answered_ns: Moments) -> tuple[float, Flags, Floats, Floats]:
    """Prompt of a request, whether a chunk had come, least and most tokens cached; the newest is not fed back yet."""
    prompt = float("inf") if record.prompt_tokens is None else record.prompt_tokens
    last = len(record.chunk_ns)
    each = (record.output_tokens or 0) / max(1, last)
    chunks: Sequence[float] = record.chunk_tokens or [each] * last
    counts = np.cumsum([0.0, *chunks])
    before = np.searchsorted(record.chunk_ns, asked_ns, "right")
    after = np.minimum(np.searchsorted(record.chunk_ns, answered_ns, "right") + 1, last)
    begun, most = before > 0, prompt + counts[after]
    if record.error:  # when the server let go of it is not known
        return prompt, begun, np.zeros(len(before)), most
    least = np.where(begun & (after < last), prompt + counts[before] - 1, 0.0)
    return prompt, begun, least, np.where(before < last, most, 0.0)
