"""Activations at the last position: recorded by hooks, read for many prompts, summed up as they stream by.

Knows the parts of a model (anatomy.py) and batches (chat.py); knows no method that uses what it records.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .anatomy import anatomy, block_output
from .chat import Batch, Messages, check_length, encode
from .forward import accepted

Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def captured(modules: Sequence[nn.Module], *, inputs: bool) -> Iterator[list[Tensor]]:
    """Inside the block, every forward pass leaves the last position of each module's input or output behind.

    inputs: True for what goes into the modules, False for what comes out (a tuple's first element). Yields
    one entry per module, in their order: empty before the first pass, then `[batch, features]` of the latest
    one, detached, on the module's device and in its dtype. Earlier hooks have acted on what is seen here; passes of
    other threads are not seen.
    """
    taken, here = [torch.empty(0) for _ in modules], threading.get_ident()

    def before(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != here:
                return
            given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            taken[i] = given[..., -1, :].detach().clone()

        return hook

    def after(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if threading.get_ident() == here:
                taken[i] = block_output(output)[..., -1, :].detach().clone()

        return hook

    if inputs:
        handles = [m.register_forward_pre_hook(before(i), with_kwargs=True) for i, m in enumerate(modules)]
    else:
        handles = [m.register_forward_hook(after(i)) for i, m in enumerate(modules)]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_token_states(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    system: str | None = None,
    on_progress: Progress | None = None,
) -> Tensor:
    """Block outputs at the last token of each prompt: float32 `[prompts, layers, hidden]` on the CPU.

    Prompts are read in the chat template. layers: 0-based blocks (None: all of them). on_progress(stage,
    done, total) after each batch. Prompts of like length share a batch; the result is in the order of
    `prompts` and does not depend on batch_size but for rounding. Raises UsageError for a layer out of range
    and a prompt longer than the context.
    """
    body = anatomy(model)
    wanted = list(range(body.n_layers)) if layers is None else list(layers)
    for layer in wanted:
        if not 0 <= layer < body.n_layers:
            raise UsageError(f"layer {layer} is out of range: choose one from 0 to {body.n_layers - 1}.")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} is out of range: choose 1 or more.")
    states = torch.empty(len(prompts), len(wanted), body.hidden_size)
    if not len(prompts):
        return states
    whole = encode(tokenizer, prompts, system=system)
    check_length(model, whole, 0)
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: whole.prompt_lengths[i])
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        length = max(whole.prompt_lengths[i] for i in rows)
        batch = Batch(
            whole.input_ids[rows, -length:].to(device),
            whole.attention_mask[rows, -length:].to(device),
            [whole.prompt_lengths[i] for i in rows],
        )
        with captured([body.blocks[layer] for layer in wanted], inputs=False) as taken:
            model(**forward_inputs(model, batch))
        for j, state in enumerate(taken):
            states[rows, j] = state.float().cpu()
        if on_progress is not None:
            on_progress("reading prompts", begin + len(rows), len(order))
    return states


def forward_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Arguments of one pass over left-padded rows: no cache, logits of the last position if possible."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
        **accepted(model, position_ids=batch.position_ids, logits_to_keep=1),
    }


class RunningMoments:
    """Mean and variance of a stream of tensors in float64, without keeping them (Chan et al., 1983).

    `add` takes `[n, ...]`, any n; all calls must agree on the rest. The accumulators live on the CPU.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.empty(0, dtype=torch.float64)
        self._squares = torch.empty(0, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in `x` `[n, ...]` of any floating dtype. Raises UsageError when its shape does not fit."""
        if self.count and x.shape[1:] != self._mean.shape:
            raise UsageError(f"rows of shape {tuple(x.shape[1:])} do not fit earlier ones {tuple(self._mean.shape)}.")
        if not len(x):
            return
        values = x.detach().cpu().double()
        self._join(len(values), values.mean(0), values.var(0, correction=0) * len(values))

    def merge(self, other: RunningMoments) -> None:
        """Take in all that `other` has seen."""
        if other.count:
            self._join(other.count, other._mean, other._squares)

    @property
    def mean(self) -> Tensor:
        """float64 `[...]`. Raises UsageError before the first row."""
        self._require(1)
        return self._mean.clone()

    @property
    def variance(self) -> Tensor:
        """float64 `[...]`, over n - 1 as torch.var. Raises UsageError before the second row."""
        self._require(2)
        return self._squares / (self.count - 1)

    def _join(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if not self.count:
            self.count, self._mean, self._squares = count, mean.clone(), squares.clone()
            return
        total, delta = self.count + count, mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._squares = self._squares + squares + delta.square() * (self.count * count / total)
        self.count = total

    def _require(self, rows: int) -> None:
        if self.count < rows:
            raise UsageError(f"moments of {self.count} rows were asked for: add at least {rows} first.")
