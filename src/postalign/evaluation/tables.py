"""The figures of a run, counted from its rows: shares of each verdict, what is bad and right, and the measures.

Knows rows and statistics; knows no files. Columns of a figure: system, suite, label, judge (None where no judge had a
say), n, metric, value, low, high: a 95 % interval. n counts prompts (or groups, or texts); where a prompt was asked
with several seeds, its share over the seeds is one observation, so that intervals are not narrower than they may be.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .journal import Row
from .judges import VERDICTS
from .judging import key_of
from .outcomes import BAD, all_right, is_bad
from .statistics import mean_per_token, wilson

Units = dict[Any, list[float]]  # of a prompt or a group: a number for each seed
NO_WRAPPER, NO_KIND = "none", "other"


def judged(replies: Iterable[Row], verdicts: Mapping[str, Mapping[Any, Row]]) -> list[Row]:
    """The replies with `verdicts`, judge -> its row; a judge that has not read a reply is not in there."""
    found = []
    for row in replies:
        key = key_of(row)
        found.append(row | {"verdicts": {name: one[key] for name, one in verdicts.items() if key in one}})
    return found


def summarize(rows: Sequence[Row], judges: Sequence[str], measures: Iterable[Row] = ()) -> list[Row]:
    """The rows of `summary.json`, for each system, suite and label.

    Of each judge: the share of each verdict among all replies; `harm` or `over_refusal`, among those that it could
    score; `group_right`, where prompts are grouped; `score`, the mean, where it tells more than the verdicts.
    Of no judge: `rouge_l` where there are reference answers, and the measures.
    """
    cells: dict[tuple[str, str, str | None], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["system"], row["suite"], row["label"]].append(row)
    found = []
    for (system, suite, label), part in cells.items():
        for judge in judges:
            for verdict in VERDICTS:
                units = by_prompt(part, judge, lambda found, row, verdict=verdict: found == verdict)
                found += _share(system, suite, label, judge, verdict, units)
            for metric, units in outcomes(part, judge, label).items():
                found += _share(system, suite, label, judge, metric, units)
            if graded(rows, judge):
                found += _mean(system, suite, label, judge, "score", scores(part, judge))
        found += _mean(system, suite, label, None, "rouge_l", references(part))
    return found + [{k: v for k, v in row.items() if k != "parts"} for row in measures]


def breakdown(rows: Sequence[Row], judges: Sequence[str]) -> list[Row]:
    """The rows of `breakdown.json`: `harm` and `over_refusal` for each category and each wrapper.

    Columns besides: by (`kind` or `wrapper`), name. Where no prompt of a label is wrapped, or none has a category,
    there is nothing to break down; else those without one stand beside the others.
    """
    cells: dict[tuple[str, str, str | None, str, str], list[Row]] = defaultdict(list)
    for by, other in (("kind", NO_KIND), ("wrapper", NO_WRAPPER)):
        told = {row["label"] for row in rows if row[by] is not None}
        for row in rows:
            if row["label"] in told and row["label"] in BAD:
                cells[row["system"], row["suite"], row["label"], by, row[by] or other].append(row)
    found = []
    for (system, suite, label, by, name), part in cells.items():
        for judge in judges:
            metric = BAD[label][0]
            for row in _share(system, suite, label, judge, metric, outcomes(part, judge, label)[metric]):
                found.append({**row, "by": by, "name": name})
    return found


def outcomes(rows: Sequence[Row], judge: str, label: str | None) -> dict[str, Units]:
    """The metrics that tell bad from good, as units: `harm` or `over_refusal`, and `group_right` where groups are."""
    if label not in BAD:
        return {}
    found = {BAD[label][0]: by_prompt(rows, judge, lambda verdict, row: is_bad(label, verdict))}
    groups: dict[tuple[Any, Any], list[str]] = defaultdict(list)
    for row in rows:
        if row["group"] is not None and judge in row["verdicts"]:
            groups[row["group"], row["seed"]].append(row["verdicts"][judge]["verdict"])
    units: Units = defaultdict(list)
    for (group, _), verdicts in groups.items():
        right = all_right(label, verdicts)
        if right is not None:
            units[group].append(float(right))
    return found | ({"group_right": units} if units else {})


def by_prompt(rows: Iterable[Row], judge: str, hit: Any) -> Units:
    """`hit(verdict, row)` as 0 or 1 for each prompt and seed; None leaves the reply out."""
    units: Units = defaultdict(list)
    for row in rows:
        one = row["verdicts"].get(judge)
        value = None if one is None else hit(one["verdict"], row)
        if value is not None:
            units[row["id"]].append(float(value))
    return units


def graded(rows: Iterable[Row], judge: str) -> bool:
    """Whether a judge's scores say more than its verdicts: some verdict comes with more than one score."""
    seen: dict[str, float] = {}
    given = (row["verdicts"][judge] for row in rows if judge in row["verdicts"])
    return any(
        one["score"] is not None and seen.setdefault(one["verdict"], one["score"]) != one["score"] for one in given
    )


def scores(rows: Iterable[Row], judge: str) -> Units:
    units: Units = defaultdict(list)
    for row in rows:
        one = row["verdicts"].get(judge)
        if one is not None and one["score"] is not None and one["verdict"] != "unscored":
            units[row["id"]].append(one["score"])
    return units


def references(rows: Iterable[Row]) -> Units:
    units: Units = defaultdict(list)
    for row in rows:
        if row["rouge_l"] is not None:
            units[row["id"]].append(row["rouge_l"])
    return units


def means(units: Units) -> dict[Any, float]:
    """Each unit's mean over its seeds."""
    return {key: math.fsum(values) / len(values) for key, values in units.items()}


def figure(
    system: str, suite: str, label: str | None, judge: str | None, n: int, metric: str, estimate: Sequence[float | None]
) -> Row:
    """One row of a table; what is not a finite number becomes None."""
    numbers = [None if v is None or not math.isfinite(v) else round(v, 6) for v in estimate]
    row = {"system": system, "suite": suite, "label": label, "judge": judge, "n": n, "metric": metric}
    return row | dict(zip(("value", "low", "high"), numbers, strict=True))


def _share(system: str, suite: str, label: str | None, judge: str, metric: str, units: Units) -> list[Row]:
    values = means(units).values()
    if not values:
        return []
    hits, n = min(math.fsum(values), len(values)), len(values)
    return [figure(system, suite, label, judge, n, metric, (hits / n, *wilson(hits, n)))]


def _mean(system: str, suite: str, label: str | None, judge: str | None, metric: str, units: Units) -> list[Row]:
    values = list(means(units).values())
    if not values:
        return []
    mean, low, high = mean_per_token(values, [1] * len(values))
    if len(values) == 1:
        low, high = 0.0, 1.0  # these lie in [0, 1], and of one nothing more can be told
    return [figure(system, suite, label, judge, len(values), metric, (mean, max(0.0, low), min(1.0, high)))]
