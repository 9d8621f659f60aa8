"""Intervals for shares and means, and tests of pairs: plain formulas, no dependencies. Resampling: resampling.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # two-sided 95 %
LEVEL = 0.05  # a comparison whose adjusted p is below it counts as resolved


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927); (0, 1) when nothing was counted. 95 % unless `z`
    says else.

    Stays inside [0, 1] and is honest at 0 of n, where the usual normal interval has width zero. Broken numbers are
    allowed: a mean share over n units that hang together inside counts n, not the parts.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a share")
    if n == 0:
        return 0.0, 1.0
    p, square = successes / n, z * z / n
    centre = (p + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(p * (1 - p) / n + square / (4 * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def mean_per_token(sums: Sequence[float], tokens: Sequence[float], z: float = Z95) -> tuple[float, float, float]:
    """(mean, low, high) of a quantity per token, from its sum and token count in each text.

    Texts are the units that vary, not tokens, which hang together: the standard error is that of a ratio of
    sums over texts (Cochran 1977, 6.4). With one text no interval can be told: low and high are the mean.
    """
    total, n = sum(tokens), len(tokens)
    if total == 0:
        raise ValueError("no tokens to average over")
    mean = sum(sums) / total
    if n < 2:
        return mean, mean, mean
    squares = sum((s - mean * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    half = z * math.sqrt(squares * n / (n - 1)) / total
    return mean, mean - half, mean + half


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar (1947) for pairs of yes and no.

    only_first, only_second: pairs in which only the one said yes. Under the hypothesis that both say it as often, each
    such pair is a fair coin; pairs that agree say nothing.
    """
    n, smaller = only_first + only_second, min(only_first, only_second)
    if smaller < 0:
        raise ValueError("pairs are counted from 0")
    if only_first == only_second:
        return 1.0
    term = tail = 1
    for k in range(smaller):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)  # of whole numbers, so that thousands of pairs do not underflow


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given: below a level, at most that share of all
    families has a false find.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
