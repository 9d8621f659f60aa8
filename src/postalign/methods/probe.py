"""A linear probe that tells harmful from harmless prompts by one block's state, and its threshold.

Knows states and labels; knows no model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import UsageError


def fit_probe(states: Tensor, harmful: Tensor, l2: float = 1.0) -> tuple[Tensor, float]:
    """Logistic regression with an L2 penalty on standardised states; classes weigh the same.

    states: `[n, hidden]`; harmful: bool `[n]`. Returns (weight float32 `[hidden]`, bias) on the *raw* states.
    """
    if not bool(harmful.any()) or bool(harmful.all()):
        raise UsageError(
            "the gate needs both harmful and benign prompts in the fit split: add the class that is missing."
        )
    x, y = states.double(), harmful.double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / scale
    weights = torch.where(harmful, 0.5 / y.sum(), 0.5 / (1 - y).sum()) * len(y)
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        losses = nn.functional.binary_cross_entropy_with_logits(logits, y, weight=weights, reduction="sum")
        loss = losses + 0.5 * l2 * parameters[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    weight = parameters.detach()[:-1] / scale
    return weight.float(), float(parameters.detach()[-1] - weight @ mean)


def threshold_at(benign_scores: Tensor, false_positive: float) -> float:
    """The threshold at which at most this share of benign scores is at or above it, with as many passing as may.

    benign_scores: float32 `[n]`; rows that tie pass together or not at all. Midway between the lowest score that passes
    and the next lower one, so that no row of the calibration set sits on the edge; 1 above the highest score where none
    may pass. Raises UsageError for a share outside [0, 1) and without scores.
    """
    if not 0 <= false_positive < 1:
        raise UsageError(f"gate_false_positive={false_positive} is outside [0, 1): 0.03 is the default.")
    if not benign_scores.numel():
        raise UsageError("the gate's threshold needs benign prompts in the tune split: add some.")
    ranked = benign_scores.float().sort(descending=True).values
    allowed = min(math.floor(false_positive * len(ranked) + 1e-9), len(ranked) - 1)
    below = ranked[allowed]  # must not pass, nor any row that ties with it
    passing = ranked[ranked > below]
    above = passing[-1] if len(passing) else below + (below.abs() * 1e-6).clamp(min=1)
    middle = (below + above) / 2 if len(passing) else above
    return float(middle if middle > below else above)  # of two neighbouring floats the upper one


def auc(harmful_scores: Tensor, benign_scores: Tensor) -> float:
    """Probability that a harmful prompt scores above a benign one (ties count half)."""
    difference = harmful_scores.reshape(-1, 1) - benign_scores.reshape(1, -1)
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())
