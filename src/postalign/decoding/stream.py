"""What every row would say next: the model's distribution under an alignment, step after step.

The gate decides each row once, from the prompt's own forward pass; the guide runs on the rows that it opened for. A
guide on the same weights shares the model's passes, one with weights of its own has passes of its own. Knows which
numbers are mixed; picks no token.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..edits import AdapterGuide, Guidance, PromptGuide, SparsePatch, union, union_order
from ..errors import UsageError
from ..models.chat import Batch
from .branches import Branches, Rows, last_states, shape_of


class Stream:
    """The mixed next-token distribution of a batch of rows.

    `first()` reads the prompts and returns log-probabilities float32 `[rows, vocab]`; `next(tokens)` appends one token
    per row; `join()` adds rows and `keep()` drops some. `strength` `[rows]` is what the gate said. guide: the model of
    a guide that has weights of its own.
    """

    def __init__(self, model: nn.Module, alignment: Alignment | None, guide: nn.Module | None = None):
        self.model, self.alignment = model, alignment
        self.gate = alignment.gate if alignment else None
        edits = alignment.hidden if alignment else ()
        found = alignment.guidance if alignment else None
        self.guidance: Guidance | None = found if found is not None and found.lam > 0 else None
        self.other: Branches | None = None  # of a guide with passes of its own
        self.other_rows: Rows | None = None
        below = None
        if self.guidance is not None and guide is None:
            below = self.guidance.guide.edits()
            patch = self.guidance.guide.patch if isinstance(self.guidance.guide, AdapterGuide) else None
            if patch is not None and not shape_of(model).apart.isdisjoint(patch.factors):
                guide, below = model, None
        kind = self.guidance.guide if self.guidance else None
        self.shared = below is not None  # whether the guide's rows are in the model's own passes
        self.edited = any(not isinstance(edit, SparsePatch) for edit in edits)
        self.leave = _enter(model, writes=any(isinstance(edit, SparsePatch) for edit in edits))
        try:
            self.branches = Branches(model, edits, below, own_tokens=isinstance(kind, PromptGuide))
        except BaseException:
            self.leave()
            raise
        try:
            if self.guidance is not None and guide is not None:
                self.other = Branches(guide, self.guidance.guide.edits())
        except BaseException:
            self.close()
            raise
        self.state = _State()
        self.replied: list[int] = []  # tokens of each row's reply so far
        self.logits = torch.empty(0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def strength(self) -> Tensor:
        """What the gate said of each row, float32 `[rows]`."""
        return self.state.strength

    @property
    def guided(self) -> Tensor:
        """Indices of the rows that have a guide."""
        return self.state.guided

    def close(self) -> None:
        """Take the edits out of the models."""
        for branches in (self.branches, self.other):
            if branches is not None:
                branches.close()
        self.leave()

    def first(self, batch: Batch, guide_batch: Batch | None = None) -> Tensor:
        """Read the prompts. guide_batch: the prompts as the guide reads them, where it reads others."""
        self.state, a, b = self._read(batch, guide_batch)
        self.replied = [0] * len(batch.input_ids)
        return self._mix(a, b, self.state)

    def next(self, tokens: Tensor, *, normalised: bool = True) -> Tensor:
        """Append a token to each row. Not normalised: scores that rank the tokens alike, for less work."""
        state = self.state
        assert state.rows is not None
        self.replied = [n + 1 for n in self.replied]
        if self.guidance is not None and self.guidance.tokens is not None and len(state.guided):
            limit = self.guidance.tokens
            within = [n for n in state.guided.tolist() if self.replied[n] < limit]
            if len(within) < len(state.guided):
                self._unguide(torch.tensor(within, dtype=torch.long, device=state.guided.device))
        logits = self.branches.extend(state.rows, tokens.unsqueeze(1))[:, -1]
        a, b = logits[: len(tokens)], logits[len(tokens) :]
        if self.other is not None and state.other is not None and len(state.guided):
            b = self.other.extend(state.other, tokens[state.guided].unsqueeze(1))[:, -1]
        return self._mix(a, b, state, normalised)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (indices into the current ones)."""
        state = self.state
        assert state.rows is not None
        has = torch.isin(rows, state.guided)
        if self.other is not None and state.other is not None:
            self.other.keep(state.other, torch.searchsorted(state.guided, rows[has]))
        self.branches.keep(state.rows, rows)
        state.strength, state.guided = state.strength[rows], has.nonzero().flatten()
        self.replied = [self.replied[row] for row in rows.tolist()]

    @property
    def can_join(self) -> bool:
        """Whether rows can join those that are under way."""
        caches = [rows.cache for rows in (self.state.rows, self.state.other) if rows is not None]
        return all(cache.movable for cache in caches)

    def join(self, batch: Batch, guide_batch: Batch | None = None) -> Tensor:
        """Read more prompts, whose rows come after the current ones; their log-probabilities `[new rows, vocab]`."""
        state = self.state
        more, a, b = self._read(batch, guide_batch)
        assert state.rows is not None and more.rows is not None
        mine, new = len(state.strength), len(more.strength)
        self.branches.join(state.rows, more.rows, torch.arange(mine + new, device=state.guided.device))
        if self.other is not None and more.other is not None:
            if state.other is None or not len(state.guided):
                state.other = more.other
            else:
                every = torch.arange(len(state.guided) + len(more.guided), device=state.guided.device)
                self.other.join(state.other, more.other, every)
        state.strength = torch.cat([state.strength, more.strength])
        state.guided = torch.cat([state.guided, mine + more.guided])
        self.replied += [0] * new
        return self._mix(a, b, more)

    def level(self) -> Tensor:
        """What was taken from the latest logits to make them log-probabilities, float32 `[rows, 1]`."""
        return self.logits.logsumexp(dim=-1, keepdim=True)

    def _read(self, batch: Batch, guide_batch: Batch | None) -> tuple[_State, Tensor, Tensor]:
        """Fresh rows with the prompts read, and what follows by the model's and by the guide's logits."""
        ids, device = batch.input_ids, batch.input_ids.device
        none, every = torch.empty(0, dtype=torch.long, device=device), torch.arange(len(ids), device=device)
        strength = torch.ones(len(ids), device=device)
        below = every if self.shared else none
        if self.gate is None:
            rows, logits = self.branches.prefill(
                batch, strength if self.alignment is not None else None, below, guide_batch if len(below) else None
            )
            a, b = logits[: len(ids)], logits[len(ids) :]
        else:
            with last_states(self.model, self.gate.layers) as states:
                rows, a = self.branches.prefill(batch, None, none)
            strength, b = self.gate.strength(torch.stack(states, 1)).to(device), a[:0]
            opened = strength.nonzero().flatten()
            if len(opened) and (self.edited or self.shared):
                rows, a, b = self._again(batch, guide_batch, rows, a, strength, opened)
        guided = strength.nonzero().flatten() if self.guidance is not None else none
        state = _State(rows, None, strength, guided)
        if self.other is not None and len(guided):
            state.other, b = self.other.prefill(
                _part(guide_batch or batch, guided), torch.ones(len(guided), device=device), none
            )
        return state, a, b

    def _again(
        self, batch: Batch, guide_batch: Batch | None, rows: Rows, a: Tensor, strength: Tensor, opened: Tensor
    ) -> tuple[Rows, Tensor, Tensor]:
        """The rows that the gate opened for start once more, with edits and guide; the others are as they were."""
        n, whole = len(strength), len(opened) == len(strength) or not rows.cache.movable
        chosen = torch.arange(n, device=opened.device) if whole else opened
        guided = torch.isin(chosen, opened).nonzero().flatten() if self.shared else opened[:0]
        theirs = _part(guide_batch, opened) if guide_batch is not None and self.shared else None
        again, logits = self.branches.prefill(_part(batch, chosen), strength[chosen], guided, theirs)
        a = a.clone()
        a[chosen], b = logits[: len(chosen)], logits[len(chosen) :]
        if whole:
            return again, a, b
        closed = (strength == 0).nonzero().flatten()
        self.branches.keep(rows, closed)
        self.branches.join(rows, again, torch.cat([closed, opened]).argsort())
        return rows, a, b

    def _unguide(self, left: Tensor) -> None:
        """Go on with guides for these rows only."""
        state = self.state
        assert state.rows is not None
        if self.other is not None and state.other is not None:
            self.other.keep(state.other, torch.searchsorted(state.guided, left))
        if self.shared:
            self.branches.keep(state.rows, torch.arange(len(state.strength), device=left.device), left)
        state.guided = left

    def _mix(self, a: Tensor, b: Tensor, state: _State, normalised: bool = True) -> Tensor:
        self.logits, guided = a, state.guided
        if self.guidance is None or not len(guided):
            return torch.log_softmax(a, dim=-1) if normalised else a
        width = min(a.shape[-1], b.shape[-1])  # padded embeddings may differ; the token maps do not
        lam = (self.guidance.lam * state.strength[guided].abs()).unsqueeze(-1)
        scores = torch.log_softmax(a, dim=-1)[:, :width] if normalised else a[:, :width]
        rule = union if normalised else union_order
        left, right = a[:, :width], b[:, :width].to(a.device)
        if normalised:
            left, right = torch.log_softmax(left, dim=-1), torch.log_softmax(right, dim=-1)
        if len(guided) == len(a):
            return rule(left, right, lam)
        scores = scores.clone()
        scores[guided] = rule(left[guided], right, lam)
        return scores


@dataclass
class _State:
    """The rows under way, and those of a guide with passes of its own."""

    rows: Rows | None = None
    other: Rows | None = None
    strength: Tensor = field(default_factory=lambda: torch.empty(0))
    guided: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


_decoding: weakref.WeakKeyDictionary[nn.Module, list[tuple[int, bool]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _enter(model: nn.Module, *, writes: bool) -> Callable[[], None]:
    """Tell that this thread decodes with `model`, and whether it writes into its weights; what is returned ends that.

    Edits by hooks act in the passes of their own thread only; weights are everybody's. Raises UsageError where one
    thread would change what another decodes with.
    """
    entry = (threading.get_ident(), writes)  # told from its equals by being itself
    with _lock:
        others = _decoding.setdefault(model, [])
        if any(thread != entry[0] and (writes or wrote) for thread, wrote in others):
            raise UsageError(
                "another thread is decoding with this model, and one of the two patches its weights: "
                "wait for it, or load the model twice."
            )
        others.append(entry)

    def leave() -> None:
        with _lock:
            others[:] = [other for other in others if other is not entry]

    return leave


def _part(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, without the columns that none of them needs."""
    mask = batch.attention_mask[rows]
    first = int(mask.any(0).int().argmax())
    return Batch(batch.input_ids[rows][:, first:], mask[:, first:], [batch.prompt_lengths[i] for i in rows.tolist()])
