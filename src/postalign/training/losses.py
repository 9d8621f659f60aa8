"""The losses of training, one number per row of a batch.

Knows logits and labels; knows nothing of weights, optimisers or the order of things.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.forward import accepted
from .batches import IGNORED


def target_logits(model: nn.Module, inputs: dict[str, Tensor], run: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """float32 logits `[rows, n, vocabulary]` and the labels `[rows, n]` that they predict, from the first label on.

    run: what is called in place of `model` (a wrapper around it), whose forward says which arguments there are.
    """
    labels = inputs["labels"][:, 1:]
    # rows are left-padded: answers stand at the end, and only there are logits (the largest tensor by far) needed
    first = int((labels != IGNORED).any(0).long().argmax())
    labels = labels[:, first:]
    forward: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    # indices, not a number: a slice would be strided, and the output head's weight be copied for every row
    wanted = torch.arange(first, first + labels.shape[1], device=labels.device)
    forward |= accepted(model, position_ids=positions, logits_to_keep=wanted)
    logits = (run or model)(**forward, use_cache=False).logits
    if logits.shape[1] != len(wanted):  # this model gives all of them
        logits = logits[:, first:-1]
    return logits.float(), labels


def row_losses(
    model: nn.Module,
    inputs: dict[str, Tensor],
    run: nn.Module | None = None,
    head_tokens: int | None = None,
    rest_weight: float = 0.0,
) -> Tensor:
    """Mean cross-entropy (nats) of each row's labelled tokens, float32 `[rows]`; 0 for a row without any.

    With head_tokens the mean over the first so many, plus `rest_weight` times the mean over the others.
    """
    logits, labels = target_logits(model, inputs, run)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    return _row_means(losses, labels != IGNORED, head_tokens, rest_weight)


def _row_means(each: Tensor, counted: Tensor, head_tokens: int | None, rest_weight: float) -> Tensor:
    """The mean of each row's counted tokens; with head_tokens that of the first so many, plus the others' times
    `rest_weight`."""
    if head_tokens is None:
        return each.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)
    head = counted & (counted.cumsum(-1) <= head_tokens)
    parts = [each.masked_fill(~part, 0.0).sum(-1) / part.sum(-1).clamp(min=1) for part in (head, counted & ~head)]
    return parts[0] + rest_weight * parts[1]


def answer_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of the labelled tokens, float32, averaged per row and then over rows."""
    return row_losses(model, inputs).mean()


def label_counts(inputs: dict[str, Tensor]) -> Tensor:
    """Labelled tokens of each row, int64 `[rows]`, at least 1."""
    return (inputs["labels"][:, 1:] != IGNORED).sum(-1).clamp(min=1)


def npo(losses: Tensor, reference: Tensor, counts: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation (arXiv 2404.05868, eq. 3): `2/beta log(1 + (p/p_ref)^beta)` of each row.

    losses, reference: `[rows]`, mean loss under the trained and the base model; counts: `[rows]`, their tokens. The
    probability is the whole answer's. Its gradient is that of ascent, damped as the answer becomes unlikely.
    """
    log_ratio = (reference - losses) * counts
    return 2 / beta * nn.functional.softplus(beta * log_ratio)


def row_divergences(
    model: nn.Module,
    inputs: dict[str, Tensor],
    reference: nn.Module,
    run: nn.Module | None = None,
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    head_tokens: int | None = None,
    prompt_weight: float = 0.0,
) -> Tensor:
    """KL(reference || model) in nats, the mean over each row's labelled tokens, float32 `[rows]`.

    around: the context in which the reference runs. head_tokens: as in `row_losses`; what comes later counts as much.
    prompt_weight: of the mean over the tokens that have no label, which is added.
    """
    answers = inputs["labels"]
    if prompt_weight:
        shown = inputs["attention_mask"].cumsum(-1) > 1  # nothing predicts the first
        inputs = inputs | {"labels": inputs["input_ids"].masked_fill(~shown, IGNORED)}
    with torch.no_grad(), around():
        theirs = target_logits(reference, beside(reference, inputs))[0].log_softmax(-1)
    logits, labels = target_logits(model, inputs, run)
    ours, theirs = logits.log_softmax(-1), theirs.to(logits.device)
    each = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    answer = answers[:, -labels.shape[1] :] != IGNORED
    found = _row_means(each, answer, head_tokens, 1.0)
    if prompt_weight:
        found = found + prompt_weight * _row_means(each, (labels != IGNORED) & ~answer, None, 0.0)
    return found


def beside(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` on the model's device."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}
