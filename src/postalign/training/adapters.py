"""Training a low-rank patch beside a model that stays as it is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..edits import Control, LowRankPatch
from ..edits.weights import block_linears
from ..errors import PostalignError
from ..models.anatomy import anatomy
from ..models.chat import Messages, encode

IGNORED = -100
Example = tuple[str | Messages, str]


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes this argument."""
    return name in inspect.signature(model.forward).parameters


def answer_batch(tokenizer: Any, pairs: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """Left-padded `input_ids`, `attention_mask` and `labels`: only the answers' tokens carry a loss."""
    batch = encode(tokenizer, [p for p, _ in pairs], answers=[a for _, a in pairs], device=device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
    for i, length in enumerate(batch.prompt_lengths):
        first = labels.shape[1] - int(batch.attention_mask[i].sum())
        labels[i, : first + length] = IGNORED
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def answer_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of the labelled tokens, float32, averaged per row and then over rows."""
    labels = inputs["labels"][:, 1:]
    # rows are left-padded: answers stand at the end, and only there are logits (the largest tensor by far) needed
    answer = int((labels != IGNORED).any(0).long().argmax())
    labels = labels[:, answer:]
    keep = {"logits_to_keep": labels.shape[1] + 1} if accepts(model, "logits_to_keep") else {}
    forward = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if accepts(model, "position_ids"):  # where positions are learned, padding must not shift them
        forward["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**forward, use_cache=False, **keep).logits[:, -labels.shape[1] - 1 : -1]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    counts = (labels != IGNORED).sum(-1).clamp(min=1)
    return (losses.sum(-1) / counts).mean()


def train_adapter(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Example],
    *,
    rank: int = 8,
    alpha: float = 16.0,
    steps: int = 40,
    batch_size: int = 8,
    micro_batch: int = 4,
    learning_rate: float = 2e-4,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    max_grad_norm: float = 1.0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> LowRankPatch:
    """Train LoRA on (prompt, answer) pairs by AdamW with a linear warm-up of a tenth of the steps, then constant.

    An answer that should teach the model to stop there ends with `models.chat.end_of_turn`; one that was cut short does
    not.

    The model's own parameters are untouched; the patch runs beside them by hooks. targets: module names, by default all
    linear modules of the blocks. on_step(step, steps, loss). Returns the patch in float16 on the CPU.
    Raises PostalignError when there are no pairs or the loss is not finite.
    """
    if not pairs:
        raise PostalignError("there are no pairs to train the adapter on: give harmful prompts, or pairs with answers.")
    names = list(targets) if targets is not None else block_linears(model, anatomy(model).block_names)
    patch = LowRankPatch.fresh(model, names, rank, alpha, seed)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    wanted_grad = [p for p in model.parameters() if p.requires_grad]
    handles = patch.attach(model, control := Control())
    try:
        model.requires_grad_(False)
        optimiser = torch.optim.AdamW(patch.parameters(), lr=learning_rate, weight_decay=0.0)
        order: list[int] = []
        for step in range(steps):
            while len(order) < batch_size:
                order += torch.randperm(len(pairs), generator=generator).tolist()
            chosen, order = [pairs[i] for i in order[:batch_size]], order[batch_size:]
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, steps // 10))
            optimiser.zero_grad()
            loss = 0.0
            # like lengths together in small batches: less padding, less memory, the same gradient
            chosen.sort(key=lambda pair: len(str(pair[0])) + len(pair[1]))
            for begin in range(0, len(chosen), micro_batch):
                part = chosen[begin : begin + micro_batch]
                control.strength = torch.ones(len(part), device=device)
                share = answer_loss(model, answer_batch(tokenizer, part, device)) * (len(part) / len(chosen))
                share.backward()
                loss += share.item()
            if not math.isfinite(loss):
                raise PostalignError("the adapter's training diverged: use a lower learning rate or fewer steps.")
            nn.utils.clip_grad_norm_(patch.parameters(), max_grad_norm)
            optimiser.step()
            if on_step is not None:
                on_step(step + 1, steps, loss)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted_grad:
            parameter.requires_grad_(True)
    return patch.frozen()
