"""Files as raw rows: csv, jsonl, json and parquet, each row with the place it stands at.

Knows file formats; knows nothing of what the columns mean. Every failure is one line with file and row
number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import PostalignError, UsageError

Row = tuple[str, dict[str, Any]]
"""Where the row stands (`line 3`, `item 3`, `row 3`; counted from 1) and its columns."""

INSTALL = "pip install 'postalign[data]'"


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, by its ending. Raises UsageError for a file that is missing, empty or malformed."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path} is not a data file: convert it to {', '.join(READERS)}.")
    rows = reader(path)
    if not rows:
        raise UsageError(f"{path} holds no rows: give a file with at least one.")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: not UTF-8 text. Save the file as UTF-8.") from error
    except OSError as error:
        raise PostalignError(f"cannot read {path}: {error.strerror}.") from error


def _csv(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    names: list[str] | None = None
    rows: list[Row] = []
    following = start = 1  # the line where a record begins: a quoted value may hold line breaks
    try:
        for values in reader:
            start, following = following, reader.line_num + 1
            if not values:
                continue
            if names is None:
                names = values
                continue
            if len(values) > len(names):
                raise UsageError(
                    f"{path}, line {start}: {len(values)} values for {len(names)} columns. "
                    "Quote values that hold a comma."
                )
            rows.append((f"line {start}", dict(zip_longest(names, values))))
    except csv.Error as error:
        raise UsageError(f"{path}, line {following}: malformed csv ({error}).") from error
    return rows


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: malformed JSON ({_reason(error)}).") from error
            rows.append((f"line {number}", _object(value, f"{path}, line {number}")))
    return rows


def _json(path: Path) -> list[Row]:
    text = _text(path)
    if not text.strip():
        return []
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object a line? Name the file .jsonl." if error.msg == "Extra data" else ""
        raise UsageError(f"{path}, line {error.lineno}: malformed JSON ({error.msg}).{hint}") from error
    if not isinstance(values, list):
        raise UsageError(f"{path} must hold a list of objects: [{{...}}, {{...}}].")
    if all(isinstance(value, str) for value in values):  # a bare list of texts: each is a prompt
        values = [{"prompt": value} for value in values]
    return [(f"item {i}", _object(value, f"{path}, item {i}")) for i, value in enumerate(values, start=1)]


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise PostalignError(f"reading {path} needs pyarrow: {INSTALL}.") from error
    try:
        values = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} is not a parquet file that can be read ({reason}).") from error
    return [(f"row {i}", value) for i, value in enumerate(values, start=1)]


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{place}: expected an object with named columns, found {type(value).__name__}.")
    return value


def _reason(error: ValueError) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
