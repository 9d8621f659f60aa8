"""A vector added to the residual stream at one block's output (SafeInfer, arXiv 2406.12274, equation 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PostalignError, UsageError
from ..models.anatomy import anatomy, block_output, with_block_output
from .edit import Control, State, edit_kind

SCOPES = ("prompt", "last", "generation", "all")
DEFAULT_SCOPE = ("last", "generation")


@edit_kind("hidden")
@dataclass(frozen=True, eq=False)
class HiddenEdit:
    """`h <- h + strength * row strength * vector` at the output of block `layer`.

    vector: float32 `[hidden]`. layer: 0-based block; its *output* is changed. strength: gamma of the paper.
    scope: which tokens, any of `prompt` (all of it), `last` (its last token), `generation`, `all`;
        the default, last prompt token and generated ones, is what the published code does (for its first row).
    """

    vector: Tensor
    layer: int
    strength: float
    scope: tuple[str, ...] = DEFAULT_SCOPE
    kind: str = "hidden"

    def __post_init__(self) -> None:
        unknown = [word for word in self.scope if word not in SCOPES]
        if unknown or not self.scope:
            raise UsageError(f"token scope {unknown or 'nothing'} is not known: use any of {', '.join(SCOPES)}.")

    def at(self, *, layer: int | None = None, strength: float | None = None) -> HiddenEdit:
        """The same vector elsewhere or with another strength."""
        return replace(
            self,
            layer=self.layer if layer is None else layer,
            strength=self.strength if strength is None else strength,
        )

    def check(self, model: nn.Module) -> None:
        body = anatomy(model)
        if not 0 <= self.layer < body.n_layers:
            raise UsageError(
                f"layer {self.layer} is out of range: the model has blocks 0 to {body.n_layers - 1}; "
                "choose one of them."
            )
        if self.vector.shape != (body.hidden_size,):
            raise PostalignError(
                f"the vector has {tuple(self.vector.shape)} numbers and the model's hidden size is {body.hidden_size}: "
                "it was fitted on another model; fit it again on this one."
            )

    def attach(self, model: nn.Module, control: Control) -> list[RemovableHandle]:
        self.check(model)

        def add(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = block_output(output)
            coefficients = control.coefficients(self.scope, hidden.shape[0], hidden.shape[1], hidden.device)
            if coefficients is None:
                return output
            push = (self.strength * self.vector).to(hidden.device, hidden.dtype)
            return with_block_output(output, hidden + coefficients.to(hidden.dtype).unsqueeze(-1) * push)

        return [anatomy(model).blocks[self.layer].register_forward_hook(add)]

    def state(self) -> State:
        settings = {
            "kind": "hidden",
            "layer": self.layer,
            "strength": self.strength,
            "scope": list(self.scope),
        }
        return settings, {"vector": self.vector}

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HiddenEdit:
        return cls(tensors["vector"].float(), settings["layer"], settings["strength"], tuple(settings["scope"]))
