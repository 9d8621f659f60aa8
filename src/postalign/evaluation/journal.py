"""A jsonl file that grows row by row and survives a kill: finished rows stay, a half-written last one is
dropped.

Knows lines and keys; knows nothing of what the rows mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import PostalignError
from ..files import write_whole

Row = dict[str, Any]


class Journal:
    """The rows of `path`, in the order in which they were written; `key` names the columns that tell rows
    apart.
    """

    def __init__(self, path: Path, key: Sequence[str]):
        self.path, self.key = path, tuple(key)
        self.rows: list[Row] = []
        self._seen: dict[tuple[Any, ...], Row] = {}
        for row in self._read():
            self._take(row)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._seen

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows and see them safely on disk. Raises PostalignError when the disk refuses; older rows stay
        whole.
        """
        rows = list(rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as handle:
                handle.write(_lines(rows))
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise PostalignError(
                f"could not write {self.path}: {error.strerror or error}. "
                "Free space and run the same command again; finished rows are kept."
            ) from error
        for row in rows:
            self._take(row)

    def get(self, key: tuple[Any, ...]) -> Row | None:
        """The row of that key, None where there is none yet."""
        return self._seen.get(key)

    def arrange(self, order: Callable[[Row], Any]) -> None:
        """Put the rows into the order of a key, on disk too: then it no longer shows in which order they came."""
        self.rows.sort(key=order)
        text = _lines(self.rows)
        if not self.path.exists() or self.path.read_bytes() != text:
            write_whole(self.path, text)

    def _take(self, row: Row) -> None:
        key = tuple(row[name] for name in self.key)
        if key not in self._seen:
            self._seen[key] = row
            self.rows.append(row)

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        rows: list[Row] = []
        whole = 0  # bytes up to the end of the last whole row
        for number, line in enumerate(lines[:-1], 1):
            row = self._parse(line)
            if row is None and number < len(lines) - 1:
                raise PostalignError(
                    f"{self.path}, row {number} is damaged: remove that line, its prompt is asked again."
                )
            if row is not None:
                rows.append(row)
                whole += len(line) + 1
        if whole < sum(len(line) + 1 for line in lines) - 1:
            with self.path.open("r+b") as handle:
                handle.truncate(whole)
        return rows

    def _parse(self, line: bytes) -> Row | None:
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:
            return None
        return row if isinstance(row, dict) and all(name in row for name in self.key) else None


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
