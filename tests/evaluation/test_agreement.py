"""Cohen's kappa against values of scikit-learn 1.9's cohen_kappa_score, and the bootstrap around it."""

from __future__ import annotations

import math

import pytest

from postalign.evaluation.agreement import agreement, confusion, kappa

# (first, second, what sklearn.metrics.cohen_kappa_score gives)
KNOWN = [
    ([2, 0, 2, 2, 0, 1], [0, 0, 2, 2, 0, 2], 0.42857142857142855),
    (list("npnup"), list("npnun"), 0.6875),
    ([1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15, 0.4),
    ([0, 1] * 10, [1, 0] * 10, -1.0),
    (list("aabbcc"), list("aabbcc"), 1.0),
    ([1, 1, 1, 0], [1, 1, 1, 1], 0.0),
]


@pytest.mark.parametrize(("first", "second", "expected"), KNOWN)
def test_kappa_is_scikit_learn_s(first: list, second: list, expected: float) -> None:
    assert kappa(first, second) == pytest.approx(expected, abs=1e-12)
    assert kappa(second, first) == pytest.approx(expected, abs=1e-12)


def test_kappa_that_cannot_be_told_is_nan() -> None:
    assert math.isnan(kappa([], []))
    assert math.isnan(kappa(["refusal"] * 3, ["refusal"] * 3))
    with pytest.raises(ValueError, match="one length"):
        kappa([1], [1, 0])


def test_confusion_counts_first_by_second() -> None:
    table = confusion(["refusal", "refusal", "compliance"], ["refusal", "partial", "compliance"])
    assert table == {
        "compliance": {"compliance": 1, "partial": 0, "refusal": 0},
        "partial": {"compliance": 0, "partial": 0, "refusal": 0},
        "refusal": {"compliance": 0, "partial": 1, "refusal": 1},
    }


def test_interval_holds_kappa_and_shrinks_with_rows() -> None:
    first, second, expected = KNOWN[2]
    few, many = agreement(first, second), agreement(first * 16, second * 16)
    assert few.low < expected < few.high and many.low < expected < many.high
    assert many.high - many.low == pytest.approx((few.high - few.low) / 4, rel=0.15)  # 16 times the rows
    assert (few.n, few.accuracy, few.kappa) == (50, pytest.approx(0.7), pytest.approx(0.4))
    assert agreement(first, second) == few, "the same seed gives the same interval"
    assert agreement(first, second, seed=1) != few


def test_rows_of_a_group_are_drawn_together() -> None:
    """Sixteen copies of each row under one prompt say no more than the rows themselves."""
    first, second, _ = KNOWN[2]
    alone = agreement(first, second)
    copies = agreement(first * 16, second * 16, groups=list(range(50)) * 16)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.01)


def test_interval_of_full_agreement_is_a_point() -> None:
    found = agreement(list("aabb"), list("aabb"))
    assert (found.low, found.kappa, found.high) == (1, 1, 1)
