"""How far two judges, or a judge and people, agree: Cohen's kappa, a confusion table, and bootstrap intervals.

Takes labels as they come; what counts as unscored is the caller's to say (`calibration.py`). Knows nothing of judges.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Agreement:
    """n: rows; accuracy: share of equal labels; kappa: Cohen's, with a 95 % interval (nan where it cannot be told);
    confusion: first's label -> second's label -> rows.
    """

    n: int
    accuracy: float
    kappa: float
    low: float
    high: float
    confusion: dict[str, dict[str, int]]


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa (Cohen 1960): agreement beyond what the two label shares give by chance, 1 for full agreement.

    nan where it cannot be told: no rows, or both gave one and the same label throughout.
    """
    table, _ = _tables(first, second, None)
    return float(kappas(table.sum(0)[None])[0])


def confusion(first: Sequence[Hashable], second: Sequence[Hashable]) -> dict[str, dict[str, int]]:
    """Counts by first's label, then second's, both in the order of their names; every label has a row and a column."""
    tables, names = _tables(first, second, None)
    counts = tables.sum(0)
    return {a: {b: int(counts[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}


def agreement(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    groups: Sequence[Hashable] | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Everything above at once. groups: what hangs together (replies to one prompt) is drawn together in the bootstrap;
    default each row by itself. The interval is that of percentiles over `samples` draws.
    """
    tables, _ = _tables(first, second, groups)
    counts = tables.sum(0)
    n = int(counts.sum())
    low = high = math.nan
    if n:
        draws = np.random.default_rng(seed).multinomial(len(tables), np.full(len(tables), 1 / len(tables)), samples)
        drawn = np.einsum("sg,gab->sab", draws.astype(np.float64), tables.astype(np.float64))
        values = kappas(drawn)
        values = values[np.isfinite(values)]
        if len(values):
            low, high = (float(v) for v in np.quantile(values, [0.025, 0.975]))
    accuracy = float(np.trace(counts) / n) if n else math.nan
    return Agreement(n, accuracy, kappa(first, second), low, high, confusion(first, second))


def _tables(
    first: Sequence[Hashable], second: Sequence[Hashable], groups: Sequence[Hashable] | None
) -> tuple[NDArray[np.int64], list[str]]:
    """([groups, labels, labels] counts, the labels' names). Raises ValueError when the lengths differ."""
    if len(first) != len(second) or (groups is not None and len(groups) != len(first)):
        raise ValueError("the labels and groups must be of one length")
    names = sorted({str(label) for label in (*first, *second)})
    place = {name: i for i, name in enumerate(names)}
    rows = range(len(first)) if groups is None else groups
    member = {group: i for i, group in enumerate(dict.fromkeys(rows))}
    tables = np.zeros((len(member), len(names), len(names)), np.int64)
    for a, b, group in zip(first, second, rows, strict=True):
        tables[member[group], place[str(a)], place[str(b)]] += 1
    return tables, names


def kappas(tables: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Kappa of each of `[tables, labels, labels]` counts."""
    total = tables.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        seen = np.trace(tables, axis1=1, axis2=2) / total
        chance = (tables.sum(2) * tables.sum(1)).sum(1) / total**2
        return np.where(chance < 1, (seen - chance) / (1 - chance), np.nan)
