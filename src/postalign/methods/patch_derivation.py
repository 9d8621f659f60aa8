"""Patch derivation of SafePatching: training each patch, and scoring the weights of the model that it makes.

Results stay in a folder under a digest of all that they depend on, so that a fit goes on where it was interrupted, and
fits that differ in the merging only share them. Knows training and scores; what is merged is told in safepatching.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..data.records import Data
from ..edits import Control, SparsePatch
from ..edits.edit import attach_all
from ..errors import PostalignError, UsageError
from ..models.anatomy import anatomy
from ..models.shards import FolderWeights, Weights
from ..training import TrainSettings, train_delta, trained_names, training_history
from .importance import snip_scores, with_delta
from .patch_pairs import (
    Judge,
    Pair,
    balanced,
    benign_pairs,
    emphasised,
    first_tokens,
    harmful_pairs,
    own_refusals,
    refusal_pairs,
    some,
    wrong,
)
from .safepatching_config import SafePatchingConfig

Progress = Callable[[str, int, int], None]
# the settings on which a patch depends, its scores aside
_SHARED = (
    "pairs pair_tokens held_tokens head_tokens rest_weight balance schedule train modules untouched refusals "
    "refusal_tokens loss_on batch_size micro_batch beside max_grad_norm optimiser rank kl_pairs categories seed"
).split()
_OWN = {
    "safety": (
        "safety safety_steps safety_learning_rate max_loss_rise refusal_weight benign_weight safety_kl_weight "
        "prompt_weight"
    ).split(),
    "over_safety": "over_safety over_safety_steps over_safety_learning_rate over_safety_kl_weight".split(),
}
_SCORING = "importance score_on score_loss_on score_pairs".split()
_LABEL = {"safety": "the safety patch", "over_safety": "the over-safety patch"}


@dataclass
class Derivation:
    """Patches and scores of one model on one set of rows. key: what they depend on besides the settings, as JSON."""

    model: nn.Module
    tokenizer: Any
    rows: Data
    config: SafePatchingConfig
    folder: Path
    key: Any
    on_progress: Progress
    judge: Judge | None = None

    def patch(self, kind: str) -> tuple[Weights, dict[str, Any]]:
        """(P_SE or P_OSM, how its training went): theta_SE - theta by equation 1, theta_OSM - theta by equation 2."""
        place = self._place(kind, kind, [*_SHARED, *_OWN[kind]])
        told = f"training {_LABEL[kind]}"
        try:
            history, delta = training_history(place), place / "delta"
        except PostalignError:  # not done yet
            settings = self._settings(kind)
            delta = train_delta(
                self.model,
                self.tokenizer,
                self.pairs(kind),
                settings,
                workdir=place,
                benign=self._held(kind) if settings.kl_weight else (),
                wanted=self._wanted(kind),
                on_step=lambda step, steps, _, loss: self.on_progress(f"{told} | loss {loss:.2f}", step, steps),
            )
            history = training_history(place)
        steps = self.config.safety_steps if kind == "safety" else self.config.over_safety_steps
        self.on_progress(told, steps, steps)
        return FolderWeights(delta), {
            "steps": history.step,
            "stopped": history.stopped,
            "answer_loss_first": history.answer_losses[0],
            "answer_loss_last": history.answer_losses[-1],
        }

    def refined(self, patch: SparsePatch, part: int = 0) -> tuple[Weights, dict[str, Any]]:
        """The merged patch trained on, at its own weights only: refusals of harmful prompts, answers to harmless ones
        that the model refuses, and no other replies to those that it answers. After the
        first part, of `refine_parts`, what the patch still does wrong comes more often, and every other part leans to
        the harmless side."""
        config, told = self.config, "refining the merged patch"
        begin, end = (config.refine_steps * i // config.parts for i in (part, part + 1))
        settings = self._settings("safety").model_copy(
            update={
                "direction": "descent",
                "steps": end - begin,
                "learning_rate": config.refine_learning_rate,
                "wanted_weight": config.benign_weight,
            }
        )
        refusals = self._refusals(config.pairs)
        answers = self._answers(config.pairs) if config.benign_weight else []
        if part and self.judge is not None:
            complied, refused = self._mistakes(patch)
            refusals = emphasised(refusals, complied)
            answers = emphasised(answers, refused) if config.benign_weight else answers
        if part and part % 2 == 0:  # leans to the harmless side
            weights = {name: config.refine_lean * getattr(settings, name) for name in ("wanted_weight", "kl_weight")}
            settings = settings.model_copy(update=weights)
        later = ("refine_last", "refine_scale", "effect_prompts")
        asked = [name for name in type(config).model_fields if name not in later]
        place = self._place(f"refined-{part}", "safety", asked)
        delta = train_delta(
            self.model,
            self.tokenizer,
            refusals,
            settings,
            workdir=place,
            benign=self._held("safety") if settings.kl_weight else (),
            wanted=answers,
            at=patch,
            on_step=lambda step, _, __, loss: self.on_progress(
                f"{told} | loss {loss:.2f}", begin + step, config.refine_steps
            ),
        )
        history = training_history(place)
        self.on_progress(told, end, config.refine_steps)
        return FolderWeights(delta), {"steps": begin + history.step, "answer_loss_last": history.answer_losses[-1]}

    def _mistakes(self, patch: SparsePatch) -> tuple[list[Pair], list[Pair]]:
        """(refusals of the harmful prompts that the patched model does not refuse, answers to the harmless ones that it
        does not answer), among `refine_tried` of each in the fit split."""
        assert self.judge is not None
        config = self.config
        refusals = some(list(dict.fromkeys(self._refusals(config.pairs))), config.refine_tried, config.seed)
        answers = [*self._answers(config.pairs), *self._kept(config.kl_pairs)]
        answers = some(answers, config.refine_tried, config.seed)
        asked = (self.on_progress, self.judge)
        handles = attach_all([patch], self.model, Control())
        try:
            return (
                wrong(self.model, self.tokenizer, refusals, "refusal", *asked),
                wrong(self.model, self.tokenizer, answers, "compliance", *asked),
            )
        finally:
            for handle in handles:
                handle.remove()

    def scores(self, kind: str, patch: Weights) -> Weights:
        """I_SE or I_OSM (equations 5 and 6), by default at the weights that the patch leads to."""
        config = self.config
        share = config.a if kind == "safety" else config.b
        if config.importance == "magnitude" or share >= 1:  # of all weights the top is all, whatever the scores
            return patch
        place = self._place(f"scores-{kind}", kind, [*_SHARED, *_OWN[kind], *_SCORING])
        if place.exists():
            return FolderWeights(place)
        pairs = self.pairs(kind)[: config.score_pairs]
        there = with_delta(self.model, patch) if config.score_on == "patched" else contextlib.nullcontext()
        with there:
            return snip_scores(
                self.model,
                self.tokenizer,
                pairs,
                patch.names(),
                loss_on=config.score_loss_on,
                patch=patch if config.importance == "patch" else None,
                out=place,
                on_progress=lambda done, total: self.on_progress(f"importance for {_LABEL[kind]}", done, total),
            )

    def pairs(self, kind: str) -> list[Pair]:
        """What the patch of this kind is trained and scored on: by default the harmful pairs."""
        if kind == "safety" and self.config.safety == "refusal":
            return self._refusals(self.config.pairs)
        if kind == "over_safety" and self.config.over_safety == "benign":
            return self._answers(self.config.pairs) or self._kept(self.config.pairs)
        return self._harmful

    def _refusals(self, count: int) -> list[Pair]:
        pairs = self._all_refusals[:count]
        return balanced(pairs, self.rows) if self.config.balance else pairs

    def _answers(self, count: int) -> list[Pair]:
        """Harmless prompts that the model refuses, answered."""
        return self._benign[0][:count]

    def _kept(self, count: int) -> list[Pair]:
        """Harmless prompts that the model answers, and what it says."""
        return self._benign[1][:count]

    @functools.cached_property
    def _all_refusals(self) -> list[Pair]:
        config = self.config
        count, made = max(config.pairs, config.kl_pairs), (self.on_progress, self.judge)
        if config.refusals == "own":
            pairs = own_refusals(
                self.model, self.tokenizer, self.rows, count, config.refusal_tokens, config.seed, *made, self._benign[2]
            )
            if pairs:
                return pairs
        return refusal_pairs(self.model, self.tokenizer, self.rows, count, config.pair_tokens, config.seed, *made)

    def _wanted(self, kind: str) -> list[Pair]:
        """What the training of the safety patch makes likelier meanwhile."""
        config = self.config
        if kind == "safety" and config.safety == "refusal" and config.benign_weight:
            return self._answers(config.pairs)
        if kind == "safety" and config.safety != "refusal" and config.refusal_weight:
            return self._refusals(config.pairs)
        return []

    def _held(self, kind: str) -> list[Pair]:
        """Where this patch should do nothing: harmless prompts, or what a patch trained on these might undo."""
        if kind == "over_safety" and self.config.over_safety == "benign":
            return self._refusals(self.config.kl_pairs)
        kept = self._kept(self.config.kl_pairs) or self._answers(self.config.kl_pairs)
        return [(prompt, first_tokens(self.tokenizer, reply, self.config.held_tokens)) for prompt, reply in kept]

    @functools.cached_property
    def _harmful(self) -> list[Pair]:
        config, made = self.config, (self.on_progress, self.judge)
        pairs = harmful_pairs(
            self.model, self.tokenizer, self.rows, config.pairs, config.pair_tokens, config.seed, *made
        )
        if not pairs:
            raise UsageError(
                "the model complied with no harmful prompt, even from an opening of its own: "
                "give answers (rows with unsafe_response)."
            )
        return pairs

    @functools.cached_property
    def _benign(self) -> tuple[list[Pair], list[Pair], list[str]]:
        config = self.config
        count, made = max(config.pairs, config.kl_pairs), (self.on_progress, self.judge)
        return benign_pairs(self.model, self.tokenizer, self.rows, count, config.pair_tokens, config.seed, *made)

    def _settings(self, kind: str) -> TrainSettings:
        config = self.config
        shared = (
            "head_tokens",
            "rest_weight",
            "schedule",
            "train",
            "modules",
            "loss_on",
            "batch_size",
            "micro_batch",
            "beside",
            "max_grad_norm",
            "optimiser",
            "rank",
        )
        safety, shared = kind == "safety", {name: getattr(config, name) for name in shared}
        if config.untouched:
            shared["modules"] = self._upper_matrices()
        return TrainSettings(
            **shared,
            direction="descent" if not safety or config.safety == "refusal" else config.safety,
            steps=config.safety_steps if safety else config.over_safety_steps,
            learning_rate=config.safety_learning_rate if safety else config.over_safety_learning_rate,
            max_loss_rise=config.max_loss_rise if safety else None,
            alpha=2.0 * config.rank,
            kl_weight=config.safety_kl_weight if safety else config.over_safety_kl_weight,
            prompt_weight=config.prompt_weight if safety else 0.0,
            wanted_weight=config.benign_weight if config.safety == "refusal" else config.refusal_weight,
            seed=config.seed,
        )

    def _upper_matrices(self) -> list[str]:
        """The trained matrices less those of the lowest blocks, of which `untouched` is the share."""
        blocks = anatomy(self.model).block_names
        upper = blocks[int(self.config.untouched * len(blocks)) :]
        asked = TrainSettings.model_validate({"train": self.config.train, "modules": self.config.modules})
        found = trained_names(self.model, asked)
        return [name for name in found if any(name.startswith(f"{block}.") for block in upper)]

    def _place(self, name: str, kind: str, settings: list[str]) -> Path:
        """A folder's name. The over-safety patch is a jailbreak, and its folder says so."""
        about = [self.key, {setting: getattr(self.config, setting) for setting in settings}]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
        warning = "unsafe-" if name == "over_safety" else ""
        return self.folder / f"{warning}{name.replace('_', '-')}-{digest}"
