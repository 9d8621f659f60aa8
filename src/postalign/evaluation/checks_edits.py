"""Checks of an alignment's edits: do they fit, act once on what they are meant for, and come off without a trace.

Knows edits and what their doses should be; knows nothing of what comes of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..decoding.branches import shape_of
from ..decoding.stream import Stream
from ..edits import Control, Edit, Guidance, HiddenEdit, LowRankPatch, SparsePatch
from ..errors import PostalignError
from .doctor import Case, Finding
from .dose import Site, counted, inputs_for, sites_of

NEAR = 0.3  # of a dose: in bfloat16 a small push is rounded, and one too many is a whole one


def fits(case: Case) -> list[Finding]:
    """Whether there is anything to apply, and all of it fits the model."""
    alignment = case.alignment
    assert alignment is not None
    if not alignment.edits:
        return [Finding("edits", "warning", "the alignment holds no edit and changes nothing: fit one.")]
    found = []
    for edit in (*alignment.edits, *([alignment.gate] if alignment.gate is not None else [])):
        try:
            edit.check(case.model)
        except PostalignError as error:
            found.append(Finding("edits", "fail", f"{described(edit)}: {error}"))
    names = ", ".join(described(edit) for edit in alignment.edits)
    gate = "no gate" if alignment.gate is None else "a gate"
    return found or [Finding("edits", "ok", f"{names}; {gate}")]


def described(edit: Any) -> str:
    """An edit in a few words."""
    if isinstance(edit, HiddenEdit):
        return f"vector at block {edit.layer}, strength {edit.strength:g}"
    if isinstance(edit, Guidance):
        at = "every token" if edit.tokens is None else f"the first {edit.tokens}"
        return f"guidance by {edit.guide.kind.removeprefix('guide.')}, lambda {edit.lam:g}, at {at}"
    if isinstance(edit, LowRankPatch):
        return f"low-rank patch of {len(edit.factors)} modules"
    if isinstance(edit, SparsePatch):
        return f"patch of {edit.changed} weights"
    return str(getattr(edit, "kind", type(edit).__name__))


def fires(case: Case) -> Iterator[Finding]:
    """Each edit acts once per token and row that it is meant for, and nowhere else."""
    assert case.alignment is not None
    for edit in case.alignment.edits:
        if isinstance(edit, SparsePatch):
            yield _written(case, edit)
        elif isinstance(edit, Guidance):
            if edit.lam == 0:
                yield Finding("acts", "warning", f"{described(edit)}: lambda 0 switches it off; choose 0.99.")
            elif edit.guide.edits():  # other guides add nothing anywhere: what they cost shows that they are asked
                yield _hooked(case, edit, edit.guide.edits(), guide=True)
        else:
            yield _hooked(case, edit, [edit], guide=False)


def _hooked(case: Case, edit: Edit, parts: Sequence[Edit], *, guide: bool) -> Finding:
    name, apart = described(edit), shape_of(case.model).apart
    sites = [site for part in parts for site in sites_of(part, case.model)]
    if not sites:
        said = f"{name}: it adds nothing (its strength or patch is zero): raise it or leave it out."
        return Finding("acts", "warning", said)
    hidden_rows = {id(case.model.get_submodule(module)) for module in apart}
    told = [site for site in sites if id(site.module) not in hidden_rows]
    right, wrong = 0, []
    for where, found, wanted in counted(case, _alone(case, edit, sites), told, guide=guide) if told else ():
        off = (found - wanted).abs() > NEAR
        right += int(((wanted != 0) & ~off).sum())
        wrong += [(where, float(found[i]), float(wanted[i])) for i in off.nonzero().flatten().tolist()]
    if wrong:
        where, found, wanted = wrong[0]
        said = f"{name}: {where} it acts {found:.2f} times in place of {wanted:g}"
        said += f" ({len(wrong)} wrong, {right} right): load the model anew and try again, else fit again."
        return Finding("acts", "fail", said)
    if not right:
        why = "its modules see tokens without their rows" if not told else "the gate opened for no prompt tried"
        return Finding(
            "acts", "warning", f"{name}: not seen acting, {why}: compare with and without by postalign eval."
        )
    return Finding("acts", "ok", f"{name}: once per token and row that it is meant for, {right} times counted")


def _alone(case: Case, edit: Edit, sites: Sequence[Site]) -> Alignment:
    """The alignment without the other edits at these modules, of which a dose could not be told from this one's."""
    assert case.alignment is not None
    here = {id(site.module) for site in sites}

    def apart(other: Any) -> bool:
        parts = other.guide.edits() if isinstance(other, Guidance) else [other]
        return all(id(site.module) not in here for part in parts for site in sites_of(part, case.model))

    return replace(case.alignment, edits=[one for one in case.alignment.edits if one is edit or apart(one)])


def _written(case: Case, patch: SparsePatch) -> Finding:
    """A patch of the weights: every listed weight changes by its value, and no other byte does."""
    weights = {name: case.model.get_parameter(name) for name in patch.shapes}
    before = {name: _checksum(weight, patch.entries[name][0]) for name, weight in weights.items()}
    wanted = {name: _listed(patch, name, patch.merge(name, weight)) for name, weight in weights.items()}
    moved = sum(int((_listed(patch, n, w) != wanted[n]).sum()) for n, w in weights.items())
    handles = patch.attach(case.model, Control())
    try:
        right = all(torch.equal(_listed(patch, name, weight), wanted[name]) for name, weight in weights.items())
        rest = all(_checksum(weight, patch.entries[name][0]) == before[name] for name, weight in weights.items())
    finally:
        for handle in reversed(handles):
            handle.remove()
    if not right or not rest:
        what = "the listed weights do not become what they should" if not right else "other weights change too"
        return Finding("acts", "fail", f"{described(patch)}: {what}: load the model anew, or fit again.")
    if moved < patch.changed:
        said = f"{patch.changed - moved} of these values are lost in {case.model.dtype}: load in float32."
        return Finding("acts", "warning", f"{described(patch)}: {said}")
    return Finding("acts", "ok", f"{described(patch)}: each by its value, no other byte")


def _listed(patch: SparsePatch, name: str, weight: Tensor) -> Tensor:
    """The weights that the patch lists, on the CPU."""
    return weight.detach().reshape(-1)[patch.entries[name][0].long().to(weight.device)].cpu()


def _checksum(weight: Tensor, without: Tensor) -> int:
    """A checksum of the tensor's bytes, its entries `without` left out."""
    flat = weight.detach().reshape(-1).clone()
    flat[without.long().to(flat.device)] = 0
    return zlib.crc32(flat.cpu().view(torch.uint8).numpy().data)


@torch.no_grad()
def undone(case: Case) -> Iterator[Finding]:
    """Strength 0 is the base model to the bit, and so is the model when the edits have been taken off."""
    alignment, model = case.alignment, case.model
    assert alignment is not None
    live = _hooks(model)
    before, sums = _run(case, None), _weights(alignment, model)
    edits = [_zero(edit) for edit in alignment.edits if not isinstance(edit, SparsePatch)]
    if edits:
        nothing = replace(alignment, gate=None, edits=edits)  # on all rows: a gate would cut the batch in two
        if all(torch.equal(a, b) for a, b in zip(before, _run(case, nothing), strict=True)):
            yield Finding("strength 0", "ok", "equals the base model to the bit")
        else:
            said = "differs from the base model: an edit acts whatever its strength; fit again, or report a bug."
            yield Finding("strength 0", "fail", said)
    _run(case, alignment)
    left = _hooks(model) - live
    same = _weights(alignment, model) == sums
    if left or not same or not all(torch.equal(a, b) for a, b in zip(before, _run(case, None), strict=True)):
        what = f"{left} hooks stay" if left else "weights stay changed" if not same else "the logits stay changed"
        yield Finding("taking off", "fail", f"{what} after the edits came off: load the model anew, and report a bug.")
    else:
        yield Finding("taking off", "ok", "leaves the base model to the bit")


def _zero(edit: Any) -> Any:
    if isinstance(edit, HiddenEdit):
        return edit.at(strength=0.0)
    return replace(edit, lam=0.0) if isinstance(edit, Guidance) else replace(edit, scale=0.0)


def _run(case: Case, alignment: Alignment | None) -> list[Tensor]:
    """Two steps of decoding: log-probabilities `[rows, vocab]`."""
    batch, theirs = inputs_for(case, alignment, case.prompts[:2])
    with Stream(case.model, alignment, case.guide if alignment is not None else None) as stream:
        first = stream.first(batch, theirs)
        return [first, stream.next(torch.full((len(first),), int(batch.input_ids[0, -1]), device=first.device))]


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _weights(alignment: Alignment, model: nn.Module) -> list[int]:
    names = sorted({name for patch in alignment.weights for name in patch.shapes})
    return [_checksum(model.get_parameter(name), torch.zeros(0)) for name in names]


CHECKS = [("acts", fires), ("strength 0", undone)]
