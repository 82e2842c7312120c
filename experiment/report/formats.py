"""How numbers are written for people: the filters of the page."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from experiment.report.layers import amount
from experiment.words import Words, name_of


def filters() -> dict[str, Callable[..., str]]:
    """The filters by the name that the page uses."""
    return {
        "ms": ms,
        "number": number,
        "gib": gib,
        "amount": _amount,
        "share": share,
        "percent": percent,
        "name_of": name_of,
        "counted": counted,
    }


def ms(seconds: float | None) -> str:
    """Seconds in milliseconds."""
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"


def number(value: float | None, digits: int = 0) -> str:
    """A number with so many digits after the point."""
    return "-" if value is None else f"{value:,.{digits}f}"


def gib(value: float) -> str:
    """Bytes in GiB."""
    return f"{value / 2**30:.1f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{value:.1%}"


def share(ends: tuple[float | None, float | None], words: Words) -> str:
    """A share in percent, or the bounds between which it is."""
    texts = dict.fromkeys(number(None if end is None else end * 100, 1) for end in ends)
    return words("join.range").join(texts)


def counted(names: Iterable[str], separator: str) -> str:
    """Names in their order, those that are equal once with their number."""
    return separator.join(name if count == 1 else f"{count} x {name}" for name, count in Counter(names).items())


def _amount(value: Any, unit: str, words: Words) -> str:
    return amount(words, value, unit)
