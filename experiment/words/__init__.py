"""The texts of reports and rules in each language: one YAML file each, with the same keys and placeholders."""

from functools import cache
from importlib.resources import files

import yaml

# The first is shown where nothing says which one the reader wants.
LANGUAGES = {"en": "English", "zh": "中文"}
# What the targets of most plans are called; the others have the names that the plan gives them.
NAMES = {"hf": "HF", "vllm": "vLLM"}


def name_of(target: str) -> str:
    """What people read for the name of a target."""
    return NAMES.get(target, target)


class Words:
    """The texts of one language; called with a key and the values of its placeholders."""

    def __init__(self, language: str):
        self.language = language
        self._texts = read(language)

    def __call__(self, key: str, **values: object) -> str:
        """The text of a key; raises KeyError for one that is not there, or for a placeholder without a value."""
        return self._texts[key].format(**values)

    def named(self, group: str, name: str, otherwise: str | None = None) -> str:
        """What `name` is called in a group of names that may grow, such as gates; else `otherwise`, else itself."""
        return self._texts.get(f"{group}.{name}", name if otherwise is None else otherwise)

    def level(self, level: float, *, closed: bool) -> str:
        """A level: requests in flight, or in an open loop requests a second."""
        return self("level.closed" if closed else "level.open", level=f"{level:g}")


@cache
def read(language: str) -> dict[str, str]:
    """All texts of a language by key."""
    return dict(yaml.safe_load(files(__package__).joinpath(f"{language}.yaml").read_text(encoding="utf-8")))
