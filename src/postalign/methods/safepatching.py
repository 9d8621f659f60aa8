"""SafePatching (arXiv 2405.13820): two patches from one harmful set, merged where they do not disagree.

Patch derivation: on harmful pairs, gradient ascent leads to the safety patch and gradient descent to the over-safety
patch (eq. 1-3); of each a random share p is retained (eq. 4). Controllable patching: SNIP says which weights matter
to each patched model (eq. 5, 6); of its top a (top b) weights each patch keeps those that the other's lack (eq. 7);
what is left is added to the weights, times alpha and beta (eq. 8).

The paper's values for p, a, b, alpha, beta and the training, and several of its choices, are not known to us: each is
a setting here, its default ours. Knows the order of the steps; each step is in a file of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..alignment import TENSORS_NAME, Alignment, fingerprint
from ..data.records import Data
from ..edits import Control, SparsePatch
from ..edits.edit import attach_all, under_prefix, with_prefix
from ..errors import UsageError
from ..models.shards import ModelWeights, Weights
from .merging import elected_mean
from .patch_derivation import Derivation
from .patch_maker import PatchMaker
from .safepatching_config import BASELINES as BASELINES
from .safepatching_config import KINDS, Combine, SafePatchingConfig
from .safepatching_config import read_config as read_config
from .sparsify import CHUNK, TopShare, retain
from .tune_effect import cost, tune_effect, tune_prompts, verdicts_on

Progress = Callable[[str, int, int], None]
OVER_SAFETY = "over_safety_patch"  # prefix of the arrays in which it is kept


def fit(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    config: SafePatchingConfig,
    *,
    judge: Callable[[str, str], str] | None,
    on_progress: Progress,
    workdir: str | Path | None,
) -> Alignment:
    """Fit SafePatching: an Alignment with one sparse patch (and ahead of it those of the alignment `after`).

    Needs harmful prompts in the fit split. judge: (prompt, reply) -> verdict; with one, pairs that are made here are
    those that it calls compliance, alpha and beta may be chosen, and the effect on the tune split is measured. workdir:
    keeps both patches and their scores, while fitting and after it; the over-safety patch stands in `unsafe-...` and is
    a jailbreak: keep it to yourself. Raises UsageError, before the work, for data that will not do.
    """
    before = _earlier(config.after)
    fit_rows = data.filter(
        lambda row: row.split in (None, "fit") and (row.label != "harmful" or _chosen(row.category, config))
    )
    _require_rows(fit_rows, config)
    tune = data.split("tune")
    if len(config.candidates) > 1 and (judge is None or not len(tune.harmful) or not len(tune.benign)):
        raise UsageError(
            "choosing alpha and beta needs a judge, and tune prompts both harmful and harmless: "
            "add some, use --data starter, or set one number each (alpha=2, beta=1)."
        )
    base = fingerprint(model, tokenizer)
    key = [__version__, base, data.hash, _digest(config.after), judge is not None]
    with contextlib.ExitStack() as stack:
        place = Path(workdir or stack.enter_context(tempfile.TemporaryDirectory(prefix="postalign-")))
        if before is not None:  # this patch is made on what the earlier ones left
            before.check(model, tokenizer)
            for handle in attach_all(before.edits, model, Control()):
                stack.callback(handle.remove)
        derived = Derivation(model, tokenizer, fit_rows, config, place, key, on_progress, judge)

        # patch derivation: equations 1 to 3, and the importance of equations 5 and 6
        patches: dict[str, tuple[Weights, Weights]] = {}
        training: dict[str, Any] = {}
        for kind in config.kinds:
            patch, told = derived.patch(kind)
            training |= {f"{kind}_{word}": figure for word, figure in told.items()}
            patches[kind] = patch, derived.scores(kind, patch)

        # controllable patching: equations 4, 7 and 8
        config, tried = _chosen_weights(model, tokenizer, data, patches, config, judge, on_progress)
        made, kept, sizes = controllable_patching(ModelWeights(model), patches, config, on_progress)
        derived.config = config
        ends: list[Weights] = []  # what each part of the refinement, which is beyond the paper, comes to
        for part in range(config.parts):
            delta, told = derived.refined(made.patch(), part)
            training |= {f"refined_{word}": figure for word, figure in told.items()}
            ends.append(delta)
            made = _remade(ModelWeights(model), [delta], made)
        if ends:
            made = _remade(ModelWeights(model), ends[-config.refine_last :], made, config.refine_scale)
    jailbreak = config.combine == "over_safety" and config.over_safety == "harmful" and config.merge_weights[1] > 0
    edit = replace(made.patch(), unsafe=jailbreak or kept is not None)
    counts = made.counts
    info = {
        "training": training,
        **({"tried": tried} if tried else {}),
        "patch": {**vars(counts), "share": counts.changed / max(1, counts.weights), "bytes": edit.bytes, **sizes},
    }
    alignment = Alignment(
        method="safepatching",
        edits=[*(before.edits if before else ()), edit],
        config=config.model_dump(),
        base=base,
        provenance={
            "data": {"name": data.name, "hash": data.hash, "fit": len(fit_rows), "tune": len(data.split("tune"))},
            "versions": {"postalign": __version__, "torch": torch.__version__},
            "paper": "arXiv 2405.13820",
            "after": {"provenance": before.provenance, "config": before.config} if before else None,
        },
        info=info,
        arrays=dict(with_prefix(OVER_SAFETY, kept.patch().state()[1])) if kept else {},
    )
    if judge is not None and config.effect_prompts:
        tune_rows = data.split("tune")
        info["effect"] = tune_effect(
            model, tokenizer, before, alignment, tune_rows, judge, config.effect_prompts, on_progress
        )
    return alignment


def _chosen_weights(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    patches: Mapping[str, tuple[Weights, Weights]],
    config: SafePatchingConfig,
    judge: Callable[[str, str], str] | None,
    on_progress: Progress,
) -> tuple[SafePatchingConfig, list[dict[str, float]]]:
    """The config with the alpha and beta, of those given, that cost least on tune prompts; and what each came to."""
    candidates, tried = config.candidates, []
    if len(candidates) == 1:
        return candidates[0], []
    assert judge is not None  # told before the work
    rows = tune_prompts(data.split("tune"), config.choice_prompts)
    for done, one in enumerate(candidates):
        made, _, _ = controllable_patching(ModelWeights(model), patches, one)
        handles = attach_all([made.patch()], model, Control())
        try:
            verdicts = verdicts_on(model, tokenizer, rows, judge, lambda _: None)
        finally:
            for handle in handles:
                handle.remove()
        tried.append({"alpha": one.alpha, "beta": one.beta, **cost(rows, verdicts)})
        on_progress("choosing alpha and beta", done + 1, len(candidates))
    best = min(range(len(tried)), key=lambda i: tried[i]["cost"])  # of equals the first
    return candidates[best], tried


def controllable_patching(
    base: Weights,
    patches: Mapping[str, tuple[Weights, Weights]],
    config: SafePatchingConfig,
    on_progress: Progress = lambda *_: None,
    folder: Path | None = None,
) -> tuple[PatchMaker, PatchMaker | None, dict[str, int]]:
    """Equations 4, 7 and 8, tensor by tensor: the patch of `base`, the over-safety patch if it is to be kept, and the
    sizes of the top sets and of what they share (`S_SE`, `S_OSM`, `both`).

    patches: kind (`safety`, `over_safety`) -> (patch, importance), both Weights under the base's names; a kind that is
    not there is an empty patch. In memory are one tensor of each and the patch that comes out; with `folder` that is on
    disk, and the model may be of any size.
    """
    shares = {"safety": config.a, "over_safety": config.b}
    there = {name for patch, _ in patches.values() for name in patch.names()}
    names = sorted(there.intersection(base.names()))  # of equal scores the first names win, whatever the shards
    top = {kind: TopShare(scores, names, shares[kind], config.scope) for kind, (_, scores) in patches.items()}
    values = None if config.values == "auto" else getattr(torch, config.values)
    made = PatchMaker(values, folder and folder / "made")
    kept = PatchMaker(values, folder and folder / "unsafe-over-safety")
    sizes = {"S_SE": 0, "S_OSM": 0, "both": 0}
    for done, name in enumerate(names, start=1):
        W = base.get(name)
        nothing = torch.zeros((), dtype=torch.bool).expand(W.shape)
        S_SE, S_OSM = (top[kind].mask(name) if kind in top else nothing for kind in KINDS)
        for word, found in (("S_SE", S_SE), ("S_OSM", S_OSM), ("both", S_SE & S_OSM)):
            sizes[word] += int(found.count_nonzero())
        D_SE, D_OSM = kept_sets(S_SE, S_OSM, config.combine)
        del S_SE, S_OSM
        P_SE, P_OSM = (patches[kind][0].get(name) if kind in patches else nothing for kind in KINDS)
        made.add(name, W, merged_pieces(name, P_SE, D_SE, P_OSM, D_OSM, config))
        if config.keep_over_safety and "over_safety" in patches:
            kept.add(name, W, (piece.float() for piece in P_OSM.reshape(-1).split(CHUNK)))
        on_progress("merging the patches", done, len(names))
    return made, kept if kept.entries else None, sizes


def _remade(base: Weights, deltas: Sequence[Weights], made: PatchMaker, scale: float = 1.0) -> PatchMaker:
    """The patch of `scale` times the mean of these differences, among the weights that `made` has looked at."""
    new = PatchMaker(made.values)
    for name in deltas[-1].names():  # a part changes no weights but those of the one before
        mean = sum(delta.get(name).float() for delta in deltas) * (scale / len(deltas))
        new.add(name, base.get(name), torch.as_tensor(mean).reshape(-1).split(CHUNK))
    new.counts.weights = made.counts.weights
    return new


def kept_sets(S_SE: Tensor, S_OSM: Tensor, combine: Combine) -> tuple[Tensor, Tensor]:
    """D_SE and D_OSM (equation 7): where each patch is kept, given the two top sets (the one not in use is empty)."""
    if combine == "difference":
        return S_SE & ~S_OSM, S_OSM & ~S_SE
    if combine == "intersection":
        both = S_SE & S_OSM
        return both, both
    return S_SE, S_OSM


def merged_pieces(
    name: str, P_SE: Tensor, D_SE: Tensor, P_OSM: Tensor, D_OSM: Tensor, config: SafePatchingConfig
) -> Iterator[Tensor]:
    """`alpha (m * P_SE)[D_SE] + beta (m' * P_OSM)[D_OSM]` (equations 4 and 8), the flat tensor's in pieces, float32."""
    alpha, beta = config.merge_weights
    flat = [tensor.reshape(-1).split(CHUNK) for tensor in (P_SE, D_SE, P_OSM, D_OSM)]
    for i, (p_se, d_se, p_osm, d_osm) in enumerate(zip(*flat, strict=True)):
        se = torch.where(d_se, _retained(p_se, "safety", name, i * CHUNK, config), 0.0)
        osm = torch.where(d_osm, _retained(p_osm, "over_safety", name, i * CHUNK, config), 0.0)
        if config.combine == "ties":  # a and b are the shares that it trims to
            yield elected_mean((se, osm), (alpha, beta))
        else:
            yield alpha * se + beta * osm


def _retained(P: Tensor, kind: str, name: str, begin: int, config: SafePatchingConfig) -> Tensor:
    """m * P (equation 4); each kind of patch has a mask of its own."""
    return retain(P.float(), config.p, f"{config.seed}/{kind}", name, rescale=config.rescale, begin=begin)


def over_safety_patch(alignment: Alignment) -> SparsePatch:
    """The over-safety patch of a fit with `keep_over_safety`: whole, without retention. It is a jailbreak."""
    tensors = under_prefix(OVER_SAFETY, alignment.arrays)
    if not tensors:
        raise UsageError("the alignment holds no over-safety patch: fit with keep_over_safety=true to study it.")
    shapes = {name: shape for patch in alignment.weights for name, shape in patch.shapes.items()}
    return SparsePatch.from_state({"shapes": shapes, "unsafe": True}, tensors)


def _earlier(folder: str | None) -> Alignment | None:
    if folder is None:
        return None
    earlier = Alignment.from_pretrained(folder)
    if earlier.gate is not None or not all(isinstance(edit, SparsePatch) for edit in earlier.edits):
        raise UsageError(f"after={folder} holds more than patches of weights: name an alignment of safepatching.")
    return earlier


def _digest(folder: str | None) -> str | None:
    return None if folder is None else hashlib.sha256((Path(folder) / TENSORS_NAME).read_bytes()).hexdigest()


def _chosen(category: str | None, config: SafePatchingConfig) -> bool:
    return config.categories is None or category in config.categories


def _require_rows(rows: Data, config: SafePatchingConfig) -> None:
    missing = ""
    if config.categories:
        lacking = [name for name in config.categories if not any(row.category == name for row in rows.harmful)]
        missing = f"no harmful prompt of the fit split has the category {lacking[0]!r}: name others" if lacking else ""
    if not missing and not len(rows.harmful):
        missing = "safepatching needs harmful prompts in the fit split: add them with --harmful"
    refusing = "safety" in config.kinds and (config.safety == "refusal" or config.refusal_weight)
    refusing = refusing or config.refine_steps > 0
    if not missing and refusing and not any(row.response for row in rows.harmful):
        missing = "refusals are wanted, and no harmful prompt of the fit split has a response: add some"
    answering = "over_safety" in config.kinds and config.over_safety == "benign"
    if (
        not missing
        and (answering or config.safety_kl_weight or config.over_safety_kl_weight or config.benign_weight)
        and not len(rows.benign)
    ):
        missing = "harmless prompts are wanted, and the fit split has none: add them with --benign"
    if missing:
        raise UsageError(f"{missing} or use --data starter.")
