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
# The header, and the line itself.
CsvLine = tuple[list[str], str]
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


def csv_lines(path: Path) -> Iterator[tuple[str, CsvLine]]:
    """Lines of a CSV file with its header, by number; empty ones are passed over.

    Raises ValueError for a header that cannot be read.
    """
    header: list[str] = []
    # Bytes that are not UTF-8 come through, so that it is the field that is named.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if header and line.strip():
                yield f"line {number}", (header, line.rstrip("\n"))
            elif not header:
                try:
                    header = next(csv.reader([line.rstrip("\n")], strict=True), [])
                except csv.Error as error:
                    raise ValueError(f"{path}: line {number}: {error}") from None


def csv_row(line: CsvLine) -> Row:
    """Read one line of a CSV file by itself: a quote that is not closed spoils no other; raises FieldError."""
    header, text = line
    try:
        values = next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise FieldError("line", text, f"fields with commas between: {error}") from None
    return dict(zip(header, values, strict=False))


def json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a JSONL file, by number; empty ones are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line


def json_row(line: bytes) -> Row:
    """Read one line of a JSONL file; raises FieldError for what is no JSON object, with the column where it breaks."""
    row, where = None, ""
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        where = f": column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        where = f": {error}"
    if not isinstance(row, dict):
        raise FieldError("line", line.decode(errors="replace").strip(), f"a JSON object{where}")
    return row


def whole(row: Row, field: str, least: int = 0) -> int:
    """Whole number of a field, as text or as a number; raises FieldError."""
    value = row.get(field)
    with suppress(ValueError):
        if isinstance(value, str | int) and _is_plain(value) and int(value) >= least:
            return int(value)
    raise FieldError(field, value, f"a whole number of {least} or more")


def finite(row: Row, field: str) -> float:
    """Finite number of 0 or more of a field, as text or as a number; raises FieldError."""
    value = row.get(field)
    with suppress(ValueError, OverflowError):
        if isinstance(value, str | int | float) and _is_plain(value) and 0 <= float(value) < math.inf:
            return float(value)
    raise FieldError(field, value, "a number of 0 or more")


def _is_plain(value: object) -> bool:
    """Whether it is neither true nor false, nor has the underscores that Python allows in numbers."""
    return not isinstance(value, bool) and "_" not in str(value)


def check_enough(path: Path, found: int, wanted: int | None, skipped: Counter[str]) -> None:
    """Raise ValueError when a file holds no request, or fewer than a run of a given number sends."""
    left_out = "".join(f", {count} left out: {reason}" for reason, count in skipped.items())
    if not found:
        raise ValueError(f"{path}: no request in it that can be sent{left_out}")
    if wanted is not None and found < wanted:
        raise ValueError(f"requests: {wanted} with warmup and drain, but {path} holds {found}{left_out}")
