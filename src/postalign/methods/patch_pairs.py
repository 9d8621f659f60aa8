"""The pairs that patches are trained and scored on: the data's own, or the model's own words.

What is made here lives in memory only: harmful answers are never written down. Knows data and replies; knows no patch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..data.records import Data, Prompt
from ..models.chat import end_of_turn, token_ids
from .greedy import greedy, whole_sentences
from .guide import own_openings

Pair = tuple[str, str]
Progress = Callable[[str, int, int], None]
Judge = Callable[[str, str], str]
BATCH = 32


def harmful_pairs(
    model: nn.Module,
    tokenizer: Any,
    rows: Data,
    count: int,
    new_tokens: int,
    seed: int,
    on_progress: Progress,
    judge: Judge | None = None,
) -> list[Pair]:
    """D_h: (harmful prompt, unwanted answer), `count` at most: rows with `unsafe_response`, else made by the model.

    Without the end of turn: ascent on it would teach not to end.
    """
    given = [(row.prompt, row.unsafe_response) for row in rows.harmful if row.unsafe_response]
    if given:
        return _some(given, count, seed)
    told = "answers to harmful prompts"
    prompts = _some([row.prompt for row in rows.harmful], len(rows.harmful), seed)
    return _made(model, tokenizer, rows, prompts, count, new_tokens, seed, told, on_progress, judge)


def refusal_pairs(tokenizer: Any, rows: Data, count: int, seed: int) -> list[Pair]:
    """(harmful prompt, the refusal wanted), with the end of turn; of rows with a response, `count` at most."""
    end = end_of_turn(tokenizer) or ""
    return _some([(row.prompt, row.response + end) for row in rows.harmful if row.response], count, seed)


def benign_pairs(
    model: nn.Module,
    tokenizer: Any,
    rows: Data,
    count: int,
    new_tokens: int,
    seed: int,
    on_progress: Progress,
    judge: Judge | None = None,
) -> list[Pair]:
    """(harmless prompt, helpful answer), `count` at most: the row's response, else the model's own when it may not
    begin as refusals do."""
    order: list[Prompt] = _some(list(rows.benign), len(rows.benign), seed)
    end = end_of_turn(tokenizer) or ""
    given = [(row.prompt, row.response + end) for row in order[:count] if row.response]
    bare = [row.prompt for row in order if not row.response]
    wanted, told = min(count, len(order)) - len(given), "answers to harmless prompts"
    made = _made(model, tokenizer, rows, bare, wanted, new_tokens, seed, told, on_progress, judge)
    return given + [(prompt, answer + end) for prompt, answer in made]


def _made(
    model: nn.Module,
    tokenizer: Any,
    rows: Data,
    prompts: Sequence[str],
    count: int,
    new_tokens: int,
    seed: int,
    told: str,
    on_progress: Progress,
    judge: Judge | None,
) -> list[Pair]:
    """Answers of the model's own that begin with none of the rows' refusals, for the first `count` of `prompts` for
    which it has one that the judge calls compliance: what loops would teach loops, whatever it is about.

    An answer cut off by `new_tokens` ends with its last whole sentence.
    """
    refusals = [row.response for row in rows.harmful if row.response]
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for begin in range(0, len(prompts), BATCH):
        if len(pairs) >= count:
            break
        chosen = prompts[begin : begin + BATCH]
        openings = own_openings(model, tokenizer, chosen, refusals, [rng.random() for _ in chosen])
        texts = greedy(model, tokenizer, chosen, new_tokens, openings)
        for prompt, opening, text in zip(chosen, openings, texts, strict=True):
            answer = opening + text
            if len(token_ids(tokenizer, text, beginning=False)) >= new_tokens:
                answer = whole_sentences(answer) or answer
            if answer.strip() and (judge is None or judge(prompt, answer) == "compliance"):
                pairs.append((prompt, answer))
        on_progress(told, min(len(pairs), count), count)
    return pairs[:count]


def first_tokens(tokenizer: Any, pairs: Sequence[Pair], count: int | None) -> list[Pair]:
    """The pairs with no more than the first `count` tokens of each answer: whether one complies shows there."""
    if count is None:
        return list(pairs)
    cut = []
    for prompt, answer in pairs:
        ids = token_ids(tokenizer, answer, beginning=False)
        cut.append((prompt, answer if len(ids) <= count else tokenizer.decode(ids[:count])))
    return cut


def _some(rows: list[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).sample(rows, min(count, len(rows)))
