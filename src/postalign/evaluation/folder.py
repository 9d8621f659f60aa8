"""The folder of a run: who works on it, in which order its rows lie, and its tables. Knows the files, and no model."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import write_whole
from .comparisons import agreement, comparisons
from .costs import COST_KEY, cost_rows
from .journal import Journal, Row
from .judging import REPLY_KEY, key_of, read_verdicts
from .run_settings import read_manifest
from .tables import breakdown, judged, summarize

try:
    import fcntl
except ImportError:  # not on Windows; there two processes on one run are not kept apart
    fcntl = None

MEASURE_KEY = ("system", "suite", "metric")
TABLES = ("summary", "breakdown", "comparisons", "agreement", "costs")
OLD = "rows.jsonl"  # of runs made before replies and verdicts were kept apart


@dataclass(frozen=True)
class Run:
    """One run as read from its folder. rows: replies with `verdicts` (judge -> row). finished: its tables were written.

    tables: name -> rows, see `TABLES`. maps: head maps.
    """

    name: str
    settings: dict[str, Any]
    rows: list[Row]
    judges: list[str]
    tables: dict[str, list[Row]]
    maps: dict[str, Any] = field(default_factory=dict)
    finished: bool = True

    @property
    def summary(self) -> list[Row]:
        return self.tables["summary"]

    def lead(self, row: Row) -> str:
        """The verdict of the first judge that read this reply; `unscored` where none has."""
        given = (row["verdicts"][name]["verdict"] for name in self.judges if name in row["verdicts"])
        return next(given, "unscored")

    @property
    def bases(self) -> list[str]:
        """Systems that are the model as it is."""
        return bases_of(self.settings)


def bases_of(manifest: Mapping[str, Any]) -> list[str]:
    return [name for name, digest in (manifest.get("systems") or {}).items() if digest is None]


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """This process alone works on the run inside the block. Raises UsageError where another one does."""
    lock = out / ".lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = lock.open("ab")
    except OSError as error:
        raise UsageError(f"cannot write to {out} ({error.strerror}): choose another folder for the run.") from error
    with handle:
        taken = UsageError(f"another process is at work on {out}: wait for it, or choose another folder.")
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise taken from error
            if not lock.exists() or not os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                raise taken  # the one before took its lock away between our opening it and our turn
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def arrange(out: Path, items: Mapping[str, Sequence[str]]) -> None:
    """Put the rows into their lasting order: systems, suites and seeds as in the manifest, prompts as in `items`.

    items: suite -> ids in their order.
    """
    manifest = read_manifest(out)
    systems, suites, seeds = (_places(manifest.get(name) or ()) for name in ("systems", "suites", "seeds"))
    replies = Journal(out / "replies.jsonl", REPLY_KEY)
    places = {suite: _places(ids) for suite, ids in items.items()}
    for row in replies.rows:
        places.setdefault(row["suite"], {}).setdefault(row["id"], len(places[row["suite"]]))

    def place(row: Row) -> tuple[int, ...]:
        suite, within = row["suite"], places[row["suite"]]
        return systems[row["system"]], suites[suite], seeds[row["seed"]], within.get(row["id"], len(within))

    def figure_place(row: Row) -> tuple[int, str, int]:
        return systems[row["system"]], row["metric"], suites.get(row["suite"], -1)

    replies.arrange(place)
    Journal(out / "costs.jsonl", COST_KEY).arrange(place)
    Journal(out / "measures.jsonl", MEASURE_KEY).arrange(figure_place)


def finish(out: Path) -> list[Row]:
    """Put the verdicts in order, write the tables, and return the rows of `summary.json` and `costs.json`."""
    manifest = read_manifest(out)
    replies = Journal(out / "replies.jsonl", REPLY_KEY).rows
    order = {key_of(row): i for i, row in enumerate(replies)}
    for judge in manifest.get("judges") or {}:
        read_verdicts(out, judge).arrange(lambda row: order.get(key_of(row), len(order)))
    run = read_run(out, anew=True)
    for name in reversed(TABLES):  # summary.json last: with it the run counts as finished
        write_whole(out / f"{name}.json", json.dumps(run.tables[name], indent=1, ensure_ascii=False) + "\n")
    for leftover in out.glob(".*.json*.*"):  # of a write that a kill cut short
        leftover.unlink(missing_ok=True)
    return [*run.tables["summary"], *run.tables["costs"]]


def read_run(folder: Path, *, anew: bool = False) -> Run:
    """The files of a run. Raises UsageError when `folder` is not one, or has no rows yet.

    An unfinished run is read as far as it went: its tables are made of what is there. anew: in any case.
    """
    manifest = read_manifest(folder)
    if (folder / OLD).exists() and not (folder / "replies.jsonl").exists():
        raise UsageError(f"the run {folder} was made by an older version: make it again in a new folder.")
    try:
        replies = Journal(folder / "replies.jsonl", REPLY_KEY).rows
        judges = list(manifest.get("judges") or {})
        verdicts = {name: {key_of(row): row for row in read_verdicts(folder, name).rows} for name in judges}
        rows = judged(replies, verdicts)
        finished = (folder / "summary.json").exists()
        measures = Journal(folder / "measures.jsonl", MEASURE_KEY).rows
        costs = Journal(folder / "costs.jsonl", COST_KEY).rows
        if finished and not anew:
            tables = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in TABLES}
        else:
            tables = tables_of(rows, judges, bases_of(manifest), measures, costs)
        path = folder / "head_effects.json"
        maps = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise UsageError(f"a file of the run {folder} is damaged ({error}): run `postalign eval` again.") from error
    if not rows:
        raise UsageError(f"the run {folder} has no rows yet: let `postalign eval` finish first.")
    return Run(folder.resolve().name, manifest, rows, judges, tables, maps, finished)


def tables_of(
    rows: Sequence[Row], judges: Sequence[str], bases: Sequence[str], measures: Sequence[Row], costs: Sequence[Row]
) -> dict[str, list[Row]]:
    """All tables of a run, by name."""
    return {
        "summary": summarize(rows, judges, measures),
        "breakdown": breakdown(rows, judges),
        "comparisons": comparisons(rows, judges, bases, measures),
        "agreement": agreement(rows, judges),
        "costs": cost_rows(costs, bases),
    }


def missing_replies(out: Path) -> int:
    """How many of the replies that were asked for are not there yet."""
    manifest = read_manifest(out)
    there = Journal(out / "replies.jsonl", REPLY_KEY).rows
    wanted = sum(manifest["suites"][suite]["n"] for _, suite, _ in manifest.get("asked") or ())
    return max(0, wanted - len(there))


def _places(names: Any) -> dict[Any, int]:
    return {name: i for i, name in enumerate(names)}


__all__ = ["MEASURE_KEY", "Run", "arrange", "claimed", "finish", "missing_replies", "read_run", "tables_of"]
