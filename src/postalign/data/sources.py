"""Data by name: the starter set, a file or a hub data set, as typed rows.

Knows where rows are and which column means what; file formats are in readers.py. Every failure is one line.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ..errors import PostalignError, UsageError, nearest
from .readers import INSTALL, READERS, Row, read_rows
from .records import FIELDS, Data, Prompt, read_label

STARTER = "starter"
STARTER_PARTS = ("harmful", "borderline", "plain")
GUESSES = {
    "prompt": ("prompt", "instruction", "question", "goal", "behavior"),
    "response": ("response", "output", "answer"),
}
SLICE = re.compile(r"(?P<source>.*)\[(?P<start>\d*):(?P<stop>\d*)\]")
HUB = "https://huggingface.co"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_data(
    source: str | Path,
    *,
    split: str | None = None,
    columns: dict[str, str | None] | None = None,
    label: str | None = None,
) -> Data:
    """Rows of `source`.

    source: `starter`; a .csv, .jsonl, .json (a list of objects) or .parquet file; or the id of a hub data set
        (`owner/name`). A suffix such as `[:400]` or `[400:520]` takes a part, counted from 0, before any
        split.
    split: only rows of this split: of a hub data set, or by the `split` column of the starter set or a file.
    columns: which column means what, `{"prompt": "goal"}`; None as the column's name leaves that field out.
        Not named: a column of the field's own name, for the prompt also `instruction`, `question`, `goal` or
        `behavior`, for the response also `output` or `answer`; capitals do not matter.
    label: the label of rows that have none.

    Raises UsageError, with file and row number, for anything malformed; PostalignError when a source cannot
    be had.
    """
    text = str(source)
    label = read_label(label)
    found = SLICE.fullmatch(text)
    place, start, stop = found.group("source", "start", "stop") if found else (text, "", "")
    if place == STARTER:
        rows = _starter()
        if columns:
            raise UsageError("the starter set has fixed columns: leave columns out.")
    else:
        raw = _raw_rows(place, split)
        rows = _typed(raw, place, columns or {})
    rows = _part(rows, text, start, stop)
    if label is not None:
        rows = [_with_label(row, label) for row in rows]
    if split is not None and not _is_hub(place):
        kept = [row for row in rows if row.split == split]
        if not kept:
            known = sorted({row.split for row in rows if row.split})
            have = f"it has {', '.join(known)}" if known else "it has no split column"
            raise UsageError(f"{text} has no rows of split {split!r}: {have}.{nearest(split, known)}")
        rows = kept
    return Data(rows, Path(place).name + text[len(place) :] if not _is_hub(place) else text)


def _starter() -> list[Prompt]:
    rows: list[Prompt] = []
    for part in STARTER_PARTS:
        with as_file(files("postalign.data") / STARTER / f"{part}.jsonl") as path:
            if not path.is_file():
                raise PostalignError(f"the starter set lacks {path.name}: install postalign again.")
            raw = [(where, {"type": part, **row}) for where, row in read_rows(path)]
            rows += _typed(raw, str(path), {})
    return rows


def _is_hub(place: str) -> bool:
    return Path(place).suffix.lower() not in READERS and not Path(place).exists() and bool(HUB_ID.fullmatch(place))


def _raw_rows(place: str, split: str | None) -> list[Row]:
    path = Path(place).expanduser()
    if path.is_dir():
        raise UsageError(f"{place} is a folder: give one of its files ({', '.join(READERS)}).")
    if path.is_file():
        return read_rows(path)
    if _is_hub(place):
        return hub_rows(place, split)
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in READERS]
    except OSError:
        siblings = []
    hint = nearest(path.name, [STARTER, *siblings])
    raise UsageError(f"no such data: {place}.{hint} Give {STARTER}, a file ({', '.join(READERS)}) or owner/name.")


def hub_rows(
    name: str, split: str | None = None, *, config: str | None = None, revision: str | None = None
) -> list[Row]:
    """Raw rows of the hub data set `name`, with the place each stands at.

    config, split, revision: as in `datasets.load_dataset`; left out where None. Raises UsageError when a split must be
    chosen, PostalignError when the set cannot be had (a gated one says where its terms are).
    """
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise PostalignError(f"no file {name}, and a hub data set needs one more package: {INSTALL}.") from error
    place = [name] if config is None else [name, config]
    chosen = {"split": split} if revision is None else {"split": split, "revision": revision}
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(*place, **chosen)
    except Exception as error:  # the client's errors have no common ancestor
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if "gated" in str(error).lower() or re.search(r"\b40[13]\b", reason):
            raise PostalignError(
                f"{name} asks for permission: accept its terms at {HUB}/datasets/{name}, "
                "then log in with `hf auth login` and run the same command again."
            ) from error
        raise PostalignError(f"could not load the hub data set {name}: {reason}.") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise UsageError(f"{name} has several splits: choose split= one of {', '.join(map(str, loaded))}.")
        loaded = next(iter(loaded.values()))
    return [(f"row {i}", dict(row)) for i, row in enumerate(loaded, start=1)]


def _typed(raw: list[Row], place: str, columns: dict[str, str | None]) -> list[Prompt]:
    """Rows with named fields. Raises UsageError for a column that is not there or a value that cannot be."""
    present = list(dict.fromkeys(name for _, row in raw for name in row))
    used = _columns(present, place, columns)
    rows = []
    for where, row in raw:
        here = f"{place}, {where}"
        if used["prompt"] not in row:
            found = nearest(used["prompt"], row)
            raise UsageError(f"{here}: no column {used['prompt']!r}.{found}")
        values = {field: _value(row.get(column), field, here) for field, column in used.items()}
        if values["prompt"] is None:
            raise UsageError(f"{here}: the prompt is empty. Fill it in or remove the row.")
        try:
            rows.append(Prompt(**values))  # type: ignore[arg-type]
        except UsageError as error:
            raise UsageError(f"{here}: {error}") from error
    return rows


def _columns(present: list[str], place: str, asked: dict[str, str | None]) -> dict[str, str]:
    """Which of the `present` columns each field is read from."""
    for field in asked:
        if field not in FIELDS:
            raise UsageError(f"unknown field {field!r} in columns.{nearest(field, FIELDS)} Known: {', '.join(FIELDS)}.")
    for column in asked.values():
        if column is not None and column not in present:
            raise UsageError(
                f"{place} has no column {column!r}.{nearest(column, present)} It has: {', '.join(present)}."
            )
    lowered: dict[str, str] = {}
    for name in present:
        lowered.setdefault(name.lower(), name)
    used = {}
    for field in FIELDS:
        if field in asked:
            column = asked[field]
        else:
            column = next((lowered[guess] for guess in GUESSES.get(field, (field,)) if guess in lowered), None)
        if column is not None:
            used[field] = column
    if "prompt" not in used:
        hint = nearest("prompt", present)
        raise UsageError(f"{place} has no prompt column.{hint} Name one with columns: it has {', '.join(present)}.")
    return used


def _value(value: Any, field: str, here: str) -> str | None:
    """Text, or None for nothing; an id or a group may be a number. Raises UsageError for anything else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return value
    if field in ("id", "group") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if field in ("category", "type"):
        return str(value)
    raise UsageError(f"{here}: {field} must be text, found {type(value).__name__}.")


def _with_label(row: Prompt, label: str) -> Prompt:
    return replace(row, label=label) if row.label is None else row


def _part(rows: list[Prompt], text: str, start: str, stop: str) -> list[Prompt]:
    first, last = int(start or 0), int(stop) if stop else len(rows)
    if first >= last or last > len(rows):
        raise UsageError(f"{text} is out of range: the source has {len(rows)} rows, so [0:{len(rows)}] is all of it.")
    return rows[first:last]
