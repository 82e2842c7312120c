"""What a token takes in the KV cache of a model, from the model's configuration; nothing is guessed."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiment.environment import installed
from experiment.plan.plan import Plan
from experiment.run.stack import get

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
# What a configuration says when a layer does not keep 2 x KV heads x head size values of every token: a latent cache
# (MLA), one shared head, layers that share a cache, and layers of other kinds.
_OTHER = ("kv_lora_rank", "multi_query", "num_kv_shared_layers", "v_head_dim", "is_encoder_decoder")
_OTHER_LAYERS = ("block_configs", "layers_block_type", "hybrid_override_pattern", "attn_layer_period", "state_size")
READ_SECONDS = 60
# Options of vLLM after which it serves another model or dtype than the plan says.
_CHANGED = re.compile(r"--(dtype|hf[-_]|config\b|model(?=[=\s]|$)|kv[-_]cache[-_]dtype[-_]skip)")


@dataclass(frozen=True)
class Token:
    """Keys and values that all layers store for a token, and the dtype of each where the cache has no other."""

    values: int
    dtype: str

    def size(self, cache_dtype: str) -> int | None:
        """Bytes of a token in a cache of that dtype, `auto` for the model's own; None where that is not known."""
        item = ITEM_BYTES.get(self.dtype if cache_dtype == "auto" else cache_dtype)
        return self.values * item if item else None


def token_of_vllm(plan: Plan, url: str, args: str = "") -> Token | None:
    """What a token takes in vLLM's cache, from the configuration of the model that it says it serves; None: not known.

    `args` are the server's own beside those of the plan. Reads what is on this machine and downloads nothing.
    """
    if _CHANGED.search(f"{plan.vllm_args} {args}"):
        return None
    try:
        source = json.loads(get(f"{url}/v1/models") or b"")["data"][0]["root"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    # As servers.vllm does: vLLM for CPUs is another package, or says so in its version.
    own = "float32" if "cpu" in (installed("vllm") or "cpu") else "bfloat16"
    values = read_values(source) if isinstance(source, str) else None
    return Token(values, own if plan.dtype == "auto" else plan.dtype) if values else None


def read_values(source: str) -> int | None:
    """Values of a token in the model of a folder or a Hugging Face id that is on this machine; None: not known."""
    # In a process of its own: transformers would stay in the memory of the one that watches the servers.
    command = [sys.executable, "-m", "experiment.run.model", source]
    try:
        done = subprocess.run(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, timeout=READ_SECONDS, check=False
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return found if isinstance(found, int) else None


def values_per_token(config: "PreTrainedConfig") -> int | None:
    """2 x layers x KV heads x head size, where every layer keeps all of that for every token; else None."""
    config = config.get_text_config()
    if any(getattr(config, name, None) for name in (*_OTHER, *_OTHER_LAYERS)):
        return None
    kinds = getattr(config, "layer_types", None)
    if set(kinds) != {"full_attention"} if kinds else getattr(config, "sliding_window", None):
        return None
    names = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_heads")
    heads = next((given for name in names if (given := getattr(config, name, None))), None)
    factors: tuple[Any, ...] = (getattr(config, "num_hidden_layers", None), heads, _head_size(config))
    return 2 * math.prod(factors) if all(isinstance(one, int) and one > 0 for one in factors) else None


def _head_size(config: "PreTrainedConfig") -> Any:
    hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    return getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else None)


if __name__ == "__main__":
    # A configuration needs no torch, whose import takes most of the time.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers import AutoConfig

    print(json.dumps(values_per_token(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False))))
