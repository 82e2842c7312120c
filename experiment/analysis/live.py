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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from experiment.analysis.requests import UNKNOWN, Chunks, Flags, Floats, Requests
from experiment.run.kv import REASONS

Moments = NDArray[np.int64]
Source = Literal["ledger", "records", "unknown"]

# Pairs of a request and a sample that are worked on at once; each takes some 200 bytes.
MOST = 500_000


@dataclass(frozen=True)
class Cache:
    """Samples of a server's KV cache.

    `counts` has a value per sample for each of capacity, allocated, live_low and live_high, and a lower and an upper
    one for each reason of waste that the server can have, such as fragmentation_low. Where they are blocks and not
    tokens, nothing but capacity and allocated is known. `running` is how many sequences were held, `broken` marks the
    samples whose allocated tokens cannot be live + waste. `missed` is how many scrapes were skipped or failed, and
    after which time. `token_bytes` is None where the KV bytes of a token are not known, `block_size` where there are
    no blocks.
    """

    source: Source
    unit: Literal["tokens", "blocks"]
    time_ns: Moments
    counts: dict[str, Floats]
    running: Floats
    broken: Flags
    missed_ns: Moments
    missed: Moments
    token_bytes: int | None
    block_size: int | None


def caches(samples: Mapping[str, pa.Table], requests: Mapping[str, Sequence[Requests]]) -> dict[str, Cache]:
    """The KV cache of each server that gave a sample; the requests are all that it got."""
    good = {target: table.filter(pc.is_null(table["error"])) for target, table in samples.items()}
    good = {target: table for target, table in good.items() if table.num_rows}
    found = {}
    for target, table in good.items():
        first = {name: table[name][0].as_py() for name in ("unit", "block_size", "bytes_per_token")}
        source, (counts, broken) = _read(table, requests.get(target, ()), first["unit"], first["block_size"])
        found[target] = Cache(
            source=source,
            unit=first["unit"],
            time_ns=(numbers(table, "asked_ns") + numbers(table, "answered_ns")) // 2,
            counts=counts,
            running=numbers(table, "running").astype(np.float64),
            broken=broken,
            missed_ns=numbers(samples[target], "asked_ns"),
            missed=numbers(samples[target], "skipped") + samples[target]["error"].is_valid().to_numpy(),
            token_bytes=first["bytes_per_token"],
            block_size=first["block_size"],
        )
    return found


def _read(
    table: pa.Table, requests: Sequence[Requests], unit: str, block_size: int | None
) -> tuple[Source, tuple[dict[str, Floats], Flags]]:
    """Where live tokens come from, and the counts and which of them are broken."""
    if unit == "blocks":
        counts = {name: numbers(table, name).astype(np.float64) for name in ("capacity", "allocated")}
        return "unknown", (counts, counts["allocated"] > counts["capacity"])
    return ("records", _bounded(table, requests)) if block_size else ("ledger", _counted(table))


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


def _bounded(table: pa.Table, requests: Sequence[Requests]) -> tuple[dict[str, Floats], Flags]:
    """Blocks in use against what the client knows; bounds that cross are put in order and marked as broken."""
    tokens = {name: numbers(table, name).astype(np.float64) for name in ("capacity", "allocated")}
    allocated = tokens["allocated"]
    seen = seen_by_client(numbers(table, "asked_ns"), numbers(table, "answered_ns"), requests)
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


def seen_by_client(asked_ns: Moments, answered_ns: Moments, requests: Sequence[Requests]) -> Seen:
    """Add up the requests in flight at samples that were asked for and answered at these times, both ascending."""
    low, high, longest = np.zeros((3, len(asked_ns)))
    seen = Seen(low, high, np.zeros(len(asked_ns), dtype=np.int64), longest, answered_ns.copy())
    for own in requests:
        for chunks in own.chunks():
            first = np.searchsorted(answered_ns, own.sent_ns[chunks.rows])
            last = np.searchsorted(asked_ns, own.end_ns[chunks.rows], "right")
            many = np.maximum(0, last - first)
            for part in _parts(many):
                row = np.repeat(np.arange(part.start, part.stop), many[part])
                behind = np.repeat(np.cumsum(many[part]) - many[part], many[part])
                at = first[row] + np.arange(len(row)) - behind
                _add(seen, own, chunks, Moment(row, at, asked_ns[at], answered_ns[at]))
    return seen


def _parts(many: Moments) -> Iterator[slice]:
    """Split requests so that those of a part were in flight at about MOST samples together."""
    edges = np.searchsorted(np.cumsum(many), np.arange(MOST, many.sum(), MOST)).tolist()
    for start, stop in pairwise([0, *edges, len(many)]):
        if many[start:stop].any():
            yield slice(start, stop)


@dataclass(frozen=True)
class Moment:
    """Requests in flight at samples, as columns: place in the block, place of the sample, and the sample's times."""

    row: Moments
    at: Moments
    asked_ns: Moments
    answered_ns: Moments


def _add(seen: Seen, requests: Requests, chunks: Chunks, moment: Moment) -> None:
    """Add what requests had in the cache at samples; the newest token of each is not fed back yet."""
    row = moment.row
    prompts, failed = requests.prompt_tokens[chunks.rows][row], ~requests.answered[chunks.rows][row]
    prompt = np.where(prompts == UNKNOWN, np.inf, prompts)
    begin, end = chunks.begin[row], chunks.end[row]
    sums = np.concatenate([[0.0], np.cumsum(chunks.tokens)])
    before = _count(chunks.ns, begin, end, moment.asked_ns)
    after = np.minimum(_count(chunks.ns, begin, end, moment.answered_ns) + 1, end)
    begun, most = before > begin, prompt + sums[after] - sums[begin]
    # When the server let go of a request that failed is not known.
    least = np.where(begun & (after < end) & ~failed, prompt + sums[before] - sums[begin] - 1, 0.0)
    most = np.where((before < end) | failed, most, 0.0)
    samples = len(seen.low)
    seen.low[:] += np.bincount(moment.at, least, samples)
    seen.high[:] += np.bincount(moment.at, most, samples)
    seen.unseen[:] += np.bincount(moment.at[~begun], minlength=samples)
    np.maximum.at(seen.longest, moment.at, np.where(begun, 0, prompt))
    np.minimum.at(seen.oldest_ns, moment.at, requests.sent_ns[chunks.rows][row])


def _count(ns: Moments, begin: Moments, end: Moments, at: Moments) -> Moments:
    """For each pair of a request and a moment, where the chunks that had come by then end, by halving."""
    low, high = begin.copy(), end.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        come = open_ & (ns[np.minimum(middle, len(ns) - 1)] <= at)
        low = np.where(come, middle + 1, low)
        high = np.where(open_ & ~come, middle, high)
    return low
