"""Intervals for shares and for means per token. Plain formulas, no dependencies."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # two-sided 95 %


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927); (0, 1) when nothing was counted. 95 % unless `z`
    says else.

    Stays inside [0, 1] and is honest at 0 of n, where the usual normal interval has width zero.
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


def mean_per_token(sums: Sequence[float], tokens: Sequence[int], z: float = Z95) -> tuple[float, float, float]:
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
