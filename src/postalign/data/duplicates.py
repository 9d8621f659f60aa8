"""How alike two short texts are, and which of many say nearly the same. Knows texts only.

Two views: shared words (another order, another ending) and shared runs of four characters (another spelling). Either
being high is enough. Jaccard's index (1901): the size of what two sets share over the size of both together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

ALIKE = 0.6
"""From here on two prompts count as the same question; the starter set keeps its splits apart by 0.5."""


def words(text: str) -> frozenset[str]:
    """The words of a text (letters of any script, digits, apostrophes), in small letters."""
    return frozenset(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.casefold()))


def grams(text: str, n: int = 4) -> frozenset[str]:
    """All runs of `n` characters of a text, once punctuation and spacing are made equal."""
    plain = " ".join(re.findall(r"[^\W_]+", text.casefold()))
    return frozenset(plain[i : i + n] for i in range(max(1, len(plain) - n + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared over all, in [0, 1]; two empty sets are the same (1)."""
    common = len(a & b)
    total = len(a) + len(b) - common
    return common / total if total else 1.0


def similarity(a: str, b: str) -> float:
    """The higher of the two views, in [0, 1]."""
    return max(jaccard(words(a), words(b)), jaccard(grams(a), grams(b)))


class Known:
    """Texts met so far, asked for the nearest to a new one.

    Only texts that share a word or a run of characters are compared: others cannot be alike.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts: list[str] = []
        self._sets: list[tuple[frozenset[str], frozenset[str]]] = []
        self._holders: dict[str, set[int]] = defaultdict(set)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        both = words(text), grams(text)
        for part in both[0] | both[1]:
            self._holders[part].add(len(self.texts))
        self.texts.append(text)
        self._sets.append(both)

    def nearest(self, text: str) -> tuple[float, str | None]:
        """(similarity, text) of the one most alike, the first of equals; (0.0, None) where none shares anything."""
        both = words(text), grams(text)
        candidates: set[int] = set().union(*(self._holders.get(part, set()) for part in both[0] | both[1]))
        best, found = 0.0, None
        for i in sorted(candidates):
            value = max(jaccard(mine, theirs) for mine, theirs in zip(both, self._sets[i], strict=True))
            if value > best:
                best, found = value, self.texts[i]
        return best, found


def without_duplicates(texts: Iterable[str], limit: float = ALIKE) -> list[str]:
    """The texts in their order, each left out that is at least `limit` alike one kept before it."""
    known = Known()
    for text in texts:
        if known.nearest(text)[0] < limit:
            known.add(text)
    return known.texts
