"""Models to serve: a Hugging Face id, a folder, or `random:SHAPE` with random weights.

Serving speed does not depend on what the weights say, so a random-weight model measures a server without a download.
Small shapes are written to disk from a fixed seed, so that two servers hold the same weights; of large ones only the
configuration and the tokenizer are written, and each server makes the weights in place.
"""

import os
import random
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 20231023
END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# Arguments of transformers.AutoConfig.for_model; what is not named keeps the value of the published model.
SHAPES: dict[str, dict[str, Any]] = {
    # About 1.3 million parameters: fast on any CPU. The wide initializer keeps greedy choices far apart.
    "tiny": {
        "model_type": "gpt2",
        "vocab_size": 2048,
        "n_positions": 2048,
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 2,
        "initializer_range": 0.1,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257},
    "opt-13b": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 5120,
        "word_embed_proj_dim": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "ffn_dim": 20480,
    },
    "llama-7b": {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama-13b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}
WRITTEN_TO_DISK = {"tiny", "gpt2"}


class ModelError(ValueError):
    """The model that was asked for cannot be served; the message says what was given and what is allowed."""


@dataclass(frozen=True)
class Model:
    """A model ready to be loaded.

    `name` is what clients call it, `source` a folder or a Hugging Face id, and `weights` is False when each server is
    to make random weights in place.
    """

    name: str
    source: str
    weights: bool = True


def resolve(name: str, cache: Path | None = None) -> Model:
    """Turn what the user gave as `--model` into a model to load, writing it under `cache` first if it is random.

    Raises ModelError for an unknown shape or a folder that holds no model.
    """
    if name.startswith("random:"):
        shape = name.removeprefix("random:")
        if shape not in SHAPES:
            raise ModelError(f"--model: {name!r}: unknown shape {shape!r}; known shapes: {', '.join(SHAPES)}")
        return Model(name, str(_written(shape, cache or cache_folder())), shape in WRITTEN_TO_DISK)
    path = Path(name).expanduser()
    if path.is_dir() or name.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            what = "the folder holds no config.json" if path.is_dir() else "no such folder"
            raise ModelError(f"--model: {name!r}: {what}; give a Hugging Face id, a model folder or random:SHAPE")
        return Model(name, str(path))
    return Model(name, name)


def cache_folder() -> Path:
    """Folder for random-weight models: HEADROOM_CACHE, else the user's cache folder."""
    if given := os.environ.get("HEADROOM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headroom"


def _written(shape: str, cache: Path) -> Path:
    folder = cache / f"random-{shape}-{SEED}-transformers-{version('transformers')}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Two servers may start at once: each writes a folder of its own, and the first rename wins.
    draft = Path(tempfile.mkdtemp(prefix=f".{shape}-", dir=cache))
    draft.chmod(0o755)
    try:
        # In a process of its own: torch would stay in the memory of a launcher that never uses it again.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(write, shape, draft).result()
        for file in draft.iterdir():
            file.chmod(0o644)  # safetensors keeps its own for whoever wrote it; the other server may be another user
        draft.rename(folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.is_dir():
            raise
    return folder


def write(shape: str, folder: Path) -> None:
    """Write the random model `shape` into `folder`; the same bytes every time for the same library versions."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(**SHAPES[shape], bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    tokenizer(config.vocab_size).save_pretrained(folder)
    if shape not in WRITTEN_TO_DISK:
        config.save_pretrained(folder)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE of exactly `vocab_size` tokens on made-up ASCII words.

    Its alphabet is ASCII, so each token decodes to whole characters. With a full byte alphabet a random-weight model
    emits broken UTF-8, and detokenizers hold tokens back until it is mended.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # ByteLevel shows a printable byte as itself and byte b of the others below 33 as chr(256 + b).
    alphabet = [chr(byte) for byte in range(33, 127)] + [chr(256 + byte) for byte in b"\t\n\r "]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(_words(2 * vocab_size))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
    )


def _words(count: int) -> list[str]:
    starts = ["", *"b c d f g h k l m n p r s t v w st tr ch sh th pl br".split()]
    middles = "a e i o u ea ou ai".split()
    ends = ["", *"n r s t l m d ng st".split()]
    rng = random.Random(SEED)  # noqa: S311 - it makes words, not secrets
    return [
        "".join(rng.choice(part) for _ in range(rng.randint(1, 4)) for part in (starts, middles, ends))
        for _ in range(count)
    ]


def unreadable(model: Model, error: Exception) -> ModelError:
    """The error to raise for a model whose files make no sense to Transformers."""
    reason = str(error).partition("\n")[0]
    return ModelError(f"--model: {model.name!r}: cannot be loaded: {reason}")
