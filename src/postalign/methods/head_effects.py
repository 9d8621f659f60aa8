"""Which attention heads carry a behaviour: mean head outputs and their exact average indirect effect.

After Todd et al., "Function Vectors in Large Language Models", as SafeInfer uses it (arXiv 2406.12274, equations 1-2).
A head's *output* is its slice of the input of the attention output projection, at the last token. Knows token ids and
heads; knows nothing of demonstrations, refusals or what the vector is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import PostalignError
from ..models.anatomy import Anatomy, anatomy, block_output, with_block_output
from ..models.capture import captured, forward_inputs
from ..models.chat import Batch

Progress = Callable[[int, int], None]


@torch.no_grad()
def mean_head_outputs(model: nn.Module, prompts: Sequence[Tensor], on_progress: Progress | None = None) -> Tensor:
    """Equation 1: the mean over prompts of every head's output at the last token.

    prompts: token ids `[length]` each, not padded. Returns float32 `[layers, heads, head_dim]`.
    """
    body = anatomy(model)
    total = torch.zeros(body.n_layers, body.n_heads, body.head_dim, dtype=torch.float64)
    for i, ids in enumerate(prompts):
        with captured(body.attention_out, inputs=True) as outputs:
            model(**forward_inputs(model, _batch(model, ids)))
        for layer, x in enumerate(outputs):
            total[layer] += x.reshape(body.n_heads, body.head_dim).double().cpu()
        if on_progress is not None:
            on_progress(i + 1, len(prompts))
    return (total / max(1, len(prompts))).float()


@torch.no_grad()
def indirect_effects(
    model: nn.Module,
    prompts: Sequence[Tensor],
    targets: Sequence[Tensor],
    means: Tensor,
    on_progress: Progress | None = None,
) -> Tensor:
    """Exact indirect effect of every head on every prompt: float32 `[prompts, layers, heads]`.

    prompts: *corrupted* in-context prompts, ids `[length]` (length >= 2). targets: per prompt, the ids of the tokens
    that count as the behaviour (their probabilities are summed). means `[layers, heads, head_dim]`: what each head's
    output at the last token is replaced with. The effect is P(target | head replaced) - P(target), by softmax in
    float32.

    Exact, not approximated: nothing before the last token can change, so the prompt is read once into a cache and only
    the last token is run again, from the patched layer upwards, all heads of a layer as the rows of one batch.
    """
    body = anatomy(model)
    effects = torch.zeros(len(prompts), body.n_layers, body.n_heads)
    for i, (ids, target) in enumerate(zip(prompts, targets, strict=True)):
        if len(ids) < 2:
            raise PostalignError("a prompt of one token has no context to read: give longer demonstrations.")
        replay = _Replay(model, body, ids)
        clean = replay.clean_probability(target)
        for layer in range(body.n_layers):
            effects[i, layer] = (replay.patched_probability(layer, means[layer], target) - clean).cpu()
        if on_progress is not None:
            on_progress(i + 1, len(prompts))
    return effects


class _Replay:
    """The last token of one prompt, run again and again over a cache of the tokens before it."""

    def __init__(self, model: nn.Module, body: Anatomy, ids: Tensor):
        batch = _batch(model, ids)
        self.model, self.body, self.last = model, body, batch.input_ids[:, -1:]
        # without a config the cache keeps all of a sliding window's past; the model's masks hide what is too far back
        self.cache = DynamicCache()
        start = Batch(batch.input_ids[:, :-1], batch.attention_mask[:, :-1], [len(ids) - 1])
        model(**{**forward_inputs(model, start), "past_key_values": self.cache, "use_cache": True})
        if self.cache.get_seq_length() != len(ids) - 1:
            raise PostalignError(f"{type(model).__name__} does not fill a transformers cache: it is not supported.")
        layers: Any = self.cache.layers
        layers[:] = [_FrozenLayer(layer.keys, layer.values) for layer in layers]
        self.block_outputs: list[Any] = [None] * body.n_layers
        self.head_outputs: list[Tensor] = []

    def _probability(self, rows: int, target: Tensor) -> Tensor:
        output = self.model(input_ids=self.last.expand(rows, 1), past_key_values=self.cache, use_cache=True)
        return torch.softmax(output.logits[:, -1].float(), dim=-1)[:, target.to(output.logits.device)].sum(-1)

    def clean_probability(self, target: Tensor) -> Tensor:
        """P(target) of the prompt as it is, `[1]`; what every block and head returns is kept for the other runs."""

        def keep(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                # a copy: some models add to this tensor in place later on
                self.block_outputs[i] = with_block_output(output, block_output(output).clone())

            return hook

        # before the caller's own hooks, which act again when a block is skipped
        handles = [block.register_forward_hook(keep(i), prepend=True) for i, block in enumerate(self.body.blocks)]
        try:
            with captured(self.body.attention_out, inputs=True) as self.head_outputs:
                return self._probability(1, target)
        finally:
            for handle in handles:
                handle.remove()

    def patched_probability(self, layer: int, means: Tensor, target: Tensor) -> Tensor:
        """P(target) with head j replaced in row j, for all heads of `layer`: `[heads]`."""
        heads, width = self.body.n_heads, self.body.head_dim
        projection = self.body.attention_out[layer]
        patched = self.head_outputs[layer].reshape(1, heads, width).repeat(heads, 1, 1)
        rows = torch.arange(heads)
        patched[rows, rows] = means.to(patched)

        def replace(module: nn.Module, args: tuple) -> tuple:
            return (patched.reshape(heads, 1, heads * width).to(args[0].dtype), *args[1:])

        handle = projection.register_forward_pre_hook(replace)
        try:
            with self._skipping(layer, heads):
                return self._probability(heads, target)
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _skipping(self, layer: int, rows: int) -> Iterator[None]:
        """Blocks below `layer` return what they returned before: their inputs are the same."""

        def recorded(output: Any) -> Callable[..., Any]:
            hidden = block_output(output)
            again = with_block_output(output, hidden.repeat(rows, *[1] * (hidden.dim() - 1)))
            return lambda *args, **kwargs: again

        skipped = self.body.blocks[:layer]
        own = [block.__dict__.get("forward") for block in skipped]  # accelerate's hooks live there
        try:
            for i, block in enumerate(skipped):
                block.forward = recorded(self.block_outputs[i])  # type: ignore[method-assign]
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = forward  # type: ignore[method-assign]


class _FrozenLayer(DynamicLayer):
    """A cache layer that shows the prompt's keys and values to any number of rows and stores nothing new."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = self.prompt = (keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (past.expand(len(key_states), -1, -1, -1) for past in self.prompt)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def top_heads(effects: Tensor, k: int) -> list[tuple[int, int]]:
    """The k heads (layer, head) with the largest mean effect, largest first. effects: `[..., layers, heads]`."""
    mean = effects.reshape(-1, *effects.shape[-2:]).mean(0)
    if not 1 <= k <= mean.numel():
        raise PostalignError(f"heads={k} is out of range: the model has {mean.numel()} heads.")
    order = mean.flatten().argsort(descending=True, stable=True)[:k].tolist()
    return [(i // mean.shape[1], i % mean.shape[1]) for i in order]


def head_vector(model: nn.Module, means: Tensor, heads: Sequence[tuple[int, int]]) -> Tensor:
    """Equation 2 as executed: the sum over heads of W_O's slice times the mean output, float32 `[hidden]` (no bias)."""
    body = anatomy(model)
    return torch.stack(
        [body.head_weight(layer, head).cpu() @ means[layer, head] for layer, head in dict.fromkeys(heads)]
    ).sum(0)


def split_half_correlation(effects: Tensor, splits: int = 100, seed: int = 0) -> float | None:
    """Is the ranking of heads more than noise? Mean Spearman correlation of two random halves' mean effects.

    effects: `[prompts, layers, heads]`. The Spearman-Brown formula, 2r / (1 + r), steps it up to the reliability of the
    whole set; a correlation below zero is returned as it is. None when there is no ranking to compare: fewer than two
    prompts, or heads that all have the same effect.
    """
    flat, generator = effects.reshape(len(effects), -1), torch.Generator().manual_seed(seed)
    if len(flat) < 2:
        return None
    total = 0.0
    for _ in range(splits):
        order = torch.randperm(len(flat), generator=generator)
        half = len(flat) // 2
        ranks = torch.stack([_ranks(flat[part].mean(0)) for part in (order[:half], order[half:])])
        if bool((ranks == ranks[:, :1]).all(1).any()):
            return None
        total += float(torch.corrcoef(ranks)[0, 1])
    r = total / splits
    return 2 * r / (1 + r) if r > 0 else r


def _ranks(x: Tensor) -> Tensor:
    """Rank of each value, float64; equal values share their mean rank."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2.0).double()[place]


def _batch(model: nn.Module, ids: Tensor) -> Batch:
    """One prompt's ids `[length]` as a batch of one row on the model's device."""
    row = ids.reshape(1, -1).to(next(model.parameters()).device)
    return Batch(row, torch.ones_like(row), [row.shape[1]])
