"""Files of requests and lengths: rows in, checked entries out; a bad row is named with its file, line and field."""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Row = Mapping[str, object]
Raw = TypeVar("Raw")
Entry = TypeVar("Entry")


class FieldError(ValueError):
    """A field of a row holds what it must not; the message names the field, the value and what was expected."""

    def __init__(self, field: str, value: object, expected: str):
        shown = repr(value)
        super().__init__(f"{field}: {shown if len(shown) <= 80 else shown[:77] + '...'}: expected {expected}")


class LeaveOutError(Exception):
    """The row is well formed but cannot be sent; its message is the reason, under which it is counted."""


def open_stamp(field: str, path: str) -> tuple[int, int]:
    """Tell one version of a file from the next; raises ValueError that names the option when there is none."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise ValueError(f"{field}: {path!r}: {error.strerror}; expected a file that can be read") from None
    return status.st_mtime_ns, status.st_size


def entries(
    path: Path,
    rows: Iterable[tuple[str, Raw]],
    parse: Callable[[Raw], Entry],
    skip_bad_lines: bool,
    skipped: Counter[str],
) -> Iterator[Entry]:
    """Parse (place, row) pairs; what is not yielded is counted in `skipped` by its reason.

    Raises ValueError with file, place, field, value and what was expected for the first bad row, unless
    `skip_bad_lines`.
    """
    for place, raw in rows:
        try:
            entry = parse(raw)
        except LeaveOutError as reason:
            skipped[str(reason)] += 1
        except FieldError as error:
            if not skip_bad_lines:
                raise ValueError(f"{path}: {place}: {error}") from None
            skipped["bad line"] += 1
        else:
            yield entry


def csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a CSV file with a header, by line; raises ValueError for a field of more than 131,072 characters."""
    # Bytes that are not UTF-8 come through, so that it is the field that is named.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a JSONL file, by number; empty ones are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line


def json_row(line: bytes) -> Row:
    """Read one line of a JSONL file; raises FieldError for what is no JSON object."""
    row: object = None
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
    if not isinstance(row, dict):
        raise FieldError("line", line.decode(errors="replace").strip(), "a JSON object")
    return row


def whole(row: Row, field: str, least: int = 0) -> int:
    """Whole number of a field, as text or as a number; raises FieldError."""
    value = row.get(field)
    with suppress(ValueError):
        if isinstance(value, str | int) and not isinstance(value, bool) and int(value) >= least:
            return int(value)
    raise FieldError(field, value, f"a whole number of {least} or more")


def finite(row: Row, field: str) -> float:
    """Finite number of 0 or more of a field, as text or as a number; raises FieldError."""
    value = row.get(field)
    with suppress(ValueError, OverflowError):
        if isinstance(value, str | int | float) and not isinstance(value, bool) and 0 <= float(value) < math.inf:
            return float(value)
    raise FieldError(field, value, "a number of 0 or more")


def check_enough(path: Path, found: int, wanted: int | None, skipped: Counter[str]) -> None:
    """Raise ValueError when a file holds no request, or fewer than a run of a given number sends."""
    left_out = "".join(f", {count} left out: {reason}" for reason, count in skipped.items())
    if not found:
        raise ValueError(f"{path}: no request in it that can be sent{left_out}")
    if wanted is not None and found < wanted:
        raise ValueError(f"requests: {wanted} with warmup and drain, but {path} holds {found}{left_out}")
