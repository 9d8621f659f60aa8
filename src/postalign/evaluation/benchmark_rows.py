"""A public test set as a suite: from the hub at its pinned revision, or from a file in the same columns.

Knows how rows become items; the facts about each set are in benchmarks.py, file formats in `postalign.data`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.readers import READERS, Row, read_rows
from ..data.records import read_label
from ..data.sources import hub_rows
from ..errors import PostalignError, UsageError, nearest
from .benchmarks import BENIGN, HARMFUL, Benchmark, benchmark
from .suites import Item, Suite

DATA_VARIABLE = "POSTALIGN_DATA"
NOT_PINNED = "revision not pinned"


def load_benchmark(
    name: str,
    *,
    part: str | None = None,
    file: str | Path | None = None,
    data_dir: str | Path | None = None,
) -> Suite:
    """The public set `name`, or one `part` of it, named `NAME` or `NAME:PART`.

    file: a file or folder to read in place of the hub, in the publisher's columns or ours (`prompt`, `label`,
    `category`). data_dir: see `load_suite`. `Suite.source` records where the rows are from, with the revision and
    whether it is pinned. Raises UsageError for a wrong name, part or file, PostalignError when the set cannot be had.
    """
    entry = benchmark(name)
    if entry.choices:
        raise UsageError(f"{name} is multiple choice: run `postalign choice MODEL --suite {name} --out RUN`.")
    if part is not None and part not in entry.parts:
        raise UsageError(f"{name} has no part {part!r}.{nearest(part, entry.parts)} It has: {', '.join(entry.parts)}.")
    wanted = (part,) if part is not None else entry.default
    files = local_files(name, wanted, file, data_dir)
    source: dict[str, Any] = {"name": name, "parts": list(wanted), "licence": entry.licence, "cite": entry.cite}
    items: list[Item] = []
    empty = 0
    if files:
        source["files"] = sorted({path.name for _, path in files})
        for of, path in files:
            rows, skipped = _items(entry, read_rows(path), path.name, of, wanted)
            items, empty = items + rows, empty + skipped
    else:
        revision, record = hub_revision(name, entry)
        source |= record
        for of in wanted:
            place = entry.parts[of]
            raw = _asked(name, entry, place.split, place.config, revision)
            rows, skipped = _items(entry, raw, f"{entry.hub}, {of}", of, wanted)
            items, empty = items + rows, empty + skipped
    if not items:
        raise UsageError(f"{name} has no rows of {', '.join(wanted)}: give another file or part.")
    if empty:
        source["empty_rows_left_out"] = empty
    return Suite(name if part is None else f"{name}:{part}", tuple(_numbered(items)), source)


def hub_revision(name: str, entry: Benchmark) -> tuple[str, dict[str, Any]]:
    """(commit to load, its record). Where none is pinned the hub is asked for the newest, and the record says so.

    Raises UsageError for a set that is not on the hub, with the place where its file is.
    """
    if entry.hub is None:
        raise UsageError(f"{name} is not on the hub: get {entry.file} and say --suite {name}=FILE.")
    record = {"hub": entry.hub, "revision": entry.revision, "pinned": entry.revision is not None}
    if entry.revision is not None:
        return entry.revision, record
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(entry.hub).sha
    except Exception as error:  # the client's errors have no common ancestor
        raise PostalignError(
            f"could not ask the hub for the revision of {entry.hub} ({type(error).__name__}): "
            f"check the connection, or say --suite {name}=FILE.{_or_file(entry)}"
        ) from error
    return str(found), {**record, "revision": str(found), "note": NOT_PINNED}


def local_files(
    name: str, wanted: Iterable[str], file: str | Path | None, data_dir: str | Path | None
) -> list[tuple[str | None, Path]]:
    """(part that the file is of, None where its rows tell; file) for what is to be read in place of the hub; empty
    for the hub.

    A folder holds NAME.ext, or NAME_PART.ext or PART.ext for each wanted part. Raises UsageError when a named file or
    folder lacks it.
    """
    if file is not None:
        path = Path(file).expanduser()
        if path.is_dir():
            found = _in_folder(path, name, wanted, own=True)
            if not found:
                raise UsageError(f"{path} holds no {name}.jsonl (csv, json, parquet): name the file, {name}=FILE.")
            return found
        if not path.is_file():
            raise UsageError(f"no such file: {path}. Give {name}=FILE ({', '.join(READERS)}) or leave it out.")
        only = list(wanted)
        return [(only[0] if len(only) == 1 else None, path)]
    place = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
    if not place:
        return []
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: correct --data-dir (or {DATA_VARIABLE}).")
    return _in_folder(folder, name, wanted, own=False)


def _in_folder(folder: Path, name: str, wanted: Iterable[str], own: bool) -> list[tuple[str | None, Path]]:
    wanted = list(wanted)

    def first(stem: str) -> Path | None:
        return next((path for end in READERS if (path := folder / f"{stem}{end}").is_file()), None)

    whole = first(name)
    if whole is not None:
        return [(wanted[0] if len(wanted) == 1 else None, whole)]
    parts = [(part, first(f"{name}_{part}") or (first(part) if own else None)) for part in wanted]
    found: list[tuple[str | None, Path]] = [(part, path) for part, path in parts if path is not None]
    if found and len(found) < len(wanted):
        lacking = next(part for part, path in parts if path is None)
        raise UsageError(f"{folder} lacks {name}_{lacking}: add it, or name one part, {name}:{found[0][0]}.")
    return found


def _asked(name: str, entry: Benchmark, split: str, config: str | None, revision: str) -> list[Row]:
    assert entry.hub is not None
    try:
        return hub_rows(entry.hub, split, config=config, revision=revision)
    except UsageError:
        raise
    except PostalignError as error:
        message = str(error)
        if entry.gated and "asks for permission" not in message:
            message += f" It is gated: its terms are at https://huggingface.co/datasets/{entry.hub}."
        raise PostalignError(f"{message} Or give a file: --suite {name}=FILE.{_or_file(entry)}") from error


def _or_file(entry: Benchmark) -> str:
    return f" The publisher has one: {entry.file}." if entry.file else ""


def _items(
    entry: Benchmark, raw: list[Row], place: str, of: str | None, wanted: Sequence[str]
) -> tuple[list[Item], int]:
    """Items of the wanted parts, and how many rows were left out because their prompt is empty."""
    names = {str(name).lower(): name for _, row in raw for name in row}
    column = {
        field: next((names[one.lower()] for one in ones if one.lower() in names), None)
        for field, ones in {
            "prompt": (*entry.prompt, "prompt"),
            "kind": (*entry.kind, "category", "type"),
            "context": entry.context,
            "id": entry.id,
            "label": entry.label,
            "part": entry.part,
            "group": ("group",),
        }.items()
    }
    if column["prompt"] is None:
        raise UsageError(f"{place} has no column {entry.prompt[0]!r}: it has {', '.join(map(str, names.values()))}.")
    items, empty = [], 0
    for where, row in raw:
        value = {field: _text(row.get(name)) if name is not None else None for field, name in column.items()}
        part = of
        if value["part"] is not None and value["part"].lower() in entry.parts:
            part = value["part"].lower()
        if part is not None and part not in wanted:
            continue
        if value["prompt"] is None:
            empty += 1
            continue
        label = _label(entry, part, wanted, value, f"{place}, {where}")
        only = entry.parts[part].only if part is not None else None
        if only is not None and label != only:
            continue
        prompt = value["prompt"] if value["context"] is None else f"{value['context']}\n\n---\n\n{value['prompt']}"
        several = part is not None and len(wanted) > 1
        own = value["id"] if value["id"] is not None else ""
        ident = f"{part}-{own}" if several and own else own
        items.append(Item(ident, label, prompt, value["kind"], value["group"]))
    return items, empty


def _label(entry: Benchmark, part: str | None, wanted: Sequence[str], value: dict[str, str | None], here: str) -> str:
    """From the label's column, else the rule of the set, else what all rows of the part are."""
    if value["label"] is not None:
        try:
            found = read_label(value["label"])
        except UsageError as error:
            raise UsageError(f"{here}: {error}") from error
        assert found is not None
        return found
    if entry.contrast is not None:
        if value["kind"] is None:
            raise UsageError(f"{here}: neither a label nor a type tells what it is: add a column `label`.")
        return HARMFUL if value["kind"].startswith(entry.contrast) else BENIGN
    labels = {entry.parts[one].label for one in ([part] if part is not None else wanted)}
    label = labels.pop() if len(labels) == 1 else None
    if label is None:
        raise UsageError(
            f"{here}: is it {', '.join(wanted)}? Name the part (NAME:{wanted[0]}=FILE) or add a column `label`."
        )
    return label


def _numbered(items: list[Item]) -> list[Item]:
    """Ids of their own where the rows have them and no two are the same, else row numbers."""
    ids = [item.id for item in items]
    if all(ids) and len(set(ids)) == len(ids):
        return items
    return [replace(item, id=str(i)) for i, item in enumerate(items)]


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return value if isinstance(value, str) else str(value)
