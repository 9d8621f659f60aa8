"""The pairs that patches are trained and scored on: the data's own, or the model's own words.

What is made here lives in memory only: harmful answers are never written down. Knows data and replies; knows no patch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..data.records import Data, Prompt
from ..models.chat import end_of_turn, token_ids
from .greedy import greedy, whole_sentences
from .guide import first_word, first_words, own_openings

Pair = tuple[str, str]
Progress = Callable[[str, int, int], None]
Judge = Callable[[str, str], str]
BATCH = 64
TRIED = 14  # tokens of a reply by which it is seen whether a patch works
AGAIN = 8  # times that a hard pair may come again
RUN, TIMES = 4, 3  # a reply that says so many tokens in a row so often loops
MOST = 4  # times that a pair may stand in a balanced list
OPENING = 2  # words of a refusal that the model goes on from


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
        return some(given, count, seed)
    told = "answers to harmful prompts"
    prompts = some([row.prompt for row in rows.harmful], len(rows.harmful), seed)
    return _made(model, tokenizer, rows, prompts, count, new_tokens, seed, told, on_progress, judge)


def refusal_pairs(
    model: nn.Module,
    tokenizer: Any,
    rows: Data,
    count: int,
    new_tokens: int,
    seed: int,
    on_progress: Progress,
    judge: Judge | None = None,
) -> list[Pair]:
    """(harmful prompt, the refusal wanted), `count` at most, with the end of turn: the row's response, or where it has
    none the model's own words after the first of another row's refusal, where the judge calls that a refusal."""
    end = end_of_turn(tokenizer) or ""
    order: list[Prompt] = some(list(rows.harmful), len(rows.harmful), seed)[:count]
    pairs = [(row.prompt, row.response + end) for row in order if row.response]
    bare = [row.prompt for row in order if not row.response]
    heads = [_opening(row.response) for row in rows.harmful if row.response]
    rng = random.Random(seed)
    openings = rng.choices(heads, k=len(bare)) if heads else []
    told = "refusals of harmful prompts"
    answers = _answers(model, tokenizer, bare if heads else [], openings, new_tokens, told, on_progress)
    for prompt, (answer, ended) in zip(bare, answers, strict=bool(heads)):
        if judge is None or judge(prompt, answer) == "refusal":
            pairs.append((prompt, (answer if ended else whole_sentences(answer) or answer) + end))
    return pairs


def own_refusals(
    model: nn.Module,
    tokenizer: Any,
    rows: Data,
    count: int,
    new_tokens: int,
    seed: int,
    on_progress: Progress,
    judge: Judge | None = None,
    harmless: Sequence[str] = (),
) -> list[Pair]:
    """(harmful prompt, refusal), `count` at most, in the model's own words, all with the opening that tells best that a
    prompt is harmful: its reply where that begins so, else what it says after it, where the judge calls that a refusal.

    What a model says anyway is quickly learned, and carries over to prompts of other kinds; with an opening that it
    uses for harmless prompts too, these would be refused more often. harmless: refusals of such prompts. No end of turn
    follows a refusal that `new_tokens` cuts off. Empty for a model that refuses nothing.
    """
    prompts = [row.prompt for row in some(list(rows.harmful), len(rows.harmful), seed)[:count]]
    refusing = first_words(row.response for row in rows.harmful if row.response)
    end = end_of_turn(tokenizer) or ""

    def refused(chosen: Sequence[str], opening: str, told: str) -> dict[str, str]:
        replies = _answers(model, tokenizer, chosen, [opening] * len(chosen), new_tokens, told, on_progress)
        return {
            prompt: reply + (end if ended else "")
            for prompt, (reply, ended) in zip(chosen, replies, strict=True)
            if (first_word(reply) in refusing if judge is None else judge(prompt, reply) == "refusal")
        }

    unasked = refused(prompts, "", "the model's own refusals")
    if not unasked:
        return []
    opening = telling_opening(list(unasked.values()), harmless)
    found = {prompt: reply for prompt, reply in unasked.items() if _opening(reply) == opening}
    left = [prompt for prompt in prompts if prompt not in found]
    found |= refused(left, opening, "refusals where it refuses otherwise, or not")
    return [(prompt, found[prompt]) for prompt in prompts if prompt in found]


def telling_opening(refusals: Sequence[str], others: Sequence[str]) -> str:
    """The first words whose share of `refusals` is the furthest above their share of `others`."""
    ours, theirs = Counter(map(_opening, refusals)), Counter(map(_opening, others))

    def lead(opening: str) -> float:
        return ours[opening] / len(refusals) - theirs[opening] / max(1, len(others))

    return max(ours, key=lambda opening: (lead(opening), opening))


def _opening(text: str) -> str:
    return " ".join(text.split()[:OPENING])


def benign_pairs(
    model: nn.Module,
    tokenizer: Any,
    rows: Data,
    count: int,
    new_tokens: int,
    seed: int,
    on_progress: Progress,
    judge: Judge | None = None,
) -> tuple[list[Pair], list[Pair], list[str]]:
    """Of up to `count` harmless prompts (those that the model refuses, each with an answer, and those where it loops,
    each with what it says when it may not; those that it answers, each with what it says; the refusals).

    The answer is the row's response, else the model's own when it may not begin as refusals do. Without a judge a reply
    refuses that begins with the first word of one of the rows' refusals.
    """
    order: list[Prompt] = some(list(rows.benign), len(rows.benign), seed)[:count]
    end, refusing = end_of_turn(tokenizer) or "", first_words(row.response for row in rows.harmful if row.response)
    kept: list[Pair] = []
    refused: list[Prompt] = []
    refusals: list[str] = []
    looping: list[str] = []
    told = "replies to harmless prompts"
    prompts = [row.prompt for row in order]
    replies = _answers(model, tokenizer, prompts, [""] * len(order), new_tokens, told, on_progress)
    for row, (reply, ended) in zip(order, replies, strict=True):
        refuses = first_word(reply) in refusing if judge is None else judge(row.prompt, reply) == "refusal"
        if refuses:
            refused.append(row)
            refusals.append(reply)
        elif loops(token_ids(tokenizer, reply, beginning=False)):
            looping.append(row.prompt)
        elif reply.strip() and (judge is None or judge(row.prompt, reply) == "compliance"):
            kept.append((row.prompt, reply + (end if ended else "")))
    given = [(row.prompt, row.response + end) for row in refused if row.response]
    bare = [row.prompt for row in refused if not row.response]
    told = "answers to harmless prompts"
    made = _made(model, tokenizer, rows, bare, len(bare), new_tokens, seed, told, on_progress, judge, end)
    told, openings = "replies without loops", [""] * len(looping)
    replies = _answers(model, tokenizer, looping, openings, new_tokens, told, on_progress, no_repeat=RUN)
    for prompt, (reply, ended) in zip(looping, replies, strict=True):
        if reply.strip() and (judge is None or judge(prompt, reply) == "compliance"):
            made.append((prompt, reply + (end if ended else "")))
    return given + made, kept, refusals


def loops(ids: Sequence[int]) -> bool:
    """Whether RUN tokens in a row come TIMES times."""
    runs = Counter(tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1))
    return max(runs.values(), default=0) >= TIMES


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
    end: str = "",
) -> list[Pair]:
    """Answers of the model's own that begin with none of the rows' refusals, for the first `count` of `prompts` for
    which it has one that the judge calls compliance: what loops would teach loops, whatever it is about.

    An answer that `new_tokens` cuts off ends with its last whole sentence. end: what follows one that is not cut off:
    after the others it would teach to be brief.
    """
    refusals = [row.response for row in rows.harmful if row.response]
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for begin in range(0, len(prompts), BATCH):
        if len(pairs) >= count:
            break
        chosen = prompts[begin : begin + BATCH]
        openings = own_openings(model, tokenizer, chosen, refusals, [rng.random() for _ in chosen])
        answers = _answers(model, tokenizer, chosen, openings, new_tokens, told, lambda *_: None)
        for prompt, (answer, ended) in zip(chosen, answers, strict=True):
            if answer.strip() and (judge is None or judge(prompt, answer) == "compliance"):
                pairs.append((prompt, answer + end if ended else whole_sentences(answer) or answer))
        on_progress(told, min(begin + BATCH, len(prompts)), len(prompts))
    return pairs[:count]


def _answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    openings: Sequence[str],
    new_tokens: int,
    told: str,
    on_progress: Progress,
    no_repeat: int = 0,
) -> list[tuple[str, bool]]:
    """Each opening with the model's own words after it, and whether these came to an end within `new_tokens`.

    Prompts of like length stand in one batch: little is padded.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for begin in range(0, len(order), BATCH):
        chosen = order[begin : begin + BATCH]
        asked, begun = [prompts[i] for i in chosen], [openings[i] for i in chosen]
        said = greedy(model, tokenizer, asked, new_tokens, begun, no_repeat)
        for i, text in zip(chosen, said, strict=True):
            texts[i] = text
        on_progress(told, begin + len(chosen), len(order))
    lengths = [len(token_ids(tokenizer, text, beginning=False)) for text in texts]
    return [(o + text, length < new_tokens) for o, text, length in zip(openings, texts, lengths, strict=True)]


def balanced(pairs: Sequence[Pair], rows: Data) -> list[Pair]:
    """The pairs, with those of a rare category of `rows` several times: as often as brings it to the categories' mean
    size, and four times at most."""
    category = {row.prompt: row.category for row in rows}
    sizes = Counter(category.get(prompt) for prompt, _ in pairs)
    mean = len(pairs) / max(1, len(sizes))
    times = {name: max(1, min(MOST, round(mean / size))) for name, size in sizes.items()}
    return [pair for pair in pairs for _ in range(times[category.get(pair[0])])]


def wrong(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    verdict: str,
    on_progress: Progress,
    judge: Judge,
) -> list[Pair]:
    """The pairs whose prompt the model, with all that is live in it, answers in a way that the judge does not call
    `verdict`."""
    prompts = [prompt for prompt, _ in pairs]
    told = f"trying the patch: {verdict}"
    replies = _answers(model, tokenizer, prompts, [""] * len(pairs), TRIED, told, on_progress)
    return [pair for pair, (reply, _) in zip(pairs, replies, strict=True) if judge(pair[0], reply) != verdict]


def emphasised(pairs: Sequence[Pair], hard: Sequence[Pair]) -> list[Pair]:
    """The pairs, and the hard ones again, so often that they make up half of all; `AGAIN` times at most."""
    return [*pairs, *list(hard) * min(AGAIN, len(pairs) // max(1, len(hard)))]


def first_tokens(tokenizer: Any, text: str, count: int | None) -> str:
    """The text up to its first `count` tokens; None: all of it."""
    ids = token_ids(tokenizer, text, beginning=False)
    return text if count is None or len(ids) <= count else tokenizer.decode(ids[:count])


def some(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` of the rows, or all of fewer, in an order that the seed decides."""
    return random.Random(seed).sample(rows, min(count, len(rows)))
