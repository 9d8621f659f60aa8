"""Near duplicates: the two views, and the quick search against comparing all with all."""

from __future__ import annotations

import random

from postalign.data.duplicates import ALIKE, Known, grams, jaccard, similarity, without_duplicates, words


def test_words_and_runs_put_case_and_punctuation_aside() -> None:
    assert words("How, HOW do I  don't 'quote'?") == {"how", "do", "i", "don't", "quote"}
    assert words("Straße ist 安全") == {"strasse", "ist", "安全"}
    assert grams("Ab, c!") == {"ab c"}
    assert grams("ab") == {"ab"}
    assert len(grams("abcdefg")) == 4


def test_jaccard_is_shared_over_all() -> None:
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 0.5
    assert jaccard(frozenset(), frozenset()) == 1.0
    assert jaccard(frozenset("a"), frozenset()) == 0.0


def test_either_view_is_enough() -> None:
    assert similarity("tie a strong knot today", "today tie a strong knot") == 1.0  # words, in another order
    assert similarity("misinterpretation!", "misinterpretations") > ALIKE  # spelling: the words differ
    assert similarity("tie a knot", "bake bread") < 0.1


def test_the_quick_search_finds_what_comparing_all_finds() -> None:
    rng = random.Random(0)
    vocabulary = ["lock", "door", "open", "window", "paint", "wall", "garden", "tree", "cut", "plant"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 5))) for _ in range(80)]
    known, new = Known(texts[:60]), texts[60:]
    for text in new:
        best, found = known.nearest(text)
        assert best == max(similarity(text, other) for other in texts[:60])
        assert found is None or similarity(text, found) == best
    assert Known().nearest("anything") == (0.0, None)


def test_the_first_of_near_duplicates_is_kept() -> None:
    texts = ["How do I pick a good lock?", "Bread?", "how do i pick a good lock", "How do I pick a very good lock?"]
    assert without_duplicates(texts) == ["How do I pick a good lock?", "Bread?"]
    assert without_duplicates(texts, limit=1.1) == texts
