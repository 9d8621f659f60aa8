"""Guidance: mixing the model's next-token distribution with a guide's (SafeInfer, arXiv 2406.12274, equations 4-6).

The guide is a model that likes *unsafe* tokens; the union rule takes away from every token what the guide likes more
than the model does. Four kinds of guide stand behind one interface; none is ever run without being asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UsageError
from .edit import Control, Edit, State, edit_from_state, edit_kind, under_prefix, with_prefix
from .hidden import HiddenEdit
from .weights import LowRankPatch


def union(a: Tensor, b: Tensor, lam: float | Tensor) -> Tensor:
    """SafeInfer's rule on log-probabilities, in closed form and renormalised.

    `s = a - k * max(0, b - a)`, `k = lam / (1 - lam)`; equal to `log_softmax((a - lam * max(a, b)) / (1 - lam))`,
    which is what equation 6 is when it is evaluated on log-probabilities, without its cancellation.

    a, b: log-probabilities of the model and of the guide, `[..., vocab]`, computed in float32. lam in [0, 1): a number
    or a tensor that broadcasts, e.g. `[batch, 1]`. A token that `a` rules out (-inf) stays ruled out; one that only `b`
    rules out keeps `a`. Returns float32 log-probabilities.
    """
    a, b = a.float(), b.float()
    lam = torch.as_tensor(lam, dtype=torch.float32, device=a.device)
    if not bool(((lam >= 0) & (lam < 1)).all()):
        raise UsageError("lambda must be in [0, 1): 0 leaves the model alone, 0.99 is the published value.")
    penalty = lam / (1 - lam)
    excess = torch.where(torch.isneginf(a), torch.zeros_like(a), (b - a).clamp(min=0))
    scores = a - penalty * excess
    mixed = torch.log_softmax(scores, dim=-1)
    untouched = (penalty * excess == 0).all(dim=-1, keepdim=True)  # such rows stay bit-equal to `a`
    return torch.where(untouched, a, mixed)


def union_order(a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """Numbers that rank the tokens as `union` does, from the logits of the model and of the guide, `[rows, vocab]`.

    Not normalised, which is enough for the likeliest token. lam: float32 `[rows, 1]`, above 0 and below 1.
    """
    excess = b - a
    excess += a.logsumexp(-1, keepdim=True) - b.logsumexp(-1, keepdim=True)
    excess.clamp_(min=0).nan_to_num_(nan=0.0, posinf=torch.finfo(a.dtype).max)
    return torch.addcmul(a, excess, lam / (lam - 1))


class Guide(Protocol):
    """A second view of the model whose distribution guides the first. Costs are told in `cost`."""

    @property
    def kind(self) -> str: ...
    @property
    def cost(self) -> str: ...

    def edits(self) -> list[Edit]:
        """Edits that make the guide out of the model's own weights (none for a checkpoint or a prompt)."""
        ...

    def state(self) -> State: ...


@edit_kind("guide.adapter")
@dataclass(frozen=True, eq=False)
class AdapterGuide:
    """The same weights with a low-rank patch trained on harmful pairs."""

    patch: LowRankPatch
    kind: str = "guide.adapter"
    cost: str = "a second pass per token over the same weights; a second KV cache; the patch itself (a few MB)"

    def edits(self) -> list[Edit]:
        return [self.patch]

    def state(self) -> State:
        settings, tensors = self.patch.state()
        return {"kind": "guide.adapter", "patch": settings}, tensors

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterGuide:
        return cls(LowRankPatch.from_state(settings["patch"], tensors))


@edit_kind("guide.checkpoint")
@dataclass(eq=False)
class CheckpointGuide:
    """Another model with the same token-to-id map, by name or path. `model` holds it once decoding has loaded it."""

    name: str
    revision: str | None = None
    model: nn.Module | None = field(default=None, init=False, repr=False)
    kind: str = "guide.checkpoint"
    cost: str = "a second model in memory; a pass over it per token; a second KV cache"

    def edits(self) -> list[Edit]:
        return []

    def state(self) -> State:
        return {"kind": "guide.checkpoint", "name": self.name, "revision": self.revision}, {}

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CheckpointGuide:
        return cls(settings["name"], settings["revision"])


@edit_kind("guide.prompt")
@dataclass(frozen=True, eq=False)
class PromptGuide:
    """The same weights under another system prompt."""

    system: str
    kind: str = "guide.prompt"
    cost: str = (
        "a second pass per token over the same weights; a second, longer prompt and KV cache; nothing to train or keep"
    )

    def edits(self) -> list[Edit]:
        return []

    def state(self) -> State:
        return {"kind": "guide.prompt", "system": self.system}, {}

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PromptGuide:
        return cls(settings["system"])


@edit_kind("guide.vector")
@dataclass(frozen=True, eq=False)
class VectorGuide:
    """The same weights pushed the other way by a hidden edit of negative strength."""

    edit: HiddenEdit
    kind: str = "guide.vector"
    cost: str = "a second pass per token over the same weights; a second KV cache; nothing to train, one vector to keep"

    def edits(self) -> list[Edit]:
        return [self.edit]

    def state(self) -> State:
        settings, tensors = self.edit.state()
        return {"kind": "guide.vector", "edit": settings}, tensors

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VectorGuide:
        return cls(HiddenEdit.from_state(settings["edit"], tensors))


@edit_kind("guidance")
@dataclass(frozen=True, eq=False)
class Guidance:
    """`union(model, guide, lam)` at the first `tokens` generated tokens, or at all of them (None).

    `unsafe` marks a guide that must not be published.
    """

    guide: Guide
    lam: float
    unsafe: bool = True
    tokens: int | None = None
    kind: str = "guidance"

    def __post_init__(self) -> None:
        if not 0 <= self.lam < 1:
            raise UsageError(
                f"lambda {self.lam} is outside [0, 1): 0 switches guidance off, 0.99 is the published value."
            )
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"guidance of the first {self.tokens} tokens is none: choose 1 or more, or None for all.")

    def check(self, model: nn.Module) -> None:
        for edit in self.guide.edits():
            edit.check(model)

    def attach(self, model: nn.Module, control: Control) -> list[RemovableHandle]:
        raise UsageError(
            "guidance mixes two distributions, so hooks alone cannot apply it: use pa.generate(...) or "
            "custom_generate=alignment.custom_generate, or alignment.only('amplification')."
        )

    def state(self) -> State:
        guide, tensors = self.guide.state()
        settings = {
            "kind": "guidance",
            "lambda": self.lam,
            "unsafe": self.unsafe,
            "tokens": self.tokens,
            "guide": guide,
        }
        return settings, with_prefix("guide", tensors)

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Guidance:
        guide = edit_from_state(settings["guide"], under_prefix("guide", tensors))
        return cls(guide, settings["lambda"], settings["unsafe"], settings["tokens"])
