"""Resampling against published values, formulas and simulation."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from postalign.evaluation.resampling import paired_bootstrap, sign_flip, table_bootstrap
from postalign.evaluation.statistics import mcnemar, wilson

# Darwin's maize: height of crossed less self-fertilised plants, in eighths of an inch (Fisher 1935, table 3)
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_sign_flip_is_fishers() -> None:
    """The Design of Experiments, section 21: 1,726 of 32,768 ways, 5.267 per cent."""
    assert sum(MAIZE) == 314
    assert sign_flip(MAIZE) == pytest.approx(1726 / 32768)
    assert sign_flip([-d for d in MAIZE]) == sign_flip(MAIZE)


def test_sign_flip_of_shares_is_mcnemar() -> None:
    assert sign_flip([1] * 9 + [-1] * 2 + [0] * 30) == pytest.approx(mcnemar(9, 2))
    assert sign_flip([0, 0]) == 1.0
    many = [1] * 60 + [-1] * 35
    assert sign_flip(many, rounds=40_000) == pytest.approx(mcnemar(60, 35), abs=2e-3)
    assert 0 < sign_flip([1.0] * 400, rounds=1000) <= 1 / 1000


def test_bootstrap_of_a_mean_is_near_the_formula_and_the_same_each_time() -> None:
    chance = random.Random(3)
    d = [chance.gauss(0.4, 1.0) for _ in range(400)]
    mean, low, high = paired_bootstrap(d)
    half = 1.96 * statistics.stdev(d) / math.sqrt(len(d))
    assert mean == pytest.approx(statistics.mean(d))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.012)
    assert paired_bootstrap(d) == (mean, low, high)
    few = [0.0, 1.0, -1.0, 1.0] * 100  # counts of values are drawn: the other way through
    spread = 1.96 * statistics.pstdev(few) / math.sqrt(len(few))
    assert paired_bootstrap(few) == pytest.approx((0.25, 0.25 - spread, 0.25 + spread), abs=0.012)


def test_bootstrap_covers_the_truth() -> None:
    draws = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        d = draws.choice([-1, 0, 1], size=80, p=[0.05, 0.7, 0.25])
        _, low, high = paired_bootstrap(d.tolist(), rounds=1000)
        hits += low <= 0.2 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_bootstrap_with_weights_is_a_ratio_of_sums() -> None:
    mean, low, high = paired_bootstrap([10.0, -2.0, 4.0] * 30, [5, 1, 2] * 30)
    assert mean == pytest.approx(12 / 8)
    assert low < mean < high
    same = paired_bootstrap([2.0, 4.0, 6.0], [1, 2, 3])  # every pair has the ratio 2
    assert same == pytest.approx((2.0, 2.0, 2.0))


def test_pairs_that_are_all_alike_still_have_a_reach() -> None:
    reach = wilson(0, 40)[1]
    assert paired_bootstrap([0] * 40) == pytest.approx((0.0, -reach, reach))
    assert paired_bootstrap([-1] * 40) == pytest.approx((-1.0, -1.0, -1.0 + reach))
    assert paired_bootstrap([0.3] * 40) == (pytest.approx(0.3),) * 3
    with pytest.raises(ValueError, match="no pairs"):
        paired_bootstrap([])


def test_table_bootstrap_of_a_share_is_near_wilson() -> None:
    value, low, high = table_bootstrap([[60, 10], [10, 20]], lambda t: (t[:, 0, 0] + t[:, 1, 1]) / t.sum((1, 2)))
    assert value == pytest.approx(0.8)
    assert (low, high) == pytest.approx(wilson(80, 100), abs=0.02)
    empty = table_bootstrap([[0, 0], [0, 0]], lambda t: np.full(len(t), np.nan))
    assert math.isnan(empty[0])
