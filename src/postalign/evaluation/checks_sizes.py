"""Checks of an alignment's measures: a vector against the residual, a patch against the weights, a gate's openings.

Knows norms and counts; knows nothing of hooks or replies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..decoding.stream import Stream
from ..edits import Guidance, HiddenEdit, SparsePatch
from ..models.anatomy import anatomy
from ..models.capture import captured
from ..models.chat import encode
from .checks_edits import described
from .doctor import Case, Finding
from .dose import inputs_for

SMALL, LARGE, BROKEN = 0.01, 2.0, 10.0  # a vector's length, of the residual's norm
FAINT, HEAVY, CRUSHING = 1e-4, 0.2, 1.0  # a patch's norm, of that of the tensors that it touches


@torch.no_grad()
def size(case: Case) -> Iterator[Finding]:
    """A vector's length against the residual stream's at its block; a patch's norm against the weights'."""
    assert case.alignment is not None
    for edit in case.alignment.edits:
        parts = edit.guide.edits() if isinstance(edit, Guidance) else [edit]
        for part in parts:
            if isinstance(part, HiddenEdit):
                yield _against_residual(case, part)
            elif isinstance(part, SparsePatch):
                yield _against_weights(case, part)


def _against_residual(case: Case, edit: HiddenEdit) -> Finding:
    norms = []
    with captured([anatomy(case.model).blocks[edit.layer]], inputs=False) as states:
        for prompt in case.prompts:
            ids = encode(case.tokenizer, [prompt], device=next(case.model.parameters()).device).input_ids
            case.model(input_ids=ids, use_cache=False)
            norms.append(float(states[0].float().norm()))
    residual = sorted(norms)[len(norms) // 2]
    share = abs(edit.strength) * float(edit.vector.norm()) / residual
    said = f"{described(edit)}: {share:.3g} of the residual's norm ({residual:.3g}) at the last prompt token"
    if not share < LARGE:
        fitting = abs(edit.strength) / share
        said += f": it drowns the text, lower the strength (at {fitting:.2g} it would be as large)."
        return Finding("size", "fail" if not share < BROKEN else "warning", said)
    if share < SMALL:
        return Finding("size", "warning", f"{said}: hardly to be felt, raise the strength.")
    return Finding("size", "ok", said)


def _against_weights(case: Case, patch: SparsePatch) -> Finding:
    weights = {name: case.model.get_parameter(name) for name in patch.shapes}
    whole = sum(float(w.float().square().sum()) for w in weights.values())
    change = sum(float(patch.entries[name][1].float().square().sum()) for name in weights)
    count = sum(p.numel() for p in case.model.parameters())
    ratio = (change / whole) ** 0.5 if whole else float("inf")
    said = f"{described(patch)}: {patch.changed / count:.3%} of all, with {ratio:.2%} of the norm of what it touches"
    if not ratio < HEAVY:
        return Finding("size", "fail" if not ratio < CRUSHING else "warning", f"{said}: too much, lower alpha or beta.")
    if ratio < FAINT:
        return Finding("size", "warning", f"{said}: hardly to be felt, raise alpha.")
    return Finding("size", "ok", said)


@torch.no_grad()
def gate(case: Case) -> Iterator[Finding]:
    """For how many harmful and harmless prompts the gate opens."""
    assert case.alignment is not None
    probe = case.alignment.gate
    if probe is None:
        return
    opened = []
    for prompts in (case.harmful, case.harmless):
        with Stream(case.model, replace(case.alignment, edits=[])) as stream:
            stream.first(inputs_for(case, None, prompts)[0])
            opened.append(int((stream.strength != 0).sum()))
    counts = f"opens for {opened[0]} of {len(case.harmful)} harmful and {opened[1]} of {len(case.harmless)} harmless"
    if not opened[0]:
        yield Finding("gate", "warning", f"{counts} prompts: it guards nothing here, fit it on prompts like yours.")
    elif 2 * opened[1] > len(case.harmless):
        yield Finding("gate", "warning", f"{counts} prompts: it lets few through, fit it on prompts like yours.")
    else:
        yield Finding("gate", "ok", f"{counts} prompts")


CHECKS = [("size", size), ("gate", gate)]
