"""How well judges agree with people: labelled replies in, agreement with intervals out.

Knows files of labelled replies and what is counted; the statistics are agreement.py's. A reply that a judge could not
score is counted as unscored and left out of kappa; `accuracy_of_all` counts it as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.readers import read_rows
from ..errors import UsageError, nearest
from .agreement import agreement
from .judges import VERDICTS, JudgeLike, Pair, Verdict, judge_all, judge_name
from .statistics import wilson

SKIP = "skip"
OTHER = "other"
LABELS = tuple(verdict for verdict in VERDICTS if verdict != "unscored")
CHUNK = 64


@dataclass(frozen=True)
class Replies:
    """pairs: (prompt, reply); labels: one of `LABELS` each, empty where the file has none; where: line or row."""

    pairs: list[Pair]
    labels: list[str]
    where: list[str]


def read_replies(
    path: str | Path,
    *,
    prompt: str = "prompt",
    response: str = "response",
    label: str | None = None,
    mapping: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Replies:
    """Replies of a .csv, .jsonl, .json or .parquet file; the arguments name its columns.

    mapping: the label column's values -> verdict, or `skip` to leave such rows out; a value that is a verdict already
    needs none. limit: the first so many rows that are kept. Raises UsageError, with the row, for a column that is not
    there, a cell that is no text, or a label without a verdict.
    """
    mapping = dict(mapping or {})
    wrong = [verdict for verdict in mapping.values() if verdict not in (*LABELS, SKIP)]
    if wrong:
        raise UsageError(f"no verdict {wrong[0]!r}.{nearest(wrong[0], LABELS)} Known: {', '.join(LABELS)}, {SKIP}.")
    replies = Replies([], [], [])
    for where, row in read_rows(Path(path).expanduser()):
        if limit is not None and len(replies.pairs) >= limit:
            break
        for column in (prompt, response, label):
            if column is not None and column not in row:
                hint = f"{nearest(column, row)} It has {', '.join(row)}."
                raise UsageError(f"{path}, {where}: no column {column!r}.{hint}")
        verdict = None if label is None else _verdict(row[label], mapping, f"{path}, {where}: column {label!r}")
        if verdict == SKIP:
            continue
        texts = ["" if row[column] is None else row[column] for column in (prompt, response)]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{path}, {where}: {prompt} and {response} must be text.")
        replies.pairs.append((texts[0], texts[1]))
        replies.where.append(where)
        if verdict is not None:
            replies.labels.append(verdict)
    if not replies.pairs:
        raise UsageError(f"{path} holds no reply to judge: look at the label mapping and the limit.")
    return replies


def _verdict(value: Any, mapping: Mapping[str, str], place: str) -> str:
    names = {str(value), str(value).lower()}
    if isinstance(value, (bool, int, float)) and value == int(value):
        names.add(str(int(value)))  # true is 1, and 1.0 of a csv file is 1 as well
    for name in names:
        if name in mapping:
            return mapping[name]
    if str(value).lower() in LABELS:
        return str(value).lower()
    raise UsageError(f"{place} has the label {value!r}: say what it means, --map {value}=refusal, or {value}={SKIP}.")


def judge_in_chunks(
    judge: JudgeLike, pairs: Sequence[Pair], on_progress: Callable[[str, int, int], None] | None = None
) -> Iterator[list[Verdict]]:
    """`judge_all` in chunks of `CHUNK`. A judge with a budget is asked whether it reaches for all before the first."""
    check = getattr(judge, "check_budget", None)
    if check is not None:
        check(pairs)
    for begin in range(0, len(pairs), CHUNK):
        verdicts = judge_all(judge, pairs[begin : begin + CHUNK])
        if on_progress is not None:
            on_progress(judge_name(judge), begin + len(verdicts), len(pairs))
        yield verdicts


def calibrate(
    judge: JudgeLike,
    replies: Replies,
    *,
    positive: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], list[Verdict]]:
    """(the figures, the verdicts) of one judge on labelled replies.

    positive: compare only this verdict against all others together. Figures: n, scored, unscored (with the reasons of
    the first few), accuracy, accuracy_of_all, kappa with low and high (bootstrap over prompts, 95 %), precision and
    recall of each verdict with Wilson's intervals, and the confusion table, label -> verdict -> replies.
    """
    if len(replies.labels) != len(replies.pairs):
        raise UsageError("calibrating needs labels: name their column.")
    if positive is not None and positive not in LABELS:
        raise UsageError(f"no verdict {positive!r}.{nearest(positive, LABELS)} Known: {', '.join(LABELS)}.")
    verdicts = [verdict for chunk in judge_in_chunks(judge, replies.pairs, on_progress) for verdict in chunk]
    told = [v.verdict for v in verdicts]
    kept = [i for i, verdict in enumerate(told) if verdict != "unscored"]

    def two(names: Sequence[str]) -> list[str]:
        return [name if positive is None or name == positive else OTHER for name in names]

    labels, said = two([replies.labels[i] for i in kept]), two([told[i] for i in kept])
    found = agreement(labels, said, groups=[replies.pairs[i][0] for i in kept])
    right = sum(a == b for a, b in zip(labels, said, strict=True))
    reasons = list(dict.fromkeys(v.reason for v in verdicts if v.verdict == "unscored"))
    figures = {
        "judge": judge_name(judge),
        "n": len(told),
        "scored": len(kept),
        "unscored": len(told) - len(kept),
        "unscored_reasons": reasons[:5],
        "accuracy": _number(found.accuracy),
        "accuracy_of_all": _number(right / len(told)),
        "kappa": _number(found.kappa),
        "low": _number(found.low),
        "high": _number(found.high),
        "verdicts": {name: _scores(labels, said, name) for name in sorted({*labels, *said})},
        "confusion": found.confusion,
    }
    return figures, verdicts


def between(first: Sequence[Verdict], second: Sequence[Verdict], pairs: Sequence[Pair]) -> dict[str, Any]:
    """How far two judges agree on the replies that both scored: n, unscored, kappa, low, high, accuracy."""
    kept = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if "unscored" not in (a.verdict, b.verdict)]
    a, b = [first[i].verdict for i in kept], [second[i].verdict for i in kept]
    found = agreement(a, b, groups=[pairs[i][0] for i in kept])
    figures = {"kappa": found.kappa, "low": found.low, "high": found.high, "accuracy": found.accuracy}
    rest = {name: _number(value) for name, value in figures.items()}
    return {"n": len(kept), "unscored": len(first) - len(kept), **rest, "confusion": found.confusion}


def _scores(labels: Sequence[str], said: Sequence[str], name: str) -> dict[str, Any]:
    hits = sum(a == b == name for a, b in zip(labels, said, strict=True))
    return {"precision": _share(hits, said.count(name)), "recall": _share(hits, labels.count(name))}


def _share(hits: int, n: int) -> dict[str, Any]:
    low, high = wilson(hits, n)
    return {"n": n, "value": _number(hits / n) if n else None, "low": _number(low), "high": _number(high)}


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
