"""ROUGE-L against counts made by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from postalign.evaluation.similarity import rouge_l


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin 2004, section 3.1: S2 against S1
        ("the gunman kill police", "police kill the gunman", 2 / 4),  # S3
        ("the gunman police killed", "police kill the gunman", 2 / 4),  # S4
        ("The Gunman!", "the gunman", 1.0),
        ("a b c d", "x b y d", 1 / 2),
        ("a b c d e f", "b d", 2 / (6 / 2 + 2 / 2)),  # precision 1/3, recall 1
        ("a", "b", 0.0),
        ("", "b", 0.0),
        ("...", "", 1.0),
        ("Straße", "STRASSE", 1.0),
    ],
)
def test_by_hand(reply: str, reference: str, expected: float) -> None:
    assert rouge_l(reply, reference) == pytest.approx(expected)


def test_recall_alone() -> None:
    assert rouge_l("a b c d e f", "b d", alpha=0) == pytest.approx(1.0)


def test_against_all_subsequences() -> None:
    rng = random.Random(0)
    for _ in range(30):
        ours, theirs = ([rng.choice("abc") for _ in range(rng.randint(1, 7))] for _ in range(2))
        subsequences = {chosen for n in range(len(ours) + 1) for chosen in itertools.combinations(ours, n)} & {
            chosen for n in range(len(theirs) + 1) for chosen in itertools.combinations(theirs, n)
        }
        common = max(map(len, subsequences))
        assert rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(2 * common / (len(ours) + len(theirs)))
