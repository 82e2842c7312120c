"""What `python -m servers.hf` makes of its settings before it serves."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from servers.hf.__main__ import load_tokenizer, main
from servers.hf.engine import ModelEngine
from servers.hf.settings import Settings
from servers.hf.worker import limits, load, make_engine
from servers.models import Model, ModelError
from servers.settings import listen


def settings(**changes: Any) -> Settings:
    return Settings(threads=1, **changes)


def engine(tiny: Model, **changes: Any) -> ModelEngine:
    return make_engine(settings(**changes), tiny)


def test_the_engine_runs_the_model(tiny: Model) -> None:
    made = engine(tiny)
    assert (made.name, made.limits.max_model_len, made.model.config.vocab_size) == ("sequential", 2048, 2048)
    assert made.model.dtype == torch.float32


def test_the_context_may_be_made_shorter_but_not_longer(tiny: Model) -> None:
    assert engine(tiny, max_model_len=100).limits.max_model_len == 100
    with pytest.raises(ModelError, match=r"--max-model-len: 4096: the model's limit is 2048"):
        engine(tiny, max_model_len=4096)


@pytest.mark.parametrize(
    ("options", "name", "rows", "capacity"),
    [
        ({}, "sequential", 1, 2048),
        ({"cache": "static"}, "sequential", 1, 2048),
        ({"engine": "batch"}, "batch", 32, 32 * 2048),
        ({"engine": "batch", "max_batch": 3, "max_model_len": 100}, "batch", 3, 300),
        ({"engine": "continuous", "max_batch": 3, "max_model_len": 100}, "continuous", 3, 3 * 112),
        # A budget: a slot is 4,096 bytes; a static row is the whole context; a block is 16 tokens.
        ({"kv_budget": 4096 * 500}, "sequential", 1, 500),
        ({"engine": "batch", "kv_budget": 4096 * 500 + 4095}, "batch", 32, 500),
        ({"engine": "batch", "cache": "static", "kv_budget": 4096 * 5000}, "batch", 2, 4096),
        ({"engine": "batch", "kv_budget": 10**15}, "batch", 32, 32 * 2048),
        # Two blocks are Transformers' own.
        ({"engine": "continuous", "kv_budget": 4096 * 500}, "continuous", 32, 496 - 32),
        ({"engine": "continuous", "kv_budget": 4096 * 48}, "continuous", 32, 16),
    ],
    ids=str,
)
def test_options_and_budget_say_which_engine_it_is_and_what_it_may_hold(
    tiny: Model, options: dict[str, Any], name: str, rows: int, capacity: int
) -> None:
    made = engine(tiny, **options)
    assert (made.name, made.limits.max_batch, made.capacity) == (name, rows, capacity)


@pytest.mark.parametrize(
    ("options", "least", "own"),
    [
        ({}, 1, 0),
        ({"engine": "batch"}, 1, 0),
        ({"engine": "continuous"}, 48, 32),
        ({"cache": "static"}, 2048, 0),
        ({"compile": True, "max_model_len": 64}, 64, 0),
    ],
    ids=str,
)
def test_a_budget_that_holds_nothing_is_refused_with_the_least_that_would_do(
    tiny: Model, options: dict[str, Any], least: int, own: int
) -> None:
    budget = least * 4096 - 1
    with pytest.raises(
        ModelError, match=rf"^--kv-budget: {budget}: {least * 4096} bytes are the least, {least} tokens? of 4096 bytes"
    ):
        engine(tiny, kv_budget=budget, **options)
    assert engine(tiny, kv_budget=budget + 1, **options).capacity == least - own


@pytest.mark.parametrize("option", [{"compile": True}, {"cache": "static"}], ids=str)
def test_a_paged_cache_is_neither_static_nor_compiled(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not possible with --engine continuous, whose cache is paged"):
        settings(engine="continuous", **option)


SMALL: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32
}  # fmt: skip


def test_a_model_whose_layers_forget_is_refused_since_its_memory_could_not_be_accounted_for() -> None:
    weights = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16))
    with pytest.raises(ModelError, match="--model: 'random:tiny': its layers do not store every token"):
        limits(settings(), weights)
    assert limits(settings(), MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None))).max_batch == 1


@pytest.mark.parametrize(("eos", "expected"), [(None, set()), (2, {2}), ([2, 7], {2, 7})])
def test_end_of_text_tokens_are_none_one_or_several(eos: Any, expected: set[int]) -> None:
    assert limits(settings(), LlamaForCausalLM(LlamaConfig(**SMALL, eos_token_id=eos))).eos_token_ids == expected


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_made_in_place_for_a_model_without_any(
    tiny: Model, tmp_path: Path, dtype: Any, expected: torch.dtype
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = Model("random:tiny", str(folder), weights=False)
    weights = load(settings(dtype=dtype), model)
    assert (weights.dtype, weights.training) == (expected, False)
    assert len(load_tokenizer(model)) == 2048


def test_a_device_map_changes_where_weights_are_and_nothing_else(tiny: Model) -> None:
    spread = load(settings(device_map="auto"), tiny)
    assert not spread.training
    there = load(settings(), tiny).state_dict()
    assert all(torch.equal(weight, there.pop(name)) for name, weight in spread.state_dict().items())
    assert there == {}


def test_with_a_device_map_weights_are_made_where_they_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(**SMALL | {"vocab_size": 4096}, initializer_range=0.5)  # enough to see how they spread
    config.save_pretrained(tmp_path)
    made = load(settings(device_map="auto", dtype="bfloat16"), Model("random:small", str(tmp_path), weights=False))
    assert (made.dtype, made.training) == (torch.bfloat16, False)
    assert {weight.device.type for weight in made.parameters()} == {"cpu"}
    assert made.lm_head.weight.float().std().item() == pytest.approx(0.5, rel=0.05)
    assert made.model.norm.weight.unique().tolist() == [1]
    assert "lm_head" not in capsys.readouterr().err  # a report that it was not found


def test_a_model_that_does_not_fit_on_the_gpus_is_refused(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = load(settings(device_map="auto"), tiny)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and none holds it
    monkeypatch.setattr("servers.hf.worker.load", lambda *_: spread)
    with pytest.raises(ModelError, match=r"^--device-map: auto: the GPUs together do not hold the model"):
        engine(tiny, device_map="auto")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["servers.hf", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_an_unknown_shape_ends_it_with_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--port", "0", "--model", "random:gpt5") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("servers.hf: --model: 'random:gpt5': unknown shape 'gpt5'")


@pytest.mark.parametrize("option", ["--compile", "--cache=static"])
def test_an_impossible_engine_ends_it_with_2_and_one_line(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--engine", "continuous", option) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"servers.hf: {option.replace('=', ' ')}: not possible with --engine continuous, whose cache is paged"
    )


@pytest.mark.parametrize("option", ["--compile", "--engine=continuous"])
def test_a_device_map_is_not_for_caches_on_one_device(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--device-map", "auto", option) == 2
    assert capsys.readouterr().err == (
        f"servers.hf: --device-map: not possible with {option.replace('=', ' ')}, whose KV cache is on one device\n"
    )


def test_a_taken_port_ends_it_with_1_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert run(monkeypatch, "--port", str(port), "--model", "random:gpt5") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"servers.hf: --port: {port}: cannot listen")


@pytest.mark.parametrize("config", [{}, {"model_type": "no-such-type"}])
def test_a_folder_that_holds_no_model_we_know_ends_it_with_1_and_one_line(
    config: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(monkeypatch, "--port", "0", "--model", str(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"servers.hf: --model: '{tmp_path}': ")
