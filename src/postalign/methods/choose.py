"""Choosing an alignment's settings on the tune split: block and strength of the push, gate block and gate threshold.

Knows edits, probes and how to try them; what a reply is worth is told by a judge that the caller brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..data.records import Data
from ..edits import HiddenEdit, ProbeGate
from ..models.capture import last_token_states
from .greedy import greedy
from .probe import auc, fit_probe, threshold_at
from .stages import Stages, read_texts, text_tensor

Progress = Callable[[str, int, int], None]
TUNE_PROMPTS, TUNE_TOKENS = 32, 40


def choose_strength(
    model: nn.Module,
    tokenizer: Any,
    edit: HiddenEdit,
    layers: Sequence[int],
    strengths: Sequence[float],
    tune_rows: Data,
    judge: Callable[[str, str], str],
    stages: Stages,
    key: dict[str, Any],
    on_progress: Progress,
) -> tuple[HiddenEdit, list[dict[str, float]]]:
    """The layer and strength with the most intact refusals of harmful tune prompts; ties go to the weaker push.

    Each candidate answers up to 32 harmful tune prompts, taken evenly over the split, greedily in 40 tokens, and
    `judge` says what the replies are: refusals count for it, degenerate text counts against it. key: what `edit` was
    made from; replies are kept in `stages`. Returns the edit and every candidate's shares (refusal, degenerate).
    """
    rows = tune_rows.harmful
    count = min(TUNE_PROMPTS, len(rows))
    prompts = [rows[i * len(rows) // count].prompt for i in range(count)]

    def answer(candidate: HiddenEdit) -> dict[str, Tensor]:
        with Alignment("", [candidate]).applied(model):
            return {"replies": text_tensor(greedy(model, tokenizer, prompts, TUNE_TOKENS))}

    tried: list[tuple[float, float, HiddenEdit]] = []
    report: list[dict[str, float]] = []
    for layer in layers:
        for strength in strengths:
            candidate = edit.at(layer=layer, strength=strength)
            asked = {**key, "layer": layer, "strength": strength}
            replies = read_texts(stages("replies", asked, partial(answer, candidate))["replies"])
            verdicts = [judge(p, r) for p, r in zip(prompts, replies, strict=True)]
            refusal, broken = (sum(v == word for v in verdicts) / len(verdicts) for word in ("refusal", "degenerate"))
            tried.append((refusal - broken, -strength, candidate))
            report.append({"layer": layer, "strength": strength, "refusal": refusal, "degenerate": broken})
            on_progress("choosing strength", len(report), len(layers) * len(strengths))
    return max(tried, key=lambda item: item[:2])[2], report


def fit_gate(
    model: nn.Module,
    tokenizer: Any,
    fit_rows: Data,
    tune_rows: Data,
    stages: Stages,
    key: dict[str, Any],
    on_progress: Progress,
    *,
    layer: int | None,
    false_positive: float,
    l2: float,
) -> tuple[ProbeGate, dict[str, Any]]:
    """A probe fitted on the fit split, with its threshold set on the harmless tune prompts to `false_positive`.

    layer None: the block above the lowest quarter whose probe has the largest AUC there, of equals the lowest. Returns
    the gate and what was measured on the tune split (auc, recall, false-positive share). Rows without a label are left
    out.
    """
    known = [row for row in [*fit_rows, *tune_rows] if row.label is not None]

    def read() -> dict[str, Tensor]:
        prompts = [row.prompt for row in known]

        def tell(_: str, done: int, total: int) -> None:
            on_progress("states for the gate", done, total)

        return {"states": last_token_states(model, tokenizer, prompts, on_progress=tell)}

    states = stages("states", key, read)["states"].float()
    harmful = torch.tensor([row.label == "harmful" for row in known])
    tuned = torch.tensor([row.split == "tune" for row in known])
    best: tuple[float, ProbeGate, dict[str, Any]] | None = None
    candidates = list(range(states.shape[1] // 4, states.shape[1])) if layer is None else [layer]
    for done, index in enumerate(candidates, start=1):
        x = states[:, index]
        weight, bias = fit_probe(x[~tuned], harmful[~tuned], l2)
        scores = x[tuned] @ weight + bias
        bad, good = scores[harmful[tuned]], scores[~harmful[tuned]]
        gate = ProbeGate(weight, bias, index, threshold_at(good, false_positive))
        measured = {
            "layer": index,
            "auc": auc(bad, good),
            "recall": float((bad >= gate.threshold).double().mean()),
            "false_positive": float((good >= gate.threshold).double().mean()),
        }
        on_progress("fitting the gate", done, len(candidates))
        if best is None or measured["auc"] > best[0]:
            best = (measured["auc"], gate, measured)
    assert best is not None
    return best[1], best[2]
