"""The KV ledger: what the slots of a KV cache are used for, in tokens. Pure arithmetic; tests hold it against tensors.

A slot is the room for one token's keys and values in all layers. The reasons of waste are those of Kwon et al.,
SOSP'23, section 3.1, and two more that padded batches have: `padding` and `finished`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Held:
    """Slots that are set aside for sequences at one moment; each slot is counted in exactly one field.

    `live`: holds a token that a running request needs. `reserved`: kept for a token that a running request may still
    make. `padding`: fills a row up to the batch's width, or the batch up to its compiled size. `finished`: belongs to a
    request that has ended, until its batch ends. `fragmentation`: no token can ever use it.
    """

    live: int = 0
    reserved: int = 0
    padding: int = 0
    finished: int = 0
    fragmentation: int = 0

    @property
    def allocated(self) -> int:
        """All slots that are set aside."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def waste(self) -> dict[str, int]:
        """Slots that are set aside but not live, by reason."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "live"}


@dataclass(frozen=True)
class Row:
    """One row of a padded batch: slots of left padding, and how far it may grow, the padding included."""

    padding: int
    limit: int
    state: str = "running"  # or "finished", or "filler": a row that only fills the batch up


def held_by_batch(rows: Iterable[Row], length: int, room: int) -> Held:
    """Account for a padded batch whose rows have `room` slots each, of which the first `length` are written."""
    live = reserved = padding = finished = fragmentation = 0
    for row in rows:
        if row.state == "finished":
            finished += room
        elif row.state == "filler":
            padding += room
        else:
            usable = max(length, min(row.limit, room))
            padding += row.padding
            live += length - row.padding
            reserved += usable - length
            fragmentation += room - usable
    return Held(live, reserved, padding, finished, fragmentation)


def held_by_blocks(sequences: Iterable[tuple[int, int]], block_size: int) -> Held:
    """Account for a paged cache; each sequence is (tokens stored, blocks it has)."""
    live = fragmentation = 0
    for tokens, blocks in sequences:
        live += tokens
        fragmentation += blocks * block_size - tokens
    return Held(live=live, fragmentation=fragmentation)


def bytes_per_token(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes of one slot: 2 x layers x KV heads x head size x bytes of the dtype."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_size * itemsize)


def has_plain_layers(config: PreTrainedConfig) -> bool:
    """Whether each layer stores keys and values of one size for every token and each KV head of the configuration.

    A sliding window, a state space or a latent cache does not, and is not accounted for.
    """
    if getattr(config, "kv_lora_rank", None) is not None or getattr(config, "multi_query", False):
        return False
    kinds = getattr(config, "layer_types", None)
    return set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
