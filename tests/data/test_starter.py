"""The starter set keeps its promises: classes, categories, splits, and nothing alike across splits."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from itertools import combinations
from pathlib import Path

import pytest

from postalign.data import Data, load_data
from postalign.data.duplicates import grams, jaccard, words

HARMFUL = {
    "illegal_activity",
    "physical_harm",
    "economic_harm",
    "political_campaigning",
    "privacy_violation",
    "tailored_financial_advice",
    "fraud_deception",
    "hate_harassment_violence",
    "adult_content",
    "malware",
    # and two that other benchmarks have
    "copyright",
    "with_context",
}
PUBLIC = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def starter() -> Data:
    return load_data("starter")


def part(data: Data, name: str) -> Data:
    return data.filter(lambda row: row.type == name)


def test_harmful_rows_cover_all_categories_with_a_refusal_each(starter: Data) -> None:
    rows = part(starter, "harmful")
    counts = Counter(row.category for row in rows)
    assert set(counts) == HARMFUL
    assert min(counts.values()) >= 20
    assert {row.label for row in rows} == {"harmful"}
    assert all(row.response for row in rows)


def test_benign_rows_are_many_enough_and_the_plain_ones_have_answers(starter: Data) -> None:
    borderline, plain = part(starter, "borderline"), part(starter, "plain")
    assert len(borderline) >= 200
    answered = plain.filter(lambda row: bool(row.response))
    assert len(answered) >= 200
    assert {row.label for row in borderline + plain} == {"benign"}
    assert {row.category for row in plain} - {row.category for row in answered} == {"instructions"}
    assert all(row.response for row in plain if row.category != "instructions")
    assert len(starter.harmful) + len(starter.benign) == len(starter)


def test_every_category_is_in_every_split_about_half_and_two_quarters(starter: Data) -> None:
    counts = Counter((row.type, row.category, row.split) for row in starter)
    for kind, category in {(row.type, row.category) for row in starter}:
        fit, tune, test = (counts[kind, category, split] for split in ("fit", "tune", "test"))
        assert fit + tune + test == sum(n for (k, c, _), n in counts.items() if (k, c) == (kind, category))
        assert abs(fit - tune - test) <= 2
        assert abs(tune - test) <= 2


def test_its_card_counts_right(starter: Data) -> None:
    card = (resources.files("postalign.data") / "starter" / "README.md").read_text(encoding="utf-8")
    table = [[cell.strip(" `*") for cell in line.split("|")[1:-1]] for line in card.splitlines() if line[:1] == "|"]
    told = {cells[0]: [int(cell) for cell in cells if cell.isdigit()] for cells in table}
    counts = Counter((row.type, row.category, row.split) for row in starter)
    for kind, category in {(row.type, row.category) for row in starter}:
        assert told[category or ""] == [counts[kind, category, split] for split in ("fit", "tune", "test")]
    for kind in ("harmful", "borderline", "plain"):
        assert told[f"{kind}.jsonl"] == [len(part(starter, kind))]


def test_refusals_vary(starter: Data) -> None:
    responses = [row.response or "" for row in part(starter, "harmful")]
    assert len(set(responses)) == len(responses)
    openings = Counter(" ".join(text.split()[:3]) for text in responses)
    assert len(openings) > 60
    assert max(openings.values()) < len(responses) / 5


def test_ids_are_unique_and_prompts_are_too(starter: Data) -> None:
    assert len({row.id for row in starter}) == len(starter)
    assert len({row.prompt.lower() for row in starter}) == len(starter)


def test_no_two_rows_of_different_splits_are_alike(starter: Data) -> None:
    rows = [(row, words(row.prompt), grams(row.prompt)) for row in starter]
    close = [
        (a.prompt, b.prompt)
        for (a, a_words, a_grams), (b, b_words, b_grams) in combinations(rows, 2)
        if a.split != b.split and (jaccard(a_words, b_words) > 0.5 or jaccard(a_grams, b_grams) > 0.5)
    ]
    assert not close


def test_no_row_is_taken_from_a_public_set(starter: Data) -> None:
    if not PUBLIC.is_dir():
        pytest.skip("the public sets are not here")
    public: set[frozenset[str]] = set()
    for path in PUBLIC.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            public |= {words(row[key]) for key in ("prompt", "second_turn", "behavior") if row.get(key)}
    sized: dict[int, list[frozenset[str]]] = {}
    for other in public:
        sized.setdefault(len(other), []).append(other)
    taken = []
    for row in starter:
        mine = words(row.prompt)
        sizes = range(int(len(mine) * 0.6), int(len(mine) / 0.6) + 1)  # other sizes cannot be that much alike
        near = (other for size in sizes for other in sized.get(size, ()))
        taken += [row.prompt for other in near if jaccard(mine, other) >= 0.6]
    assert not taken


def test_splits_can_be_asked_for(starter: Data) -> None:
    assert load_data("starter", split="tune").rows == starter.split("tune").rows
    assert starter.name == "starter"
