"""What the embedded judge sees of a prompt and a reply: hashed n-grams and a few plain measures.

Knows text and numpy only: no weights and no labels. Training (`scripts/train_embedded_judge.py`) and judging use this
one file, so that they see the same numbers; a change here needs new weights (`FEATURES` names the version).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

FEATURES = 1
WORD_BITS, LETTER_BITS, OPENING_BITS, PROMPT_BITS = 16, 16, 14, 14
BLOCKS: tuple[tuple[str, int], ...] = (
    ("words", 1 << WORD_BITS),  # runs of one to three words of the reply
    ("letters", 1 << LETTER_BITS),  # runs of three to five bytes of the reply
    ("opening", 1 << OPENING_BITS),  # runs of one to three words among its first dozen
    ("prompt", 1 << PROMPT_BITS),  # runs of one or two words of the prompt
)
OFFSETS = tuple(int(n) for n in np.cumsum([0, *(size for _, size in BLOCKS)]))
SIZE = OFFSETS[-1]
MEASURES = 20

OPENING_WORDS = 12
HEAD, TAIL = 2400, 600  # so many characters of a long reply are read, from its two ends
_PLAIN = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "–": "-", "—": "-"})
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[^\w\s]")
_ECHO = re.compile(r"\A\s*[A-Z][\w ]{0,20}:[^\n]*\n+\s*[A-Z][\w ]{0,20}:\s*")  # "User: ...\nBot: " before the reply
_NUMBERED = re.compile(r"^\s*(?:\d{1,2}[.):]|step \d)", re.MULTILINE)
_BULLET = re.compile(r"^\s*[-*•]\s", re.MULTILINE)
_YES = frozenset("sure yes certainly absolutely here title dear subject".split())
_NOT = frozenset("not no cannot can't never don't won't isn't aren't doesn't unable cant nor without".split())
_MORAL = frozenset(
    "important should always legal ethical unethical illegal respect respectful privacy harmful inappropriate "
    "appropriate responsible consult professional seek safe safety recommend recommended essential".split()
)
_ME, _YOU = frozenset("i i'm my me i'd".split()), frozenset("you your you're".split())
_TURN = frozenset("however but although instead rather nevertheless".split())

Sparse = tuple[NDArray[np.int64], NDArray[np.float32]]


def features(prompt: str, response: str) -> tuple[Sparse, NDArray[np.float32]]:
    """((indices, values), measures) of one reply. indices: ascending, below `SIZE`; values: 1 + ln(count), each block
    scaled to length 1. measures: `[MEASURES]`, within 0-1 (the length a little above for very long replies).
    """
    text = clean(response)
    words, asked = tokens(text), tokens(clean(prompt))
    blocks = (
        _hashed(_runs(words, 3), WORD_BITS),
        _letters(" ".join(words)),
        _hashed(_runs(words[:OPENING_WORDS], 3), OPENING_BITS),
        _hashed(_runs(asked, 2), PROMPT_BITS),
    )
    indices, values = [], []
    for offset, found in zip(OFFSETS, blocks, strict=False):
        places, counts = np.unique(found, return_counts=True)
        weights = (1 + np.log(counts)).astype(np.float32)
        length = float(np.sqrt(weights @ weights))
        indices.append(places + offset)
        values.append(weights / length if length else weights)
    return (np.concatenate(indices), np.concatenate(values)), _measures(text, words, asked)


def clean(text: str) -> str:
    """Plain quotes; an echoed question before the reply taken away; the middle of a long text left out."""
    text = _ECHO.sub("", text.translate(_PLAIN)).strip()
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]}\n{text[-TAIL:]}"


def tokens(text: str) -> list[str]:
    """Words in lower case and single signs; numbers become `0`."""
    return ["0" if t[0].isdigit() else t for t in _TOKEN.findall(text.lower())]


def _runs(words: list[str], longest: int) -> Iterable[str]:
    yield from words
    for n in range(2, longest + 1):
        yield from map(" ".join, zip(*(words[i:] for i in range(n)), strict=False))


def _hashed(runs: Iterable[str], bits: int) -> NDArray[np.int64]:
    return np.fromiter(map(crc32, map(str.encode, runs)), np.int64) & ((1 << bits) - 1)


def _letters(text: str) -> NDArray[np.int64]:
    """Runs of three to five bytes, hashed by multiplication (Knuth 6.4); wrapping around is meant."""
    raw = np.frombuffer(f" {text} ".encode(), np.uint8).astype(np.uint64)
    found, state = [], raw[:0]
    for n in range(1, 6):
        shifted = raw[n - 1 :]
        state = shifted if n == 1 else (state[: len(shifted)] * np.uint64(257) + shifted)
        if n >= 3:
            spread = state * np.uint64(11400714819323198485)
            found.append((spread >> np.uint64(64 - LETTER_BITS)).astype(np.int64))
    return np.concatenate(found)


def _measures(text: str, words: list[str], asked: list[str]) -> NDArray[np.float32]:
    """Length, layout, tone, and how much of the prompt comes back in the reply."""
    n = max(1, len(words))
    said, opening = set(words), set(words[:25])
    topic = {w for w in asked if len(w) > 3}
    lines = text.count("\n")
    digits = sum(map(str.isdigit, text))
    return np.array(
        [
            np.log1p(len(words)) / 6,
            len(words) < 40,
            len(words) > 150,
            len(topic & said) / max(1, len(topic)),
            len(topic & opening) / max(1, len(topic)),
            bool(_NUMBERED.search(text)),
            bool(_BULLET.search(text)),
            min(1.0, lines / 20),
            min(1.0, 10 * digits / max(1, len(text))),
            min(1.0, 5 * _count(_NOT, words) / n),
            min(1.0, 5 * _count(_NOT, words[:25]) / 25),
            min(1.0, 10 * _count(_MORAL, words) / n),
            min(1.0, 20 * _count(_TURN, words) / n),
            any(w in _YES for w in words[:2]),
            words[:1] == ["no"],
            bool(said & {"sorry", "apologize", "apologise", "apologies", "unfortunately"}),
            "?" in said,
            bool(said & {"ai", "assistant", "model"}),
            min(1.0, 10 * _count(_ME, words) / n),
            min(1.0, 10 * _count(_YOU, words) / n),
        ],
        np.float32,
    )


def _count(kind: frozenset[str], words: list[str]) -> int:
    return sum(map(kind.__contains__, words))
