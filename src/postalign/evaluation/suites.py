"""Suites: what a run asks. The shipped `starter`, or any file with a `prompt` column.

Knows names, labels and row ids; reading is left to `postalign.data`. Knows nothing of models or judges.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PostalignError, UsageError
from .benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from ..data.records import Data

STARTER = "starter"
_NAMED = re.compile(r"(?P<name>[\w.+-]+)(?::(?P<part>\w+))?(?:=(?P<file>.+))?")
_SLICE = re.compile(r"\[\s*(-?\d*)\s*:\s*(-?\d*)\s*\]\s*$")
_PLAIN_TEXT = Path(__file__).with_name("plain_text.jsonl")


@dataclass(frozen=True)
class Item:
    """One prompt of a suite. id: unique in its suite; label: `harmful`, `benign` or None (not told); kind:
    its category.

    group: the same name on wordings of one intent, which are scored together: all right, or the group is wrong.
    wrapper: the jailbreak it was put into (wrappers.py). prefill: how the reply is made to begin. reference: the answer
    wanted, for scores against it.
    """

    id: str
    label: str | None
    prompt: str
    kind: str | None = None
    group: str | None = None
    wrapper: str | None = None
    prefill: str | None = None
    reference: str | None = None

    @property
    def chat(self) -> Any:
        """What to generate from: the prompt, or where the reply is begun a chat that ends with its beginning."""
        if self.prefill is None:
            return self.prompt
        begun = {"role": "assistant", "content": self.prefill, "prefix": True}
        return [{"role": "user", "content": self.prompt}, begun]


@dataclass(frozen=True)
class Suite:
    """A named list of prompts. source: where they are from (hub id, revision and whether it is pinned, or the file's
    name; licence), for the record: it tells no two suites apart.
    """

    name: str
    items: tuple[Item, ...]
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def hash(self) -> str:
        """sha256 of all that the suite asks: two with the same hash give the same rows."""
        rows = [list(vars(item).values()) for item in self.items]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()

    @property
    def groups(self) -> dict[str, list[Item]]:
        """Group -> its items; an item without a group is one of its own, under its id."""
        found: dict[str, list[Item]] = {}
        for item in self.items:
            found.setdefault(item.group if item.group is not None else item.id, []).append(item)
        return found

    def groups_right(self, right: Mapping[str, bool]) -> tuple[int, int]:
        """(groups of which every item is right, groups), from item id -> right; an item that is not there is wrong."""
        groups = self.groups.values()
        return sum(all(right.get(item.id, False) for item in items) for items in groups), len(groups)

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


def load_suite(
    source: str | Path | Suite | Data,
    *,
    split: str = "test",
    label: str | None = None,
    data_dir: str | Path | None = None,
) -> Suite:
    """A suite by name or file, or one made of loaded data.

    source: `starter` (its `split`; harmful, dangerous-sounding and plain prompts); the name of a public set
    (benchmarks.py), such as `xstest`, with a part of it (`jailbreakbench:benign`) or a file or folder in its columns
    (`xstest=FILE`); a csv, jsonl, json or parquet file or a hub id with a column `prompt` and an optional `label`
    (`harmful`/`benign`, `unsafe`/`safe`), also under another name (`mine=FILE`). Each may have a slice, such as
    `advbench.jsonl[400:520]`. Or a `Data`. label: for rows that have none. data_dir: a folder whose NAME.jsonl (csv,
    json, parquet) or NAME_PART.jsonl take the place of the hub; default: the environment's POSTALIGN_DATA. The suite
    is named as the source is, or by the file's stem. Raises UsageError for unknown, empty or malformed sources.
    """
    if isinstance(source, Suite):
        return source
    if not isinstance(source, (str, Path)):
        return _suite(source.name or "data", source, label)
    from ..data.sources import load_data

    text = str(source).strip()
    path, start, stop = _sliced(text)
    named = None if Path(path).exists() else _NAMED.fullmatch(path)
    if named and path != STARTER:
        name, part, file = named.group("name", "part", "file")
        if name in BENCHMARKS or not (file or Path(path).suffix):
            from .benchmark_rows import load_benchmark

            suite = load_benchmark(name, part=part, file=file, data_dir=data_dir)
            return replace(suite, items=_part(suite.items, text, start, stop))
        if file and not part:
            return replace(load_suite(text.partition("=")[2], split=split, label=label), name=name)
    if path == STARTER:  # the split first, then the slice: `starter[:40]` is forty of its test prompts
        rows: Sequence[Any] = load_data(STARTER, split=split)
        rows = rows[start:stop]
    else:
        rows = load_data(text)
    suite = _suite(Path(path).stem if Path(path).suffix else Path(path).name, rows, label)
    return replace(suite, source={"file": Path(path).name} if path != STARTER else {"name": STARTER, "split": split})


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


def _part(items: Sequence[Item], text: str, start: int | None, stop: int | None) -> tuple[Item, ...]:
    kept = tuple(items[start:stop])
    if not kept:
        raise UsageError(f"{text} is out of range: the suite has {len(items)} rows.")
    return kept


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
        said = row.label or label
        answer = getattr(row, "response", None) if said != "harmful" else None  # a refusal is no answer to compare with
        group = getattr(row, "group", None)
        items.append(Item(row_id, said, row.prompt, row.category or row.type, group, reference=answer))
    return Suite(name, tuple(items))
