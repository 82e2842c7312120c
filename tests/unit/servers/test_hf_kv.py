"""The KV ledger: figures worked by hand, and the size of a token against the tensors of real models."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from servers.hf.kv import Held, Row, bytes_per_token, has_plain_layers, held_by_batch, held_by_blocks

# The padding of 2 tokens is a short prompt's; 5 tokens is the batch's width, and one more was made and stored.
SHORT = Row(padding=2, limit=7)
LONG = Row(padding=0, limit=9)


def ended(row: Row) -> Row:
    return Row(row.padding, row.limit, "finished")


@pytest.mark.parametrize(
    ("rows", "length", "room", "held"),
    [
        pytest.param([SHORT, LONG], 6, 6, Held(live=4 + 6, padding=2), id="a dynamic cache has no room to grow into"),
        pytest.param(
            [SHORT, LONG],
            6,
            12,
            Held(live=4 + 6, padding=2, reserved=1 + 3, fragmentation=5 + 3),
            id="a static row keeps room for what may come and wastes the rest",
        ),
        pytest.param(
            [SHORT, LONG], 6, 8, Held(live=10, padding=2, reserved=1 + 2, fragmentation=1), id="a limit beyond the room"
        ),
        pytest.param(
            [SHORT, LONG], 7, 12, Held(live=12, padding=2, reserved=2, fragmentation=5 + 3), id="a row at its limit"
        ),
        pytest.param([SHORT], 9, 12, Held(live=7, padding=2, fragmentation=3), id="nothing is reserved past the limit"),
        pytest.param(
            [ended(SHORT), LONG], 6, 6, Held(live=6, finished=6), id="a finished row's padding is finished too"
        ),
        pytest.param(
            [ended(SHORT), LONG],
            6,
            12,
            Held(live=6, finished=12, reserved=3, fragmentation=3),
            id="a finished static row is finished as a whole",
        ),
        pytest.param(
            [LONG, Row(0, 5, "filler")],
            6,
            12,
            Held(live=6, padding=12, reserved=3, fragmentation=3),
            id="a filler is padding as a whole",
        ),
        pytest.param([], 6, 12, Held(), id="no rows"),
    ],
)
def test_a_batch_is_accounted_for(rows: list[Row], length: int, room: int, held: Held) -> None:
    assert held_by_batch(rows, length, room) == held
    assert held.allocated == len(rows) * room


def test_blocks_are_live_up_to_the_last_token_and_fragmented_after_it() -> None:
    assert held_by_blocks([(1, 1), (16, 1), (17, 2), (40, 3)], 16) == Held(live=74, fragmentation=15 + 0 + 15 + 8)
    assert held_by_blocks([], 16) == Held()


def test_what_is_allocated_is_live_or_waste_of_one_reason() -> None:
    held = Held(live=1, reserved=2, padding=4, finished=8, fragmentation=16)
    assert held.allocated == 31
    assert held.waste == {"reserved": 2, "padding": 4, "finished": 8, "fragmentation": 16}


@pytest.mark.parametrize(
    ("model_type", "fields", "size"),
    [
        # Kwon et al., SOSP'23, section 3: 2 x 5120 x 40 x 2 bytes, 800 KB for a token of OPT-13B.
        ("opt", {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}, 819_200),
        ("gpt2", {}, 2 * 12 * 12 * 64 * 2),
        ("llama", {}, 2 * 32 * 32 * 128 * 2),
        ("llama", {"num_key_value_heads": 8}, 2 * 32 * 8 * 128 * 2),
        # The size of a head is given, and is not hidden size / heads.
        (
            "qwen3",
            {
                "hidden_size": 1024,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
            },
            2 * 28 * 8 * 128 * 2,
        ),
    ],
)
def test_a_token_takes_keys_and_values_of_every_layer(model_type: str, fields: dict[str, int], size: int) -> None:
    config = transformers.AutoConfig.for_model(model_type, **fields)
    assert (bytes_per_token(config, 2), bytes_per_token(config, 4)) == (size, 2 * size)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MLA = {
    "first_k_dense_replace": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


@torch.no_grad()
def measured(config: Any) -> int:
    """Bytes of one token, from the tensors that a model fills."""
    cache = DynamicCache(config=config)
    AutoModelForCausalLM.from_config(config).eval()(torch.ones(1, 8, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 8
    whole = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)
    assert whole % 8 == 0
    return whole // 8


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gpt2", {}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
        ("llama", {}),
        ("llama", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
        ("gemma", {"num_key_value_heads": 1, "head_dim": 32}),
    ],
)
def test_a_token_takes_what_the_tensors_take(model_type: str, fields: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **fields)
    assert has_plain_layers(config)
    assert bytes_per_token(config, 4) == measured(config)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        pytest.param("falcon", {}, id="falcon-7b: one KV head, by another name"),
        pytest.param("deepseek_v3", MLA, id="deepseek: keys and values of different sizes"),
    ],
)
def test_a_model_whose_tokens_take_another_size_is_not_taken_for_a_plain_one(
    model_type: str, fields: dict[str, Any]
) -> None:
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **fields)
    assert not has_plain_layers(config) or bytes_per_token(config, 4) == measured(config)


@pytest.mark.parametrize(
    ("model_type", "fields", "plain"),
    [
        ("gpt2", {}, True),
        ("llama", {}, True),
        ("mistral", {"sliding_window": 4096}, False),
        ("mistral", {"sliding_window": None}, True),
        ("qwen2", {"sliding_window": 4096}, True),  # not used unless use_sliding_window says so
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1}, False),
        ("gemma2", {}, False),  # every other layer has a window
        ("mamba", {}, False),
        ("jamba", {}, False),
    ],
)
def test_a_window_or_a_state_space_is_not_plain(model_type: str, fields: dict[str, Any], plain: bool) -> None:
    assert has_plain_layers(transformers.AutoConfig.for_model(model_type, **fields)) is plain
