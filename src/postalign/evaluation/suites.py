"""Suites: what a run asks. The shipped `starter`, or any file with a `prompt` column.

Knows names, labels and row ids; reading is left to `postalign.data`. Knows nothing of models or judges.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PostalignError, UsageError

if TYPE_CHECKING:
    from ..data.records import Data

STARTER = "starter"
_SLICE = re.compile(r"\[\s*(-?\d*)\s*:\s*(-?\d*)\s*\]\s*$")
_PLAIN_TEXT = Path(__file__).with_name("plain_text.jsonl")


@dataclass(frozen=True)
class Item:
    """One prompt of a suite. id: unique in its suite; label: `harmful`, `benign` or None (not told); kind:
    its category.
    """

    id: str
    label: str | None
    prompt: str
    kind: str | None = None


@dataclass(frozen=True)
class Suite:
    """A named list of prompts."""

    name: str
    items: tuple[Item, ...]

    @property
    def hash(self) -> str:
        """sha256 of ids, labels and prompts: two runs with the same hash asked the same."""
        text = json.dumps([(item.id, item.label, item.prompt) for item in self.items], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def limited(self, n: int) -> Suite:
        """At most `n` prompts of each label, taken evenly from first to last, so that every category is
        there.
        """
        if n < 1:
            raise UsageError(f"a suite cannot be limited to {n} prompts: give 1 or more.")
        kept: list[Item] = []
        for label in sorted({item.label for item in self.items}, key=str):
            rows = [item for item in self.items if item.label == label]
            kept += rows if len(rows) <= n else [rows[i * len(rows) // n] for i in range(n)]
        chosen = {item.id for item in kept}
        return replace(self, items=tuple(item for item in self.items if item.id in chosen))


def load_suite(source: str | Path | Suite | Data, *, split: str = "test", label: str | None = None) -> Suite:
    """A suite by name or file, or one made of loaded data.

    source: `starter` (its `split`; harmful, dangerous-sounding and plain prompts), a csv, jsonl, json or
    parquet file or a hub id with a column `prompt` and an optional `label` (`harmful`/`benign`,
    `unsafe`/`safe`), each with an optional slice such as `advbench.jsonl[400:520]`; or a `Data`. label: for
    rows that have none. The suite is named `starter` or by the file's stem. Raises UsageError for unknown,
    empty or malformed sources.
    """
    if isinstance(source, Suite):
        return source
    if not isinstance(source, (str, Path)):
        return _suite(source.name or "data", source, label)
    from ..data.sources import load_data

    text = str(source).strip()
    path, start, stop = _sliced(text)
    if path == STARTER:  # the split first, then the slice: `starter[:40]` is forty of its test prompts
        rows: Sequence[Any] = load_data(STARTER, split=split)
        rows = rows[start:stop]
    else:
        rows = load_data(text)
    return _suite(Path(path).stem if Path(path).suffix else Path(path).name, rows, label)


def load_suites(sources: Iterable[str | Path | Suite | Data], **settings: Any) -> list[Suite]:
    """`load_suite` of each; their names must differ, since rows are told apart by them."""
    suites = [load_suite(source, **settings) for source in sources]
    if not suites:
        raise UsageError("no suite given: name one, for instance `starter`.")
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two suites are named {name!r}: copy one of the files to another name.")
    return suites


def load_texts(source: str | Path | None = None, *, limit: int | None = None) -> list[str]:
    """Paragraphs to measure perplexity on: the shipped ones, or those of a .jsonl (column `text`) or .txt
    file.

    A .txt file is split at blank lines. limit: the first so many. Raises UsageError with the row number.
    """
    path = Path(source) if source is not None else _PLAIN_TEXT
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {path}: give a .jsonl with a column `text`, or a .txt file.") from error
    if path.suffix == ".txt":
        texts = [part.strip() for part in re.split(r"\n\s*\n", content)]
    elif path.suffix == ".jsonl":
        texts = [_text_of(path, i, line) for i, line in enumerate(content.splitlines(), 1) if line.strip()]
    else:
        raise UsageError(f"{path} is of no known kind: give a .jsonl with a column `text`, or a .txt file.")
    texts = [text for text in texts if text][:limit]
    if not texts:
        raise UsageError(f"{path} holds no text: give a file with at least one paragraph.")
    return texts


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["text"]).strip()
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}, row {number}: not a JSON object with a key `text`; mend or remove the row."
        ) from error


def _sliced(text: str) -> tuple[str, int | None, int | None]:
    found = _SLICE.search(text)
    if not found:
        return text, None, None
    start, stop = (int(part) if part not in ("", "-") else None for part in found.groups())
    return text[: found.start()].strip(), start, stop


def _suite(name: str, rows: Iterable[Any], label: str | None) -> Suite:
    records = list(rows)
    if not records:
        raise UsageError(f"the suite {name!r} has no rows: give another file or slice.")
    ids = [str(row.id) if row.id is not None else "" for row in records]
    if not all(ids) or len(set(ids)) != len(ids):  # row numbers, where the file has no ids of its own
        ids = [str(i) for i in range(len(records))]
    items = []
    for row_id, row in zip(ids, records, strict=True):
        if not row.prompt or not str(row.prompt).strip():
            raise PostalignError(f"the suite {name!r} has an empty prompt (id {row_id}): remove that row.")
        items.append(Item(row_id, row.label or label, row.prompt, row.category or row.type))
    return Suite(name, tuple(items))
