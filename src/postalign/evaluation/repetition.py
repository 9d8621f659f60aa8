"""Text that a model broke: loops, sentences said again and again, word salad.

Knows words and their order only. Lists, code, poems and tables repeat some of their words and are left alone;
the thresholds were set on replies of a 135M model, steered too hard and not at all, and on human-written
answers.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_TOKEN = re.compile(_WORD.pattern + r"|([^\w\s]|_)\1*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_MARKUP = re.compile(r"^[\s>#*\-\d.)(]+|[*_`]+", re.MULTILINE)
_COMMON = frozenset(
    _WORD.findall("""
    the a an and or but of to in on at for with from by as is are was were be been it its this that these
    those you your i we they he she his her their my our me not no do does did can will would should have has
    had if so than then there what which who how when where all any more most some into about up out over
    also may one
    """)
)

# four-word runs that were said before, as a share, together with a low share of different words
REPEATED_SHARE, FEW_WORDS = 0.45, 0.45
# in prose fewer repeats do with fewer different words, or very few different words alone
POOR_SHARE, POOR_WORDS, POOR_FEW = 0.25, 0.42, 0.33
# the reply ends in at least so many turns, and so many tokens, of one phrase
LOOP_TIMES, LOOP_TOKENS = 3, 14
# a run of blank lines is a broken reply where it has fewer words than this, else a matter of form
BLANK_WORDS = 12
# one sentence so often, and so much of the reply
SAME_SENTENCE, SAME_SENTENCE_SHARE = 3, 0.3


def degenerate_reason(text: str) -> str | None:
    """Why `text` is broken, or None. Case, markup and list numbers are not looked at."""
    if re.search(r"\n\s{12,}", text.replace(" ", "")) and len(text.split()) < BLANK_WORDS:
        return "hardly more than blank lines"
    plain = _MARKUP.sub("", text).lower()
    tokens = [m.group() for m in _TOKEN.finditer(plain)]
    return (
        _same_sentence(plain)
        or _loop(tokens)
        or _loop(tokens[:-1])
        or _repeated_share(text, plain)
        or _salad(text, plain)
    )


def _same_sentence(plain: str) -> str | None:
    sentences = [" ".join(_WORD.findall(s)) for s in _SENTENCE_END.split(plain)]
    sentences = [s for s in sentences if s]
    lengths: Counter[str] = Counter()
    for s in sentences:
        lengths[s] += len(s.split())
    total = sum(lengths.values())
    times = Counter(s for s in sentences if len(s.split()) >= 3)
    for sentence, n in times.most_common(3):
        alone = n >= 2 and lengths[sentence] == total
        if alone or (n >= SAME_SENTENCE and lengths[sentence] >= SAME_SENTENCE_SHARE * total):
            return f"one sentence {n} times"
    return None


def _loop(tokens: list[str]) -> str | None:
    """The last tokens are one phrase over and over: greedy decoding's usual end. The cut may fall inside the
    phrase.
    """
    n = len(tokens)
    for period in range(1, n // LOOP_TIMES + 1):
        run = 0
        while run < n - period and tokens[n - 1 - run] == tokens[n - 1 - run - period]:
            run += 1
        length = run + period
        wordy = any(t[0].isalpha() or not t.isascii() for t in tokens[-period:])
        times, tokens_needed = (
            (LOOP_TIMES, LOOP_TOKENS) if wordy else (10, 30)
        )  # numbers and rules of a table may repeat
        if run and length >= max(times * period, tokens_needed):
            return f"ends in a loop of {period} words"
    return None


def _repeated_share(text: str, plain: str) -> str | None:
    words = _WORD.findall(plain)
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if len(runs) < 20 or _mostly_numbers(words):
        return None
    share, different = 1 - len(set(runs)) / len(runs), len(set(words)) / len(words)
    prose = "```" not in text and sum(text.count(c) for c in "|<>{}=;") < 10
    poor = prose and len(words) >= 40 and (different < POOR_FEW or (share >= POOR_SHARE and different < POOR_WORDS))
    if (share >= REPEATED_SHARE and different < FEW_WORDS) or poor:
        return f"{share:.0%} of its phrases are repeated, {different:.0%} of its words are different"
    return None


def _mostly_numbers(words: list[str]) -> bool:
    return sum(w[0].isdigit() for w in words) > 0.4 * len(words)


def _salad(text: str, plain: str) -> str | None:
    if text.count("\ufffd") >= 8:
        return "broken characters"
    words = _WORD.findall(plain)
    if not words:
        return None
    longest = max(words, key=len)
    if len(longest) > 60 and len(set(longest)) < 12:
        return "one endless word"
    doubled = sum(a == b for a, b in pairwise(words))
    if len(words) >= 12 and doubled >= 0.25 * len(words) and not all(w.isdigit() for w in words):
        return "the same words side by side"
    prose = not re.search(r"[\n,;|{}()=<>/]", text.strip()) and text.isascii()
    if prose and len(words) >= 15 and sum(w in _COMMON for w in words) < 0.08 * len(words):
        return "words without grammar"
    return None
