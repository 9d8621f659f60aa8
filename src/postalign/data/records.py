"""What a row of data is, and a sequence of rows with a content hash.

Knows labels and splits; knows nothing of files, models or tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import overload

from ..errors import UsageError, nearest

LABELS = {"harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign"}
SPLITS = ("fit", "tune", "test")


@dataclass(frozen=True)
class Prompt:
    """One request.

    prompt: the user's words.
    label: `harmful`, `benign` or None when it is not known; `unsafe` and `safe` are read as these.
    response: the answer wanted (a refusal, for a harmful prompt). A row that has one is a pair.
    unsafe_response: an answer that is not wanted, for a guide trained on it; never shipped with this package.
    category, type, id: free text. split: `fit`, `tune`, `test` or the source's own word. group: the same name on
    rows that ask for the same thing in other words.
    """

    prompt: str
    label: str | None = None
    category: str | None = None
    response: str | None = None
    id: str | None = None
    split: str | None = None
    type: str | None = None
    unsafe_response: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", read_label(self.label))


FIELDS = tuple(field.name for field in fields(Prompt))


@dataclass(frozen=True)
class Contrast:
    """One request with a wanted and an unwanted answer."""

    prompt: str
    chosen: str
    rejected: str


def read_label(label: str | None) -> str | None:
    """`harmful`, `benign` or None, from any spelling of them. Raises UsageError for another word."""
    if label is None:
        return None
    word = str(label).strip().lower()
    if word not in LABELS:
        raise UsageError(f"unknown label {label!r}.{nearest(word, LABELS)} Known: {', '.join(LABELS)}.")
    return LABELS[word]


class Data(Sequence[Prompt]):
    """Rows with a name. Immutable; slicing, filtering and `a + b` give new ones."""

    def __init__(self, rows: Iterable[Prompt], name: str = "data") -> None:
        self.rows: tuple[Prompt, ...] = tuple(rows)
        self.name = name

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Data: ...
    def __getitem__(self, index: int | slice) -> Prompt | Data:
        return Data(self.rows[index], self.name) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.rows)

    def __add__(self, other: Data) -> Data:
        return Data(self.rows + other.rows, f"{self.name}+{other.name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Data) and self.rows == other.rows

    def __hash__(self) -> int:
        return hash(self.rows)

    def __repr__(self) -> str:
        return f"Data({self.name!r}, {len(self)} rows)"

    def filter(self, keep: Callable[[Prompt], bool]) -> Data:
        """The rows for which `keep(row)` is true, in their order."""
        return Data((row for row in self.rows if keep(row)), self.name)

    @property
    def harmful(self) -> Data:
        """The rows labelled harmful."""
        return self.filter(lambda row: row.label == "harmful")

    @property
    def benign(self) -> Data:
        """The rows labelled benign."""
        return self.filter(lambda row: row.label == "benign")

    def split(self, name: str) -> Data:
        """The rows whose split is `name` (for example `fit`, `tune` or `test`); empty when there are none."""
        return self.filter(lambda row: row.split == name)

    def pairs(self) -> Data:
        """The rows with a response. Raises UsageError when none has one."""
        found = self.filter(lambda row: bool(row.response))
        if not found:
            raise UsageError(f"{self.name} has no row with a response: add a `response` column or map one to it.")
        return found

    @property
    def hash(self) -> str:
        """sha256 of the rows' contents in their order, as 64 hex digits; the name does not count."""
        sha = hashlib.sha256()
        for row in self.rows:
            values = {name: value for name, value in asdict(row).items() if value is not None}
            sha.update(json.dumps(values, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return sha.hexdigest()
