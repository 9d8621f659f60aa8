"""Gates: one signed strength per row, read from states that the prompt's forward pass has made anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import PostalignError
from ..models.anatomy import anatomy
from .edit import State, edit_kind


@edit_kind("probe")
@dataclass(frozen=True, eq=False)
class ProbeGate:
    """A linear probe on the last prompt token's state at the output of block `layer`.

    weight: float32 `[hidden]`; bias: float; a row's score is `state . weight + bias` (the log-odds of harmful).
    threshold: rows at or above it are steered (strength 1), the others not (0).
    """

    weight: Tensor
    bias: float
    layer: int
    threshold: float
    kind: str = "probe"

    def scores(self, states: Tensor) -> Tensor:
        """states `[batch, hidden]` of block `layer` -> float32 `[batch]`."""
        return states.float() @ self.weight.to(states.device) + self.bias

    def strength(self, states: Tensor) -> Tensor:
        """1.0 for rows to be steered, 0.0 for the others: float32 `[batch]`."""
        return (self.scores(states) >= self.threshold).float()

    def check(self, model: nn.Module) -> None:
        body = anatomy(model)
        if not 0 <= self.layer < body.n_layers or self.weight.shape != (body.hidden_size,):
            raise PostalignError(
                "the gate was fitted on a model of another shape: fit the alignment again on this model."
            )

    def state(self) -> State:
        settings = {"kind": "probe", "layer": self.layer, "bias": self.bias, "threshold": self.threshold}
        return settings, {"weight": self.weight}

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ProbeGate:
        return cls(tensors["weight"].float(), settings["bias"], settings["layer"], settings["threshold"])
