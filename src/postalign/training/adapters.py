"""Training a low-rank patch beside a model that stays as it is."""

from __future__ import annotations

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
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
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
    learning_rate: float = 2e-4,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    max_grad_norm: float = 1.0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> LowRankPatch:
    """Train LoRA on (prompt, answer) pairs by AdamW with a linear warm-up of a tenth of the steps, then constant.

    An answer that should teach the model to stop there ends with `models.chat.end_of_turn`; one that was cut short does not.

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
            control.strength = torch.ones(len(chosen), device=device)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, steps // 10))
            loss = answer_loss(model, answer_batch(tokenizer, chosen, device))
            if not torch.isfinite(loss):
                raise PostalignError("the adapter's training diverged: use a lower learning rate or fewer steps.")
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(patch.parameters(), max_grad_norm)
            optimiser.step()
            if on_step is not None:
                on_step(step + 1, steps, float(loss))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted_grad:
            parameter.requires_grad_(True)
    return patch.frozen()
