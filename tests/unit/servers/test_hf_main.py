"""What `python -m servers.hf` makes of its settings before it serves."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from servers.hf.__main__ import Settings, load, main, service
from servers.models import Model, ModelError
from servers.settings import listen


def settings(**changes: Any) -> Settings:
    return Settings(threads=1, **changes)


def test_the_service_is_that_of_the_model(tiny: Model) -> None:
    served = service(settings(model=tiny.source))
    assert (served.name, served.vocab_size, served.max_model_len) == (tiny.source, 2048, 2048)
    assert served.engine.model.dtype == torch.float32


def test_the_context_may_be_made_shorter_but_not_longer(tiny: Model) -> None:
    assert service(settings(model=tiny.source, max_model_len=100)).max_model_len == 100
    with pytest.raises(ModelError, match=r"--max-model-len: 4096: the model's limit is 2048"):
        service(settings(model=tiny.source, max_model_len=4096))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_made_in_place_for_a_model_without_any(
    tiny: Model, tmp_path: Path, dtype: Any, expected: torch.dtype
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights, tokenizer = load(settings(dtype=dtype), Model("random:tiny", str(folder), weights=False))
    assert (weights.dtype, weights.training) == (expected, False)
    assert len(tokenizer) == 2048


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
