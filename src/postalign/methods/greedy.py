"""Plain greedy replies while fitting: to make a guide's pairs, and to try a setting. Knows no edit and no judge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..models.chat import encode, eos_ids, pad_id


@torch.no_grad()
def greedy(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    openings: Sequence[str] | None = None,
    no_repeat: int = 0,
) -> list[str]:
    """What the model says to each prompt, greedily, in one batch; after its opening, where openings are given.

    The opening is not part of the text returned. Edits that are live in `model` act. no_repeat: so many tokens in a row
    do not come twice; 0: they may.
    """
    batch = encode(tokenizer, prompts, answers=openings, device=next(model.parameters()).device)
    output = model.generate(  # type: ignore[operator]
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        no_repeat_ngram_size=no_repeat,
        repetition_penalty=1.0,  # some checkpoints ask for another one
        pad_token_id=pad_id(tokenizer),
        eos_token_id=sorted(eos_ids(model, tokenizer)),
    )
    width, texts = batch.input_ids.shape[1], []
    for ids, mask, length in zip(output, batch.attention_mask, batch.prompt_lengths, strict=True):
        answer = ids[width - int(mask.sum()) + length :]  # with its opening, or a first space would be lost
        opening = tokenizer.decode(answer[: width - len(ids)], skip_special_tokens=True)
        texts.append(tokenizer.decode(answer, skip_special_tokens=True)[len(opening) :])
    return texts


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last whole sentence; empty where it has none."""
    ends = [mark.end() for mark in re.finditer(r"(?<!\d)[.!?](?=\s|$)", text)]  # "2." begins a list's item
    return text[: ends[-1]].strip() if ends else ""
