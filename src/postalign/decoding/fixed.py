"""Decoding one batch to its end, as transformers' `generate` does: no row joins, and processors see all that was said.

Exact and plain. Knows streams of distributions; knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.generation import LogitsProcessorList

from ..alignment import Alignment
from ..models.chat import Batch
from .sampling import Sampler
from .stream import Stream


@torch.no_grad()
def decode(
    model: nn.Module,
    batch: Batch,
    *,
    alignment: Alignment | None,
    guide: nn.Module | None = None,
    guide_batch: Batch | None = None,
    max_new_tokens: int,
    eos: set[int],
    pad: int,
    sampler: Sampler,
    stopping: Callable[[Tensor, Tensor], Tensor] | None = None,
    on_tokens: Callable[[Tensor, Tensor], None] | None = None,
    processors: LogitsProcessorList | None = None,
    compact: bool = True,
) -> tuple[list[list[int]], Tensor]:
    """Generate for one left-padded batch: (new token ids of each row, gate strengths `[rows]`).

    stopping(sequences, rows) -> bool `[rows]`: extra stops. on_tokens(rows, tokens): called after each step.
    compact: rows that have ended are dropped from the batch once they are a quarter of it; False where `processors` or
    `stopping` count on seeing all rows. processors see the mixed log-probabilities on the scale of the model's logits.
    """
    device = batch.input_ids.device
    replies: list[list[int]] = [[] for _ in range(len(batch.input_ids))]
    if max_new_tokens <= 0:
        return replies, torch.ones(len(replies))
    with Stream(model, alignment, guide) as stream:
        scores = stream.first(batch, guide_batch)
        strengths = stream.strength.clone().cpu()
        rows = torch.arange(len(replies), device=device)  # which prompt each current row belongs to
        live = torch.ones(len(rows), dtype=torch.bool, device=device)
        sequences = batch.input_ids
        stop_ids = torch.tensor(sorted(eos), device=device)
        for step in range(max_new_tokens):
            if processors:
                scores = processors(sequences, scores + stream.level())  # type: ignore[arg-type]
            tokens = sampler(scores, rows.tolist())
            tokens = torch.where(live, tokens, torch.full_like(tokens, pad))
            sequences = torch.cat([sequences, tokens.unsqueeze(1)], dim=1)
            for row, token, on in zip(rows.tolist(), tokens.tolist(), live.tolist(), strict=True):
                if on:
                    replies[row].append(token)
            if on_tokens is not None:
                on_tokens(rows[live], tokens[live])
            live &= ~torch.isin(tokens, stop_ids)
            if stopping is not None:
                live &= ~stopping(sequences, rows)
            if not bool(live.any()) or step == max_new_tokens - 1:
                break
            if compact and int(live.sum()) <= 0.75 * len(live):
                kept = live.nonzero().flatten()
                stream.keep(kept)
                rows, tokens, sequences, live = rows[kept], tokens[kept], sequences[kept], live[kept]
            scores = stream.next(tokens)
    return replies, strengths
