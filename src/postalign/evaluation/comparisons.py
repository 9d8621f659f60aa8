"""Each system beside the base on the same prompts, and each judge beside the others on the same replies.

Differences have a paired bootstrap interval and an exact or randomisation test; p-values are adjusted for the number of
comparisons that a judge makes in the run (Holm), and a comparison is resolved where the adjusted one is below 0.05.
Knows rows, no files.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .agreement import kappas
from .journal import Row
from .judges import VERDICTS
from .outcomes import BAD
from .resampling import paired_bootstrap, sign_flip, table_bootstrap
from .statistics import LEVEL, holm, mcnemar, wilson
from .tables import Units, by_prompt, graded, means, outcomes, references, scores

SCORED = tuple(verdict for verdict in VERDICTS if verdict != "unscored")
Cells = dict[tuple[str, str | None], dict[str, list[Row]]]


def comparisons(rows: Sequence[Row], judges: Sequence[str], bases: Sequence[str], measures: Iterable[Row]) -> list[Row]:
    """The rows of `comparisons.json`: every system against the first of `bases`, for each suite, label and judge.

    Columns: system, base, suite, label, judge, metric, n pairs, left_out (pairs that the judge could not score on
    either side), base_value, value, difference (system less base), low, high, only_base, only_system (prompts on which
    only the one did it), test, p, p_holm, resolved. Shares of one seed are tested by McNemar's exact test; means, and
    shares over several seeds, by changes of sign. Perplexity is compared as its logarithm, in nats per token.
    """
    if not bases:
        return []
    base, cells = bases[0], defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["suite"], row["label"]][row["system"]].append(row)
    found = []
    for (suite, label), systems in cells.items():
        if base not in systems:
            continue
        for system, part in systems.items():
            if system in bases:
                continue
            for judge, metric, ours, theirs in _metrics(part, systems[base], judges, label):
                place = {"system": system, "base": base, "suite": suite, "label": label, "judge": judge}
                found += _compared(place, metric, ours, theirs)
    found += _perplexities(measures, bases)
    for judge in (*judges, None):  # judges look at the same thing: one more of them is not one more question
        family = [row for row in found if row["judge"] == judge]
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"], row["resolved"] = float(f"{p:.6g}"), p < LEVEL
            row["p"] = float(f"{row['p']:.6g}")
    return found


def _metrics(
    part: list[Row], base: list[Row], judges: Sequence[str], label: str | None
) -> Iterator[tuple[str | None, str, Units, Units]]:
    for judge in judges:
        ours, theirs = outcomes(part, judge, label), outcomes(base, judge, label)
        names = [name for name in ours if name in theirs]
        yield from ((judge, name, ours[name], theirs[name]) for name in names)
        for verdict in ["degenerate"] if label in BAD else ["refusal", "degenerate"]:

            def hit(found: str, row: Row, verdict: str = verdict) -> bool | None:
                return None if found == "unscored" else found == verdict

            yield judge, verdict, by_prompt(part, judge, hit), by_prompt(base, judge, hit)
        if graded([*part, *base], judge):
            yield judge, "score", scores(part, judge), scores(base, judge)
    yield None, "rouge_l", references(part), references(base)


def _compared(place: Row, metric: str, ours: Units, theirs: Units) -> list[Row]:
    a, b = means(ours), means(theirs)
    shared = [key for key in b if key in a]
    if not shared:
        return []
    d = [a[key] - b[key] for key in shared]
    once = all(len(units[key]) == 1 for units in (ours, theirs) for key in shared)
    shares = metric not in ("rouge_l", "score")
    only_base, only_system = (sum(sign * value > 0 for value in d) for sign in (-1, 1))
    test, p = ("McNemar", mcnemar(only_base, only_system)) if shares and once else ("sign flip", sign_flip(d))
    left_out = len(a.keys() | b.keys()) - len(shared)
    values = [math.fsum(one[key] for key in shared) / len(shared) for one in (b, a)]
    return [_row(place, metric, len(shared), left_out, values, paired_bootstrap(d), (only_base, only_system), test, p)]


def _perplexities(measures: Iterable[Row], bases: Sequence[str]) -> list[Row]:
    rows = [row for row in measures if row["metric"] == "perplexity" and row.get("parts")]
    found = []
    for row in rows:
        base = next((r for r in rows if r["system"] in bases and r["suite"] == row["suite"]), None)
        if base is None or row["system"] in bases:
            continue
        pairs = [(a, b) for a, b in zip(row["parts"], base["parts"], strict=True) if a[1] and a[1] == b[1]]
        if not pairs:
            continue
        d = [a[0] - b[0] for a, b in pairs]
        counts = [a[1] for a, _ in pairs]
        values = [math.fsum(one[i][0] for one in pairs) / sum(counts) for i in (1, 0)]
        place = {"system": row["system"], "base": base["system"], "suite": row["suite"], "label": None, "judge": None}
        changed = sum(x < 0 for x in d), sum(x > 0 for x in d)
        interval = paired_bootstrap(d, counts)
        found.append(_row(place, "log_perplexity", len(d), 0, values, interval, changed, "sign flip", sign_flip(d)))
    return found


def _row(
    place: Row,
    metric: str,
    n: int,
    left_out: int,
    values: Sequence[float],
    interval: Sequence[float],
    changed: tuple[int, int],
    test: str,
    p: float,
) -> Row:
    names = ("base_value", "value", "difference", "low", "high")
    numbers = dict(zip(names, (round(v, 6) for v in (*values, *interval)), strict=True))
    counts = {"only_base": changed[0], "only_system": changed[1]}
    return {**place, "metric": metric, "n": n, "left_out": left_out, **numbers, **counts, "test": test, "p": p}


def agreement(rows: Sequence[Row], judges: Sequence[str]) -> list[Row]:
    """The rows of `agreement.json`: each two judges on the replies that both could score, for each label and all.

    Columns: first, second, label (`all` for all), n, unscored (by one of them at least), agreement with low and high
    (Wilson), kappa with kappa_low and kappa_high (Cohen 1960; bootstrap), verdicts, table: how often the first said the
    one (row) and the second the other (column).
    """
    found = []
    for first, second in itertools.combinations(judges, 2):
        pairs: dict[Any, Counter[tuple[str, str]]] = defaultdict(Counter)
        for row in rows:
            given: Mapping[str, Row] = row["verdicts"]
            if first in given and second in given:
                pair = given[first]["verdict"], given[second]["verdict"]
                for label in ("all", row["label"]):
                    pairs[label][pair] += 1
        for label, counts in pairs.items():
            table = [[counts[a, b] for b in SCORED] for a in SCORED]
            n, same = sum(map(sum, table)), sum(table[i][i] for i in range(len(SCORED)))
            low, high = wilson(same, n)
            measured = [None if math.isnan(v) else round(v, 4) for v in table_bootstrap(table, kappas)]
            found.append(
                {
                    "first": first,
                    "second": second,
                    "label": label,
                    "n": n,
                    "unscored": sum(counts.values()) - n,
                    "agreement": round(same / n, 6) if n else None,
                    "low": round(low, 6),
                    "high": round(high, 6),
                    **dict(zip(("kappa", "kappa_low", "kappa_high"), measured, strict=True)),
                    "verdicts": list(SCORED),
                    "table": table,
                }
            )
    return found
