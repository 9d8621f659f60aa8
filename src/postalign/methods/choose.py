"""Choosing an alignment's settings on the tune split: steering strength, gate block and gate threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..data.records import Data
from ..edits import HiddenEdit, ProbeGate
from ..errors import UsageError
from ..models.capture import last_token_states
from ..models.chat import encode, eos_ids, pad_id
from .probe import auc, fit_probe, threshold_at
from .stages import Stages

Progress = Callable[[str, int, int], None]
TUNE_PROMPTS, TUNE_TOKENS = 32, 40


@torch.no_grad()
def choose_strength(
    model: nn.Module,
    tokenizer: Any,
    edit: HiddenEdit,
    layers: Sequence[int],
    strengths: Sequence[float],
    tune_rows: Data,
    judge: Callable[[str, str], str] | None,
    on_progress: Progress,
) -> tuple[HiddenEdit, list[dict[str, float]]]:
    """The layer and strength with the most intact refusals of harmful tune prompts; ties go to the weaker push.

    Each candidate answers the first 32 harmful tune prompts, taken evenly over the split, greedily in 40 tokens, and
    `judge` says what the replies are: refusals count for it, degenerate text counts against it. Returns the edit and
    every candidate's shares (refusal, degenerate).
    """
    rows = tune_rows.harmful
    if judge is None or not len(rows):
        raise UsageError(
            "strength is chosen by judged replies to harmful tune prompts: give both, or set strength=0.3."
        )
    step = max(1, len(rows) // TUNE_PROMPTS)
    prompts = [row.prompt for row in rows][::step][:TUNE_PROMPTS]
    tried: list[tuple[float, float, HiddenEdit]] = []
    report: list[dict[str, float]] = []
    total = len(layers) * len(strengths)
    for layer in layers:
        for strength in strengths:
            candidate = edit.at(layer=layer, strength=strength)
            with Alignment("", [candidate]).applied(model):
                replies = _greedy(model, tokenizer, prompts)
            verdicts = [judge(p, r) for p, r in zip(prompts, replies, strict=True)]
            refusal, broken = (sum(v == word for v in verdicts) / len(verdicts) for word in ("refusal", "degenerate"))
            tried.append((refusal - broken, -strength, candidate))
            report.append({"layer": layer, "strength": strength, "refusal": refusal, "degenerate": broken})
            on_progress("choosing strength", len(report), total)
    return max(tried, key=lambda item: item[:2])[2], report


def _greedy(model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    batch = encode(tokenizer, list(prompts), device=next(model.parameters()).device)
    output = model.generate(  # type: ignore[operator]
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=TUNE_TOKENS,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=sorted(eos_ids(model, tokenizer)),
    )
    return tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


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

    layer None: the block whose probe has the largest AUC there. Returns the gate and what
    was measured on the tune split (auc, recall, false-positive share).
    """
    rows = [*fit_rows, *tune_rows]
    known = [row for row in rows if row.label is not None]

    def states_of() -> dict[str, Tensor]:
        states = last_token_states(
            model,
            tokenizer,
            [row.prompt for row in known],
            on_progress=lambda i: on_progress("states for the gate", i, len(known)),
        )
        return {"states": states.half()}

    states = stages("states", key, states_of)["states"].float()
    harmful = torch.tensor([row.label == "harmful" for row in known])
    tuned = torch.tensor([row.split == "tune" for row in known])
    best: tuple[float, ProbeGate, dict[str, Any]] | None = None
    candidates = range(states.shape[1] // 4, states.shape[1]) if layer is None else [layer]
    for index in candidates:
        x = states[:, index]
        weight, bias = fit_probe(x[~tuned], harmful[~tuned], l2)
        scores = x[tuned] @ weight + bias
        bad, good = scores[harmful[tuned]], scores[~harmful[tuned]]
        gate = ProbeGate(weight, bias, index, threshold_at(good, false_positive))
        measured = {
            "layer": index,
            "auc": auc(bad, good),
            "recall": float((bad >= gate.threshold).float().mean()),
            "false_positive": float((good >= gate.threshold).float().mean()),
        }
        on_progress("fitting the gate", index, max(candidates))
        if best is None or measured["auc"] > best[0]:
            best = (measured["auc"], gate, measured)
    assert best is not None
    return best[1], best[2]
