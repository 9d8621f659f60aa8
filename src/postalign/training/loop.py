"""The training loop that adapters and full weights share: terms, batches, accumulation, clipping, the step.

Knows losses, the optimiser and the processes; knows neither what is trained nor where it is kept.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PostalignError
from .batches import Example, batch_order, share_of
from .processes import Processes

SMOOTHED = 4  # steps whose mean loss decides whether ascent stops
LEAST = 0.1  # of the rate, at the end of a linear schedule
Objective = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass
class Term:
    """One part of what is minimised: `weight * mean over rows of objective(collate(examples))`.

    collate: examples -> the inputs of a pass. objective: inputs -> (what is minimised, the loss to be told), each
    `[rows]`. seed: of the order of the examples. share: examples in a step, as a share of the batch size.
    """

    examples: Sequence[Example]
    collate: Callable[[Sequence[Example]], dict[str, Tensor]]
    objective: Objective
    weight: float = 1.0
    seed: int = 0
    share: float = 1.0


@dataclass
class History:
    """Steps done, the objective and the first term's loss at each, and whether the loss's limit ended it early."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    answer_losses: list[float] = field(default_factory=list)
    stopped: bool = False


def descend(
    run: nn.Module,
    parameters: Sequence[Tensor],
    optimiser: Any,
    terms: Sequence[Term],
    processes: Processes,
    *,
    steps: int,
    batch_size: int,
    micro_batch: int,
    learning_rate: float,
    warmup: int,
    max_grad_norm: float,
    schedule: str = "constant",
    limit: float = math.inf,
    history: History | None = None,
    on_step: Callable[[History], None] = lambda history: None,
    before_pass: Callable[[int], None] = lambda rows: None,
) -> History:
    """Minimise the sum of `terms` over `parameters`, from `history.step` on.

    The rate rises linearly over `warmup` steps, then stays, or falls linearly (schedule `linear`). limit: how far the
    first term's loss may rise, the mean over the last SMOOTHED steps above that over the first; the step that finds it
    reached changes nothing any more.
    on_step: called in every process after each step. before_pass(rows): called ahead of every forward pass.
    Raises PostalignError when a loss or gradient is not finite.
    """
    history = history or History()
    orders = [batch_order(len(t.examples), max(1, round(t.share * batch_size)), t.seed) for t in terms]
    for order in orders:
        next(itertools.islice(order, history.step, history.step), None)
    while history.step < steps and not history.stopped:
        for group in optimiser.param_groups:
            fall = max(LEAST, 1 - history.step / steps) if schedule == "linear" else 1.0
            group["lr"] = learning_rate * fall * min(1.0, (history.step + 1) / max(1, warmup))
        optimiser.zero_grad()
        loss, answers = _accumulate(run, terms, orders, processes, micro_batch, before_pass)
        if not math.isfinite(loss):
            raise diverged()
        history.losses.append(loss)
        history.answer_losses.append(answers)
        if _rise(history.answer_losses) >= limit:
            history.stopped = True
        else:
            if not math.isfinite(processes.clip(parameters, max_grad_norm)):
                raise diverged()
            optimiser.step()
        history.step += 1
        on_step(history)
    optimiser.zero_grad()
    return history


def _rise(losses: list[float]) -> float:
    return statistics.mean(losses[-SMOOTHED:]) - statistics.mean(losses[:SMOOTHED])


def _accumulate(
    run: nn.Module,
    terms: Sequence[Term],
    orders: Sequence[Iterable[list[int]]],
    processes: Processes,
    micro_batch: int,
    before_pass: Callable[[int], None],
) -> tuple[float, float]:
    """Add up the gradient of one step; (the objective, the first term's mean loss), over all processes."""
    passes = []
    for term, order in zip(terms, orders, strict=True):
        chosen = [term.examples[i] for i in next(iter(order))]
        parts = share_of(chosen, processes.rank, processes.world, micro_batch)
        passes += [(term, part, real, len(chosen)) for part, real in parts]
    loss = answers = 0.0
    for i, (term, part, real, count) in enumerate(passes):
        before_pass(len(part))
        with processes.waiting(run, last=i == len(passes) - 1):
            objective, told = term.objective(term.collate(part))
            # rows that stand in are in the graph, so that every process waits for the same gradients, but weigh nothing
            share = objective[:real].mean() * (real / count) if real else objective.sum() * 0.0
            share = share * term.weight if term.weight != 1 else share
            # gradients are averaged over processes, and their shares are to be summed
            processes.backward(share * processes.world if processes.world > 1 else share)
        loss += share.item()
        if term is terms[0] and real:
            answers += float(told[:real].detach().mean()) * (real / count)
    totals = processes.total(loss, answers)
    return totals[0], totals[1]


def diverged() -> PostalignError:
    return PostalignError(
        "the training diverged (a loss or gradient is not finite): use a lower learning rate or fewer steps."
    )


def make_optimiser(
    kind: str, parameters: Sequence[Tensor], learning_rate: float, weight_decay: float, *, fused: bool = False
) -> Any:
    """`adamw`, or `sgd` without momentum. fused: one pass over memory, several times as fast on whole models."""
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
