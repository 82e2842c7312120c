"""The model that the tests of the servers share: the real `random:tiny`, loaded once."""

from typing import Any

import pytest
import torch
import transformers

from servers import models


@pytest.fixture(scope="session")
def tiny() -> models.Model:
    # In the user's cache folder, so that only the first run ever has to write it.
    return models.resolve("random:tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny: models.Model) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny.source)


@pytest.fixture(scope="session")
def weights(tiny: models.Model) -> Any:
    # Its operations are too small to gain from more threads.
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(tiny.source, dtype=torch.float32).eval()
