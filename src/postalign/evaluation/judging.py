"""Verdicts of a run: a file for each judge, so that another judge reads the same replies and nothing is made again.

Knows replies and judges; knows nothing of models or of what the verdicts are counted for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UsageError
from .journal import Journal, Row
from .judge_specs import load_judge
from .judges import Judge, judge_all, judge_name

DEFAULT_JUDGES: tuple[str, ...] = ("rules", "embedded")
REPLY_KEY = ("system", "suite", "seed", "id")
AT_ONCE = 64  # replies that go to a judge together
T = TypeVar("T")
Key = tuple[Any, ...]


def named_judges(judges: Judge | str | Iterable[Judge | str] | None) -> dict[str, Judge]:
    """Judges by name, the first being the one that a report leads with; None: `DEFAULT_JUDGES`.

    Each is a callable (prompt, response) -> Verdict or a name that `load_judge` knows. Raises UsageError for none, or
    two of one name.
    """
    given = DEFAULT_JUDGES if judges is None else [judges] if isinstance(judges, str) or callable(judges) else judges
    found: dict[str, Judge] = {}
    for one in given:
        judge = load_judge(one) if isinstance(one, str) else one
        name = judge_name(judge)
        if any(file_of(name) == file_of(other) for other in found):
            raise UsageError(f"two judges are called {name!r}: name each once.")
        found[name] = judge
    if not found:
        raise UsageError("no judge given: name one, for instance `rules`.")
    return found


def file_of(judge: str) -> str:
    """The file of a judge's verdicts in a run."""
    return f"verdicts-{re.sub(r'[^A-Za-z0-9.+-]+', '-', judge).strip('-') or 'judge'}.jsonl"


def described(judges: dict[str, Judge]) -> dict[str, Any]:
    """What the manifest keeps of each judge: its file, and a digest of what decides its verdicts, where it has one."""
    return {name: {"file": file_of(name), "digest": getattr(judge, "digest", None)} for name, judge in judges.items()}


def read_verdicts(out: Path, judge: str) -> Journal:
    return Journal(out / file_of(judge), REPLY_KEY)


def give_verdicts(judge: Judge, replies: Sequence[Row], verdicts: Journal, tell: Callable[[int], None]) -> bool:
    """Judge the replies that have no verdict yet, `AT_ONCE` at a time, each on disk with its batch.

    Returns whether any had none. replies: in their lasting order, so that after a kill the same ones go together.
    """
    changed = False
    done = sum(key_of(row) in verdicts for row in replies)
    tell(done)
    for batch, missing in unfinished(replies, AT_ONCE, lambda row: key_of(row) in verdicts):
        found = judge_all(judge, [(row["prompt"], row["response"]) for row in batch])
        told = zip(batch, found, strict=True)
        verdicts.append(verdict_row(row, one) for row, one in told if key_of(row) not in verdicts)
        changed = True
        done += len(missing)
        tell(done)
    return changed


def verdict_row(reply: Row, verdict: Any) -> Row:
    score = None if verdict.score is None else round(float(verdict.score), 4)
    found = {name: reply[name] for name in REPLY_KEY}
    return found | {"verdict": verdict.verdict, "score": score, "reason": verdict.reason}


def key_of(row: Row) -> Key:
    return tuple(row[name] for name in REPLY_KEY)


def unfinished(items: Sequence[T], size: int, done: Callable[[T], bool]) -> Iterator[tuple[Sequence[T], list[T]]]:
    """(batch, what is not done of it) for each run of `size` items in which something is not done.

    Batches begin at the same items every time: after a kill, an unfinished one is worked through again as a whole, in
    the same company, because what a row computes depends in its last bits on the rows beside it.
    """
    for begin in range(0, len(items), size):
        batch = items[begin : begin + size]
        missing = [item for item in batch if not done(item)]
        if missing:
            yield batch, missing
