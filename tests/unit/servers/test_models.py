"""What `--model` means, and the random-weight models that are written for it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from servers import models
from servers.models import Model, ModelError, resolve


def test_an_unknown_shape_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        resolve("random:gpt5", tmp_path)
    expected = "--model: 'random:gpt5': unknown shape 'gpt5'; known shapes: tiny, gpt2, opt-13b, llama-7b, llama-13b,"
    assert str(refused.value).startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_refused_and_not_taken_for_an_id(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder; give a Hugging Face id, a model folder or random:SHAPE"):
        resolve(str(tmp_path / "absent"))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder holds no config\.json"):
        resolve(str(tmp_path))


def test_a_folder_is_served_under_the_name_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve("~/model") == Model("~/model", str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["gpt2", "facebook/opt-125m"])
def test_a_hugging_face_id_is_left_to_the_library(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(name, tmp_path) == Model(name, name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HEADROOM_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/headroom"),
        ({"HOME": "/c"}, "/c/.cache/headroom"),
    ],
)
def test_the_cache_folder_is_the_nearest_that_was_named(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HEADROOM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.cache_folder() == Path(expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_that_is_written_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        models.write("tiny", tmp_path / name)
    written = contents(tmp_path / "one")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(written)
    assert written == contents(tmp_path / "two")


def test_a_server_of_another_user_can_read_a_model_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "write", partial(_write_for_oneself, "model.safetensors"))
    folder = Path(resolve("random:tiny", tmp_path).source)
    assert folder.stat().st_mode & 0o055 == 0o055
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044


def _write_for_oneself(name: str, shape: str, folder: Path) -> None:
    """As safetensors does."""
    (folder / name).touch(0o600)


def test_writing_a_model_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    undisturbed = torch.rand(3).tolist()
    torch.manual_seed(1)
    models.write("tiny", tmp_path)
    assert torch.rand(3).tolist() == undisturbed


def test_of_a_large_shape_only_configuration_and_tokenizer_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real vocabulary takes seconds to train.
    monkeypatch.setitem(models.SHAPES, "llama-7b", models.SHAPES["llama-7b"] | {"vocab_size": 500})
    models.write("llama-7b", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"]) == (32, 4096)


def test_a_model_that_was_written_is_found_again(tmp_path: Path, tiny: Model) -> None:
    folder = tmp_path / Path(tiny.source).name
    folder.mkdir()
    assert resolve("random:tiny", tmp_path) == Model("random:tiny", str(folder), weights=True)
    assert list(folder.iterdir()) == []


def test_a_shape_too_large_to_write_has_no_weights(tmp_path: Path, tiny: Model) -> None:
    folder = tmp_path / Path(tiny.source).name.replace("tiny", "llama-7b")
    folder.mkdir()
    assert resolve("random:llama-7b", tmp_path) == Model("random:llama-7b", str(folder), weights=False)


def test_every_shape_is_one_that_the_library_knows() -> None:
    for shape in models.SHAPES.values():
        config = transformers.AutoConfig.for_model(**shape)
        assert type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        assert all(getattr(config, key) == value for key, value in shape.items())


@pytest.mark.parametrize("size", [300, 2048])
def test_the_vocabulary_has_exactly_the_size_asked_for(size: int) -> None:
    assert len(models.tokenizer(size)) == size


def test_every_token_is_whole_ascii_text(tokenizer: Any) -> None:
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    assert all(text and text.isascii() for text in texts)
    assert texts.count(models.END_OF_TEXT) == 1
    assert texts[tokenizer.eos_token_id] == models.END_OF_TEXT


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2047), max_size=40))
def test_a_text_is_the_sum_of_its_tokens(tokenizer: Any, tokens: list[int]) -> None:
    assert tokenizer.decode(tokens) == "".join(tokenizer.decode([token]) for token in tokens)


@settings(max_examples=50)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("\t\n\r"), max_size=60))
def test_every_ascii_text_can_be_said(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
