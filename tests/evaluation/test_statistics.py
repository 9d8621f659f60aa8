"""Intervals against published values and against simulation."""

from __future__ import annotations

import random

import pytest

from postalign.evaluation.statistics import holm, mcnemar, mean_per_token, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_is_the_published_one(k: int, n: int, low: float, high: float) -> None:
    """The last case is Newcombe's (1998), method 3."""
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_at_the_ends_and_for_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(7, 7)[1] == 1.0
    assert wilson(0, 7)[0] == 0.0
    with pytest.raises(ValueError, match="not a share"):
        wilson(8, 7)


def test_wilson_covers_the_truth() -> None:
    chance = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high = wilson(sum(chance.random() < 0.1 for _ in range(60)), 60)
        hits += low <= 0.1 <= high
    assert 0.93 <= hits / 2000 <= 0.97


def test_mean_per_token_weighs_by_tokens() -> None:
    mean, low, high = mean_per_token([10.0, 90.0], [10, 30])
    assert mean == 2.5
    assert low < mean < high
    assert mean_per_token([3.0], [2]) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="no tokens"):
        mean_per_token([], [])
    assert mean_per_token([2.0, 4.0], [1, 2])[1:] == (2.0, 2.0)  # no variation, no width


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(10, 0, 0.002), (9, 1, 0.021), (8, 2, 0.109), (0, 6, 0.031), (15, 5, 0.041), (3, 17, 0.003), (4, 4, 1.0)],
)
def test_mcnemar_is_the_sign_test_of_the_tables(b: int, c: int, p: float) -> None:
    """Two-sided tail probabilities of the binomial with p = 1/2, as printed in Siegel (1956), table D, doubled."""
    assert mcnemar(b, c) == pytest.approx(p, abs=6e-4)
    assert mcnemar(c, b) == mcnemar(b, c)


def test_mcnemar_of_thousands_and_of_none() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5000, 5200) == pytest.approx(0.0488, abs=1e-3)  # z = 199 / sqrt(10200), corrected for continuity
    assert 0 <= mcnemar(0, 5000) < 1e-300
    with pytest.raises(ValueError, match="from 0"):
        mcnemar(-1, 2)


def test_holm_is_the_published_one() -> None:
    """The example of the article on Holm's method in Wikipedia; then ties, ceilings and order."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.01, 0.01]) == [0.02, 0.02]
    assert holm([]) == []


def test_wilson_of_broken_numbers_lies_between() -> None:
    assert wilson(2, 10)[0] < wilson(2.5, 10)[0] < wilson(3, 10)[0]
