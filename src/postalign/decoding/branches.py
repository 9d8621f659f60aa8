"""Forward passes of one model over rows that carry different edits, all in one pass.

The target's rows come first; the guide's rows branch off below them in front of the first block where the two differ,
so that what they share is computed once, in prompts and in every step. A guide that reads other tokens has rows of its
own from the embedding on. Knows models, caches and edits; knows no mixing rule.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..edits import Control, HiddenEdit, LowRankPatch, SparsePatch
from ..edits.edit import Edit, attach_all
from ..edits.weights import block_linears
from ..models.anatomy import anatomy
from ..models.capture import captured
from ..models.chat import Batch
from ..models.forward import accepted
from ..models.products import QuickProducts, slow_products
from .cache import RowCache


@dataclass
class Rows:
    """The rows of one run: what they have read, and which of them have a guide.

    mask: int64 `[rows, columns]`, the rows being those of the input. strength: float32 `[target rows]`, None for the
    model as it is. guided: indices of target rows that have a guide row, in ascending order.
    """

    cache: RowCache
    mask: Tensor
    strength: Tensor | None
    guided: Tensor
    controls: list[tuple[Tensor | None, slice]] = field(default_factory=list)  # of target and guide, as hooks see them
    plain: bool = False  # whether the mask hides nothing
    index: Tensor | None = None  # of the rows after the fork, which of the input's each is


class Branches:
    """A model under `edits`, and with a guide's edits (None: without a guide) on the rows that have one.

    own_tokens: whether the guide's rows read tokens of their own. Logits are float32.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: Sequence[Edit] = (),
        guide: Sequence[Edit] | None = None,
        own_tokens: bool = False,
    ) -> None:
        self.model, self.own_tokens = model, own_tokens
        here = threading.get_ident()
        self.controls = Control(thread=here), Control(thread=here)
        self.blocks = anatomy(model).blocks
        self.takes = accepted(model, position_ids=True, logits_to_keep=True)
        self.fork = 0
        self.index: Tensor | None = None  # that of the rows of the current pass
        self.above = 0  # how many the input has
        self.spread: dict[int, tuple[Tensor, Tensor]] = {}
        self.handles: list[Any] = attach_all(edits, model, self.controls[0])
        try:
            if slow_products():
                self.handles.append(QuickProducts(model))
            if guide is not None:
                self.handles += attach_all(guide, model, self.controls[1])
                self.own_tokens = own_tokens or not shape_of(model).forks
                if not self.own_tokens:
                    self.fork = first_block(model, [*edits, *guide])
                    self.handles += self.branch_off()
        except BaseException:
            self.close()
            raise

    def branch_off(self) -> list[RemovableHandle]:
        """Make rows branch off in front of the block `fork`."""
        blocks = self.blocks[self.fork :]
        return [block.register_forward_pre_hook(self._branch_off, with_kwargs=True) for block in blocks]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def prefill(
        self, batch: Batch, strength: Tensor | None, guided: Tensor, guide_batch: Batch | None = None
    ) -> tuple[Rows, Tensor]:
        """Read prompts: (the rows, logits `[target rows + guided, vocab]` of what comes next).

        guided: indices of the rows that get a guide row, which reads `guide_batch` (their rows only) if there is one.
        """
        ids, mask = batch.input_ids, batch.attention_mask
        if self.own_tokens and len(guided):
            below = guide_batch or Batch(ids[guided], mask[guided], [])
            ids, mask = _stack(ids, below.input_ids), _stack(mask, below.attention_mask)
        config: Any = self.model.config
        rows = Rows(RowCache(config), mask, strength, guided)
        self._settle(rows)
        logits = self._pass(rows, ids, start=ids.shape[1])[:, -1]
        return rows, logits

    def extend(self, rows: Rows, tokens: Tensor) -> Tensor:
        """Append tokens `[target rows, n]`; logits `[target rows + guided, n, vocab]`, each after its token."""
        if self.own_tokens and len(rows.guided):
            tokens = torch.cat([tokens, tokens[rows.guided]])
        rows.mask = torch.cat([rows.mask, rows.mask.new_ones(tokens.shape)], dim=1)
        return self._pass(rows, tokens, start=0)

    def keep(self, rows: Rows, kept: Tensor, guided: Tensor | None = None) -> None:
        """Go on with these target rows (indices, in any order), and with the guides `guided` of the old rows (None: all
        that those rows have). Columns that none of them needs are dropped."""
        rows.guided = rows.guided.to(kept.device)
        has = torch.isin(kept, rows.guided if guided is None else guided)
        below = self._targets(rows) + torch.searchsorted(rows.guided, kept[has])
        every = torch.cat([kept, below])
        mask = rows.mask[every] if self.own_tokens else rows.mask[kept]
        first = int(mask.any(0).int().argmax()) if rows.cache.movable else 0
        for layer in range(len(rows.cache.layers)):
            forked = self.own_tokens or layer >= self.fork
            rows.cache.take(layer, every if forked else kept, first)
        rows.mask = mask[:, first:]
        rows.strength = rows.strength[kept] if rows.strength is not None else None
        rows.guided = has.nonzero().flatten()
        self._settle(rows)

    def join(self, rows: Rows, others: Rows, order: Tensor) -> None:
        """Put `others` under `rows` and take the target rows `order` of that, each with its guide row."""
        mine, theirs = self._targets(rows), self._targets(others)
        guides = torch.cat([rows.guided, mine + others.guided])
        place = torch.full((mine + theirs,), -1)
        place[guides] = torch.arange(len(guides))
        has = place[order] >= 0
        rank = place[order[has]]  # of the guide rows of both, one below the other
        length = max(rows.mask.shape[1], others.mask.shape[1])
        masks = [nn.functional.pad(m, (length - m.shape[1], 0)) for m in (rows.mask, others.mask)]
        # of [mine, my guides, theirs, their guides]
        targets = torch.where(order < mine, order, order + len(rows.guided))
        below = torch.where(rank < len(rows.guided), rank + mine, rank + mine + theirs)
        every = torch.cat([targets, below])
        for layer in range(len(rows.cache.layers)):
            forked = self.own_tokens or layer >= self.fork
            rows.cache.layers[layer].join(others.cache.layers[layer], every if forked else order)  # type: ignore
        rows.mask = torch.cat(masks)[every if self.own_tokens else order]
        if rows.strength is not None or others.strength is not None:
            both = (rows.strength, mine), (others.strength, theirs)
            rows.strength = torch.cat([torch.zeros(n) if s is None else s for s, n in both])[order]
        rows.guided = has.nonzero().flatten()
        self._settle(rows)

    def retract(self, rows: Rows, columns: Tensor) -> None:
        """Take back each row's last columns: as many as `columns` `[rows]` says. For rows without a guide's below."""
        every = int(columns.min())
        if every:
            rows.cache.crop(-every)
            rows.mask = rows.mask[:, :-every]
        length = rows.mask.shape[1]
        places = torch.arange(length, device=rows.mask.device)
        hidden = places >= (length - (columns - every)).unsqueeze(1)
        if bool(hidden.any()):
            rows.mask = rows.mask.masked_fill(hidden, 0)
            longest = int(rows.mask.sum(1).max())
            if length > 64 + 1.25 * longest:  # more is hidden than is worth dragging along
                order = rows.mask.sort(dim=1, stable=True).indices[:, -longest:]
                for layer in rows.cache.layers:
                    layer.gather(order)  # type: ignore[attr-defined]
                rows.mask = rows.mask.gather(1, order)
        rows.plain = bool(rows.mask.all())

    def _targets(self, rows: Rows) -> int:
        return len(rows.mask) - (len(rows.guided) if self.own_tokens else 0)

    def _settle(self, rows: Rows) -> None:
        """Work out, once for many steps, what the hooks are told."""
        targets, guides = self._targets(rows), len(rows.guided)
        rows.plain, rows.index = bool(rows.mask.all()), None
        if guides and not self.own_tokens:
            rows.index = torch.cat([torch.arange(targets, device=rows.guided.device), rows.guided])
        strength = rows.strength
        if strength is not None and guides:
            strength = torch.cat([strength, strength.new_zeros(guides)])
        on = torch.cat([torch.zeros(targets), torch.ones(guides)]).to(rows.mask.device) if guides else None
        rows.controls = [(strength, slice(0, targets)), (on, slice(targets, targets + guides))]

    def _pass(self, rows: Rows, ids: Tensor, start: int) -> Tensor:
        length = ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": rows.cache, "use_cache": True}
        if not rows.plain:
            inputs["attention_mask"] = rows.mask
        limit = getattr(self.model.config, "max_position_embeddings", None)  # rows that have ended may run past it
        positions = (rows.mask.cumsum(-1) - 1).clamp(min=0, max=limit and limit - 1)[:, -length:]
        kept = 1 if start else length
        more = {"position_ids": positions, "logits_to_keep": kept}
        inputs |= {name: value for name, value in more.items() if name in self.takes}
        self.index, self.above = rows.index, len(ids)
        for control, (strength, where) in zip(self.controls, rows.controls, strict=True):
            control.start, control.strength, control.rows = start, strength, where
            control.whole = control is self.controls[1]
        try:
            output = self.model(**inputs)
        finally:
            self.index = None
            self.spread.clear()
            for control in self.controls:
                control.strength = None  # off for every pass that is not these rows' own
        return output.logits[:, -kept:].float()

    def _branch_off(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.index is None or self.controls[0].thread != threading.get_ident():
            return None
        return tuple(self._spread(x) for x in args), {name: self._spread(x) for name, x in kwargs.items()}

    def _spread(self, value: Any) -> Any:
        """What stands for the input's rows, for all rows; what stands for none of them (or for any) as it is."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._spread(x) for x in value)
        if self.index is None or not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != self.above:
            return value
        if id(value) not in self.spread:  # the same mask comes to every block
            self.spread[id(value)] = value, value[self.index]
        return self.spread[id(value)][1]


def first_block(model: nn.Module, edits: Sequence[Edit]) -> int:
    """The first block in which one of these edits acts on some rows only."""
    body, last = anatomy(model), anatomy(model).n_layers - 1
    found = [last]
    for edit in edits:
        if isinstance(edit, HiddenEdit):
            found.append(edit.layer)
        elif isinstance(edit, LowRankPatch):
            for name in edit.factors:
                inside = [i for i, block in enumerate(body.block_names) if name.startswith(f"{block}.")]
                found.append(inside[0] if inside else last)
        elif not isinstance(edit, SparsePatch):  # which is in the weights, for all rows
            return 0
    return min(found)


@dataclass(frozen=True)
class Shape:
    """What of a model's inside goes by rows. forks: whether rows can branch off between two blocks. apart: linear
    modules that do not see all rows' tokens, in their order (experts, for one)."""

    forks: bool
    apart: frozenset[str]


_known: weakref.WeakKeyDictionary[nn.Module, Shape] = weakref.WeakKeyDictionary()


def shape_of(model: nn.Module) -> Shape:
    """Tried once for each model, on a few tokens: no list of architectures is kept."""
    if model not in _known:
        device = next(model.parameters()).device
        ids = torch.tensor([[1, 2, 3], [1, 3, 2], [1, 1, 2]], device=device)
        mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1]], device=device)
        guided = torch.tensor([0, 2], device=device)
        seen: dict[str, tuple[int, ...]] = {}

        def watch(name: str) -> Any:
            return lambda module, args, output: seen.__setitem__(name, tuple(args[0].shape[:-1]))

        trial, forks = Branches(model), False
        middle = len(trial.blocks) // 2
        names = block_linears(model, anatomy(model).block_names)
        handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
        with torch.no_grad():
            try:
                trial.prefill(Batch(ids, mask, []), None, guided[:0])
                apart = frozenset(name for name in names if seen.get(name) not in ((3, 3), (9,)))
                trial.fork = middle
                handles += trial.branch_off()
                found = trial.prefill(Batch(ids, mask, []), None, guided)[1]
                forks = found.shape[0] == 5 and bool(torch.allclose(found[:3][guided], found[3:], atol=1e-3))
            except (RuntimeError, IndexError, ValueError, TypeError):
                pass
            finally:
                for handle in [*handles, *trial.handles]:
                    handle.remove()
        _known[model] = Shape(forks, apart)
    return _known[model]


def last_states(model: nn.Module, layers: Sequence[int]) -> AbstractContextManager[list[Tensor]]:
    """Inside it, a forward pass leaves the last position's output of each of these blocks behind, `[rows, hidden]`."""
    blocks = anatomy(model).blocks
    return captured([blocks[layer] for layer in layers], inputs=False)


def _stack(above: Tensor, below: Tensor) -> Tensor:
    """One under the other, padded on the left with zeros."""
    length = max(above.shape[1], below.shape[1])
    return torch.cat([nn.functional.pad(part, (length - part.shape[1], 0)) for part in (above, below)])
