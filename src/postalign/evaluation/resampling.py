"""Intervals and tests by resampling, for differences between paired numbers and for agreement. Seeded, so that the
same numbers give the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .statistics import wilson

Estimate = tuple[float, float, float]
ROUNDS = 5_000
_SEED = 20_240
_FEW = 64  # distinct values up to which resampling draws counts of values, which is the same and much quicker
_EXACT = 16  # changed pairs up to which all changes of sign are gone through
_CELLS = 4_000_000  # numbers in memory at a time


def paired_bootstrap(
    differences: Sequence[float], weights: Sequence[float] | None = None, *, rounds: int = ROUNDS
) -> Estimate:
    """(mean, low, high) of paired differences: a 95 % percentile bootstrap over the pairs (Efron 1979).

    weights: sum(differences) / sum(weights) instead of the mean, each pair with its weight. Where all pairs are alike,
    resampling sees no spread at all; differences of shares (values -1, 0, 1) then get the reach of Wilson's
    interval for none of n.
    """
    d = np.asarray(differences, dtype=float)
    w = np.ones_like(d) if weights is None else np.asarray(weights, dtype=float)
    if not len(d) or w.sum() == 0:
        raise ValueError("no pairs to compare")
    mean = float(d.sum() / w.sum())
    pairs, counts = np.unique(np.stack([d, w], 1), axis=0, return_counts=True)
    if len(pairs) == 1:
        reach = wilson(0, len(d))[1] if weights is None and mean in (-1.0, 0.0, 1.0) else 0.0
        return mean, max(-1.0, mean - reach) if reach else mean, min(1.0, mean + reach) if reach else mean
    if len(pairs) <= _FEW:
        drawn = np.random.default_rng(_SEED).multinomial(len(d), counts / len(d), size=rounds)
        means = drawn @ pairs[:, 0] / (drawn @ pairs[:, 1])
    else:
        sums = resampled_sums(np.stack([d, w], 1), rounds=min(rounds, max(1_000, _CELLS // len(d))))
        means = sums[:, 0] / sums[:, 1]
    low, high = np.quantile(means, [0.025, 0.975])
    return mean, float(low), float(high)


def sign_flip(differences: Sequence[float], *, rounds: int = 10_000) -> float:
    """Two-sided p of Fisher's randomisation test of pairs (Fisher 1935, 21): how often a sum as far from 0 comes about
    when each difference has its sign by chance.

    Exact up to 16 pairs that differ, else by `rounds` draws, the observed one counted with them, so that p is never 0.
    """
    d = np.asarray([value for value in differences if value], dtype=float)
    if not len(d):
        return 1.0
    observed = abs(d.sum()) * (1 - 1e-12)  # sums of the same numbers in another order
    if len(d) <= _EXACT:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float((abs(sums) >= observed).mean())
    random = np.random.default_rng(_SEED)
    step, hits, total = max(1, _CELLS // len(d)), 1, d.sum()
    for begin in range(0, rounds, step):
        signs = random.integers(0, 2, size=(min(step, rounds - begin), len(d)), dtype=np.int8)
        hits += int((abs(2 * (signs.astype(float) @ d) - total) >= observed).sum())
    return hits / (rounds + 1)


def resampled_sums(values: np.ndarray, *, rounds: int = 1_000) -> np.ndarray:
    """Column sums `[rounds, columns]` of `values` `[n, columns]`, with its rows drawn anew, n of them, each time."""
    random, n = np.random.default_rng(_SEED), len(values)
    step, parts = max(1, _CELLS // values.size), []
    for begin in range(0, rounds, step):
        parts.append(values[random.integers(0, n, size=(min(step, rounds - begin), n))].sum(1))
    return np.concatenate(parts)


def table_bootstrap(
    table: Sequence[Sequence[int]], figure: Callable[[np.ndarray], np.ndarray], *, rounds: int = 2_000
) -> Estimate:
    """(value, low, high) of a figure of a square table of counts, a 95 % percentile bootstrap over what was counted.

    figure: tables `[rounds, k, k]` to numbers `[rounds]`; draws in which it is not a number are left out.
    """
    counts = np.asarray(table, dtype=float)
    n = int(counts.sum())
    value = float(figure(counts[None])[0])
    if n == 0 or not np.isfinite(value):
        return value, value, value
    random = np.random.default_rng(_SEED)
    drawn = random.multinomial(n, counts.ravel() / n, size=rounds).reshape(rounds, *counts.shape)
    found = figure(drawn.astype(float))
    low, high = np.quantile(found[np.isfinite(found)], [0.025, 0.975])
    return value, float(low), float(high)
