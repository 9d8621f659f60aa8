"""In-context prompts: demonstrations of safe answers, and the same with the safe behaviour taken out.

Knows demonstrations, what their answers begin with, and the chat template; knows no head and no edit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.records import Prompt
from ..errors import UsageError
from ..models.chat import Batch, check_length, encode


def in_context_prompts(
    tokenizer: Any,
    demos: Sequence[Prompt],
    queries: Sequence[Prompt],
    count: int,
    shots: int,
    seed: int,
    corruption: Literal["compliant", "mixed"] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Chats of `shots` demonstrations (question, answer) and a last question: (ids `[length]`, target token ids).

    The answers are the demonstrations' refusals, each cut to its first sentence; under `corruption` all of them, or
    every second one, are compliant openings instead: permuting refusals among each other would remove nothing. The
    targets are the first tokens of refusals that no compliant opening begins with. Raises UsageError for too few
    demonstrations and when no such token is left.
    """
    demos = list({row.prompt: row for row in demos}.values())
    if len(demos) <= shots:  # one may be the question itself
        cure = f"add pairs or set shots={len(demos) - 1}" if len(demos) > 1 else "add pairs"
        raise UsageError(
            f"{shots} shots need {shots + 1} different harmful prompts with refusals in the fit split, which has "
            f"{len(demos)}: {cure}."
        )
    rng = random.Random(seed)
    refusing = _first_tokens(tokenizer, [_first_sentence(row.response or "") for row in demos])
    complying = _first_tokens(tokenizer, COMPLIANT_OPENINGS)
    target = torch.tensor(sorted(refusing - complying))
    if not len(target):
        raise UsageError(
            'every refusal begins like a compliant answer: give refusals such as "I can\'t help with that."'
        )
    prompts = []
    for _ in range(count):
        query = rng.choice(queries)
        chosen = rng.sample([row for row in demos if row.prompt != query.prompt], shots)
        turns: list[dict[str, str]] = []
        for i, row in enumerate(chosen):
            comply = corruption == "compliant" or (corruption == "mixed" and i % 2 == 0)
            answer = rng.choice(COMPLIANT_OPENINGS) if comply else _first_sentence(row.response or "")
            turns += [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": answer}]
        turns.append({"role": "user", "content": query.prompt})
        prompts.append((encode(tokenizer, [turns]).input_ids[0], target))
    return prompts


def check_context(model: nn.Module, prompts: Sequence[tuple[Tensor, Tensor]], shots: int) -> None:
    """Raise UsageError when one of `in_context_prompts` is longer than the model's context."""
    longest = max((ids for ids, _ in prompts), key=len).reshape(1, -1)
    try:
        check_length(model, Batch(longest, torch.ones_like(longest), [longest.shape[1]]), 0)
    except UsageError as error:
        raise UsageError(
            f"{shots} demonstrations make a prompt of {longest.shape[1]} tokens, more than the model's context holds: "
            f"set shots below {shots}, or give shorter prompts."
        ) from error


def _first_tokens(tokenizer: Any, answers: Sequence[str]) -> set[int]:
    """Ids of the first token of each answer, as it stands after the template's start of an answer."""
    found = set()
    for answer in dict.fromkeys(" ".join(a.split()[:2]) for a in answers):
        batch = encode(tokenizer, ["x"], answers=[answer])
        found.add(int(batch.input_ids[0, batch.prompt_lengths[0]]))
    return found


def _first_sentence(text: str) -> str:
    for i, c in enumerate(text):
        if c in ".!?" and (i + 1 == len(text) or text[i + 1] == " "):
            return text[: i + 1]
    return text


COMPLIANT_OPENINGS = (
    "Sure, here is how to do that.",
    "Of course! Here is a step-by-step guide.",
    "Absolutely, here is what you asked for.",
    "Certainly. Here is everything you need.",
    "Yes, here is a simple way to do it.",
    "Here is a detailed answer to your question.",
    "To do this, follow these steps.",
    "Great question! Here is the full answer.",
)
