"""How near a reply is to a reference answer, word by word. Knows two texts only."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")


def rouge_l(reply: str, reference: str, *, alpha: float = 0.5) -> float:
    """ROUGE-L (Lin 2004, eq. 2-4) in [0, 1]: the longest common subsequence of words, as F of precision and recall.

    Words are runs of letters and digits, case and compatibility forms (ligatures, wide letters) put aside. alpha: the
    weight of precision in the harmonic mean; 0 is recall alone. Two texts without words are equal (1), one is not (0).
    """
    ours, theirs = (_WORD.findall(unicodedata.normalize("NFKC", text).casefold()) for text in (reply, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    common = _longest_common_subsequence(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 1 / (alpha / precision + (1 - alpha) / recall)


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for i, other in enumerate(second, start=1):
            above = lengths[i]
            lengths[i] = diagonal + 1 if word == other else max(above, lengths[i - 1])
            diagonal = above
    return lengths[-1]
