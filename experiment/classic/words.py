"""The words of `headroom classic`, in English and Chinese; each text takes the figures that it names."""

from pathlib import Path
from typing import Any

import yaml

TEXTS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("classic.yaml").read_text(encoding="utf-8"))
LANGUAGES = tuple(TEXTS)


def amount(value: float | None, unit: str = "bytes") -> str:
    """Bytes in the largest unit of which there is at least one, or a count; - where it is not known."""
    if not value:
        return "-" if value is None else "0"
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    scale, name = next(((s, n) for s, n in ((2**30, "GiB"), (2**20, "MiB")) if value >= s), (2**10, "KiB"))
    return f"{value / scale:,.2f} {name}"


def say(language: str, key: str, figures: dict[str, Any] | None = None) -> str:
    """A text with its figures; amounts are (value, unit), and `held` is bytes."""
    shown = {
        name: amount(*value) if isinstance(value, tuple) else amount(value) if name == "held" else value
        for name, value in (figures or {}).items()
    }
    return TEXTS[language][key].format(**shown)
