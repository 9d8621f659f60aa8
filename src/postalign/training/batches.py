"""What one training step sees: rows of token ids with the tokens that carry a loss, and the order of the examples.

Knows tokenizers and seeds; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.chat import Messages, encode, spans

IGNORED = -100
Example = tuple[str | Messages, str]
LossOn = Literal["answer", "question", "all"]


def labelled_batch(
    tokenizer: Any, pairs: Sequence[Example], device: torch.device, loss_on: LossOn = "answer"
) -> dict[str, Tensor]:
    """Left-padded `input_ids`, `attention_mask` and `labels`, int64 `[rows, length]`, of (prompt, answer) pairs.

    loss_on: the tokens whose labels are not IGNORED: the answer's; those of the last user message, without the chat
    template around it (the rows then end where the answer would begin: what follows cannot matter to them); or all
    but the first, which nothing predicts.
    """
    prompts = [prompt for prompt, _ in pairs]
    answers = None if loss_on == "question" else [answer for _, answer in pairs]
    batch = encode(tokenizer, prompts, answers=answers, device=device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
    padding = (labels.shape[1] - batch.attention_mask.sum(-1)).tolist()
    for i, first in enumerate(padding):
        if loss_on == "answer":
            labels[i, : first + batch.prompt_lengths[i]] = IGNORED
        elif loss_on == "question":
            place = spans(tokenizer, prompts[i])
            labels[i, : first + max(1, place.start_of_instruction)] = IGNORED
            labels[i, first + place.end_of_instruction + 1 :] = IGNORED
        else:
            labels[i, : first + 1] = IGNORED
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def answer_batch(tokenizer: Any, pairs: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """Left-padded `input_ids`, `attention_mask` and `labels`: only the answers' tokens carry a loss."""
    return labelled_batch(tokenizer, pairs, device)


def batch_order(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices below `count`: shuffled rounds, each index once in a round, one round after another.

    Depends on its arguments only, so that the n-th batch is the same in every process and after every interruption.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < batch_size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:batch_size]
        order = order[batch_size:]


def share_of(chosen: Sequence[Example], rank: int, world: int, micro_batch: int) -> list[tuple[list[Example], int]]:
    """The small batches of one of `world` processes: (examples, how many of them count, from the front).

    Like lengths stand together: less padding, less memory, the same gradient. Every process gets as many small
    batches as the others, so that they can wait for each other; where examples run short, others stand in that do not
    count.
    """
    chosen = sorted(chosen, key=lambda pair: len(str(pair[0])) + len(pair[1]))
    mine = list(chosen[rank::world])
    real, each = len(mine), -(-len(chosen) // world)
    mine += [chosen[0]] * (each - real)
    return [
        (mine[begin : begin + micro_batch], min(micro_batch, max(0, real - begin)))
        for begin in range(0, each, micro_batch)
    ]
