"""What a run of `headroom classic` showed: sentences, each of which is there only when its own figures say so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiment.classic.client import Answer
from experiment.classic.memory import Reading

# A change of memory that is smaller is called none.
FLAT = 0.01
# Inputs that were sent within this share of the time that they took were sent at once.
AT_ONCE = 0.05


@dataclass(frozen=True)
class Served:
    """What one server did: memory when it was loaded and after, and the answers to the inputs with memory for each.

    `at_once` are the answers to all inputs together, with the memory while they ran in `busiest`.
    """

    loaded: Reading
    answers: list[Answer]
    readings: list[Reading]
    after: Reading
    at_once: list[Answer] = field(default_factory=list)
    busiest: Reading | None = None


@dataclass(frozen=True)
class Finding:
    """A sentence by its key, and the figures that it says."""

    key: str
    figures: dict[str, Any]


def total_seconds(answers: Sequence[Answer], *, at_once: bool) -> float:
    """Time for all answers: from the first sent to the last token at once, else the sum without the rests between."""
    if at_once:
        return (max(one.last_ns for one in answers) - min(one.sent_ns for one in answers)) / 1e9
    return sum(one.e2e_seconds for one in answers)


def find(hf: Served, vllm: Served, longest: int) -> Iterator[Finding]:
    """All that can be said of a run; `longest` is the context of the servers in tokens."""
    yield from _times(hf, vllm)
    yield from _grows(hf)
    yield from _pool(vllm, longest)
    yield from _outside("hf", hf.loaded, hf.readings)
    yield from _outside("vllm", vllm.loaded, [*vllm.readings, *([vllm.busiest] if vllm.busiest else [])])
    yield from _blocks(vllm, longest)
    yield Finding("no_verdict", {"inputs": len(hf.answers)})


def _times(hf: Served, vllm: Served) -> Iterator[Finding]:
    work = [[(one.prompt_tokens, one.output_tokens) for one in answers] for answers in (hf.answers, vllm.answers)]
    other = [place + 1 for place, (a, b) in enumerate(zip(*work, strict=True)) if a != b]
    if other or work[1] != [(one.prompt_tokens, one.output_tokens) for one in vllm.at_once]:
        yield Finding("other_work", {"inputs": ", ".join(map(str, other)) or "-"})
        return
    yield Finding("same_work", {"tokens": sum(one.output_tokens for one in hf.answers)})
    first, single = (total_seconds(one.answers, at_once=False) for one in (hf, vllm))
    together = total_seconds(vllm.at_once, at_once=True)
    sent = [one.sent_ns for one in vllm.at_once]
    apart = (max(sent) - min(sent)) / 1e9
    if apart > AT_ONCE * together:
        yield Finding("not_at_once", {"apart": apart})
        return
    figures = {"hf": first, "single": single, "together": together}
    key = "faster" if together < first else "slower"
    yield Finding(key, figures | {"times": max(first, together) / min(first, together)})
    yield Finding("split", figures | {"batching": single / together, "engine": first / single})


def _grows(hf: Served) -> Iterator[Finding]:
    """Whether the longest input held more KV cache than the shortest."""
    lengths = [one.prompt_tokens + one.output_tokens for one in hf.answers]
    short, long = (lengths.index(pick(lengths)) for pick in (min, max))
    least, most = hf.readings[short].allocated, hf.readings[long].allocated
    if not least or not most:
        yield Finding("kv_hf_unseen", {})
        return
    figures: dict[str, Any] = {"short": (least, hf.readings[short].unit), "long": (most, hf.readings[long].unit)}
    figures |= {"short_tokens": lengths[short], "long_tokens": lengths[long]}
    yield Finding("kv_hf_grows" if most > least else "kv_hf_does_not_grow", figures)
    if all(one.last == 0 for one in hf.readings):
        yield Finding("kv_hf_given_back", {})


def _pool(vllm: Served, longest: int) -> Iterator[Finding]:
    """What vLLM has set aside, and how much of it was used."""
    loaded, busiest = vllm.loaded, vllm.busiest
    if loaded.capacity is None or loaded.capacity != vllm.after.capacity:
        return
    figures: dict[str, Any] = {"capacity": (loaded.capacity, loaded.unit)}
    if loaded.capacity_tokens:
        figures |= {"tokens": loaded.capacity_tokens, "sequences": loaded.capacity_tokens // longest}
        yield Finding("pool", figures | {"longest": longest})
    if busiest and busiest.allocated:
        share = busiest.allocated / loaded.capacity
        yield Finding("pool_used", {"used": (busiest.allocated, busiest.unit), "share": share, "n": busiest.samples})


def _outside(name: str, loaded: Reading, busy: Sequence[Reading]) -> Iterator[Finding]:
    """Whether the memory of a server's processes says anything of what it did."""
    held = [one.held for one in busy if one.held]
    if not loaded.held or not held:
        return
    changes = [one / loaded.held - 1 for one in held]
    change = max(changes, key=abs)
    yield Finding(f"{name}_{'flat' if abs(change) < FLAT else 'moves'}", {"change": change, "held": loaded.held})


def _blocks(vllm: Served, longest: int) -> Iterator[Finding]:
    """What blocks save, worked out from the lengths: the last block of each sequence is all that can be empty."""
    size = vllm.loaded.block_size
    lengths = [one.prompt_tokens + one.output_tokens for one in vllm.at_once]
    if not size or not lengths:
        return
    tokens, blocks = sum(lengths), sum(-(-length // size) for length in lengths)
    figures = {"lengths": ", ".join(map(str, lengths)), "tokens": tokens, "size": size, "blocks": blocks}
    figures |= {"share": tokens / (blocks * size), "reserved": len(lengths) * longest}
    yield Finding("blocks", figures | {"longest": longest, "reserved_share": tokens / (len(lengths) * longest)})
