"""What a token takes in a KV cache, held against the HF server's own account of the same configurations."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from experiment.plan.plan import Plan
from experiment.run import model
from experiment.run.model import Token, read_values, token_of_vllm, values_per_token
from servers.hf import kv
from servers.models import SHAPES, Model
from servers.vllm.launch import Settings, arguments, built_for_cpu


def config(**options: Any) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.for_model(**options)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_models_that_ship_take_what_the_hf_server_counts(shape: str) -> None:
    of_shape = config(**SHAPES[shape])
    assert kv.has_plain_layers(of_shape)
    assert values_per_token(of_shape) == kv.bytes_per_token(of_shape, 1)


def test_the_kv_heads_and_not_those_of_the_queries_count() -> None:
    assert values_per_token(config(**SHAPES["qwen3-0.6b"])) == 2 * 28 * 8 * 128


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "deepseek_v3"},  # a latent cache
        {"model_type": "gemma3_text"},  # windows in most layers
        {"model_type": "gpt_oss"},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "gpt_bigcode", "multi_query": True},
        {"model_type": "mamba"},
        {"model_type": "jamba"},
        {"model_type": "t5"},
    ],
    ids=lambda options: options["model_type"],
)
def test_what_other_layers_store_is_not_guessed(options: dict[str, Any]) -> None:
    assert values_per_token(config(**options)) is None


def test_a_window_that_is_not_used_changes_nothing() -> None:
    assert values_per_token(config(model_type="mistral", sliding_window=None)) == 2 * 32 * 8 * 128
    assert (
        values_per_token(config(model_type="qwen2", use_sliding_window=False, sliding_window=4096)) == 2 * 32 * 32 * 128
    )


def test_a_model_on_this_machine_is_read(tmp_path: Path) -> None:
    config(**SHAPES["tiny"]).save_pretrained(tmp_path)
    assert read_values(str(tmp_path)) == 2 * 4 * 2 * 64


def served(monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    monkeypatch.setattr(model, "get", lambda url: answer if url == "http://vllm/v1/models" else None)
    monkeypatch.setattr(model, "read_values", {"/models/own": 1024}.get)


OWN = b'{"data": [{"id": "any", "root": "/models/own"}]}'


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_that_vllm_is_started_with(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, OWN)
    command = arguments(Settings(dtype=dtype), Model("tiny", "tiny"), gpu=not built_for_cpu())
    told = command[command.index("--dtype") + 1]
    assert token_of_vllm(Plan(dtype=dtype), "http://vllm") == Token(1024, told)


@pytest.mark.parametrize("option", ["--dtype=half", "--hf-overrides '{}'", "--hf_overrides={}", "--model other"])
def test_another_model_or_dtype_behind_the_plan_leaves_it_unknown(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, OWN)
    assert token_of_vllm(Plan(vllm_args=f"-- --enforce-eager {option}"), "http://vllm") is None
    assert token_of_vllm(Plan(vllm_args="-- --enforce-eager --model-impl auto"), "http://vllm") is not None


@pytest.mark.parametrize("answer", [None, b"{}", b'{"data": [{"root": null}]}', b'{"data": [{"root": "/no/such"}]}'])
def test_a_model_that_is_not_told_or_not_here_leaves_it_unknown(
    answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(monkeypatch, answer)
    assert token_of_vllm(Plan(), "http://vllm") is None
