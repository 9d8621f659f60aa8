"""SafeInfer (arXiv 2406.12274, AAAI 2025): decoding-time, context-adaptive safety alignment.

Safety amplification: in-context prompts of safe demonstrations; the mean output of every head at their last token
(eq. 1); the heads with the largest indirect effect; the sum of their projected means is the safety vector (eq. 2),
added to one block's output (eq. 3). Safety-guided decoding: the union with an unsafe guide takes away what the guide
likes more (eq. 4-6). Preset `published` is that; `adaptive` adds a gate, so that only prompts that need it are steered.

Knows the order of the steps and their settings; each step is in a file of its own beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .. import __version__
from ..alignment import Alignment, fingerprint
from ..data.records import Data
from ..edits import Guidance, Guide, HiddenEdit, ProbeGate
from ..edits.hidden import DEFAULT_SCOPE
from ..errors import UsageError
from ..models.anatomy import Anatomy, anatomy
from . import guide as guides
from .choose import choose_strength, fit_gate
from .head_effects import head_vector, indirect_effects, mean_head_outputs, split_half_correlation, top_heads
from .in_context import check_context, in_context_prompts
from .settings import checked
from .stages import Stages

# The published preset is the paper's: every generated token is pushed and guided. On small models that soon turns
# refusals into loops or wordiness; the adaptive preset acts once, harder, where it is decided what the reply will be:
# it pushes the last prompt token. A guide adds nothing to that which was measured; one that is asked for guides the
# first token of the reply.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        "gate": False,
        "guide": "adapter",
        "guide_tokens": None,
        "scope": DEFAULT_SCOPE,
        "strengths": [0.1, 0.15, 0.2, 0.3, 0.4, 0.5],
    },
    "adaptive": {
        "gate": True,
        "guide": "none",
        "guide_tokens": 1,
        "scope": ("last",),
        "strengths": [0.5, 1.0, 1.5, 2.0],
    },
}


class SafeInferConfig(BaseModel):
    """Settings, with the paper's values as defaults where it gives them. `None` means: chosen on the tune split."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)

    preset: Literal["published", "adaptive"] = "adaptive"
    shots: int = Field(10, ge=1, description="demonstrations in a prompt (paper: 10)")
    trials: int = Field(100, ge=1, description="prompts in the mean of equation 1 (paper: about 100)")
    effect_prompts: int = Field(25, ge=1, description="prompts in the average indirect effect (reference: 25)")
    corruption: Literal["compliant", "mixed"] = Field("compliant", description="what replaces the refusals")
    heads: int = Field(10, ge=1, description="heads in the vector (reference: 10)")
    layer: int | None = Field(
        None, ge=0, description="block whose output is steered, from 0 (paper: a third of the depth)"
    )
    strength: float | None = Field(None, ge=0, description="gamma (paper: 0.5)")
    strengths: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, min_length=1, description="tried when strength is None; None: as the preset says"
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="blocks tried when layer is None; by default a third of the depth"
    )
    scope: tuple[Literal["prompt", "last", "generation", "all"], ...] | None = Field(
        None, min_length=1, description="tokens that are steered; None: as the preset says"
    )
    lam: float = Field(0.99, alias="lambda", ge=0, lt=1, description="lambda (paper: 0.99)")
    guide: Literal["adapter", "checkpoint", "prompt", "vector", "none"] | None = Field(
        None, description="None: as the preset says"
    )
    guide_tokens: int | None = Field(
        None, ge=1, description="first tokens of a reply that are guided (paper: all); None: as the preset says"
    )
    guide_model: str | None = Field(None, description="the checkpoint guide's name or path")
    guide_system: str | None = Field(None, description="the prompt guide's system prompt")
    guide_pairs: int = Field(96, ge=1, description="harmful pairs an adapter guide is trained on")
    guide_steps: int = Field(40, ge=1)
    guide_rank: int = Field(8, ge=1)
    guide_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        min_length=1,
        description="blocks that an adapter guide changes; None: all. What lies below these and the "
        "steered block is computed once for model and guide",
    )
    guide_learning_rate: float = Field(5e-4, gt=0)
    gate: bool | None = Field(None, description="None: as the preset says")
    gate_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="blocks that the probes read; None: all above the lowest fifth"
    )
    gate_false_positive: float = Field(
        0.03, ge=0, lt=1, description="share of harmless tune prompts that may be steered"
    )
    gate_l2: float = Field(10.0, ge=0)
    seed: int = 0


def read_config(settings: dict[str, Any]) -> SafeInferConfig:
    """The settings checked: an unknown key or a bad value is a UsageError that names it."""
    return checked("safeinfer", SafeInferConfig, settings)


def fit(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    config: SafeInferConfig,
    *,
    judge: Callable[[str, str], str] | None,
    on_progress: Callable[[str, int, int], None],
    workdir: str | Path | None,
) -> Alignment:
    """Fit SafeInfer. Needs harmful prompts with refusals (fit), harmful and benign prompts (fit, tune) for the gate.

    judge: (prompt, reply) -> verdict, for a block or strength that is to be chosen. Raises UsageError, before the work,
    for settings that the model or the data cannot meet.
    """
    body = anatomy(model)
    preset = PRESETS[config.preset]
    gated = preset["gate"] if config.gate is None else config.gate
    scope = preset["scope"] if config.scope is None else config.scope
    guide_kind = preset["guide"] if config.guide is None else config.guide
    guide_tokens = preset["guide_tokens"] if config.guide_tokens is None else config.guide_tokens
    layers = [config.layer] if config.layer is not None else config.layers or [body.n_layers // 3]
    strengths = [config.strength] if config.strength is not None else config.strengths or preset["strengths"]
    search = len(layers) * len(strengths) > 1
    fit_rows = data.filter(lambda row: row.split in (None, "fit"))
    tune_rows = data.split("tune")
    _require_room(body, config, layers)
    _require_classes(fit_rows, tune_rows, gated)
    if search and (judge is None or not len(tune_rows.harmful)):
        raise UsageError(
            "layer and strength are chosen by judged replies to harmful tune prompts: give a judge and such prompts, "
            f"or set layer={layers[0]} and strength=0.3."
        )
    if guide_kind == "checkpoint":
        guides.checkpoint(config.guide_model, tokenizer)  # now, not after the long work
    base = fingerprint(model, tokenizer)
    stages = Stages(workdir)
    key = {"version": __version__, "base": base, "data": data.hash, "seed": config.seed}

    # safety amplification: equations 1 and 2
    demos = [row for row in fit_rows.harmful if (row.response or "").strip()]
    queries = list(fit_rows.harmful)
    asked = {**key, "shots": config.shots, "trials": config.trials}

    def means() -> dict[str, Tensor]:
        safe = in_context_prompts(tokenizer, demos, queries, config.trials, config.shots, config.seed)
        check_context(model, safe, config.shots)
        prompts = [prompt for prompt, _ in safe]
        return {"means": mean_head_outputs(model, prompts, lambda i, n: on_progress("mean head outputs", i, n))}

    mean = stages("means", asked, means)["means"]

    def effects_of() -> dict[str, Tensor]:
        # other seed: the prompts that rank the heads are not those that made the means
        corrupted = in_context_prompts(
            tokenizer, demos, queries, config.effect_prompts, config.shots, config.seed + 1, config.corruption
        )
        check_context(model, corrupted, config.shots)
        prompts, targets = zip(*corrupted, strict=True)

        def tell(done: int, total: int) -> None:
            on_progress("indirect effects of heads", done, total)

        return {"effects": indirect_effects(model, prompts, targets, mean, tell)}

    asked |= {"prompts": config.effect_prompts, "corruption": config.corruption}
    effects = stages("effects", asked, effects_of)["effects"]
    heads = top_heads(effects, config.heads)
    vector = head_vector(model, mean, heads)
    edit = HiddenEdit(vector, layers[0], strengths[0], scope)
    info: dict[str, Any] = {
        "heads": [list(head) for head in heads],
        "split_half_correlation": split_half_correlation(effects),
        "vector_norm": float(vector.norm()),
    }
    if search and judge is not None:
        asked |= {"heads": config.heads, "scope": scope}
        edit, info["strength_search"] = choose_strength(
            model, tokenizer, edit, layers, strengths, tune_rows, judge, stages, asked, on_progress
        )
    edits: list[Any] = [edit]

    # safety-guided decoding: equations 4 to 6
    if guide_kind != "none":
        unsafe = make_guide(guide_kind, model, tokenizer, config, edit, fit_rows, stages, key, on_progress)
        edits.append(Guidance(unsafe, config.lam, tokens=guide_tokens))
        info["guide_cost"] = unsafe.cost

    gate: ProbeGate | None = None
    if gated:
        gate, info["gate"] = fit_gate(
            model,
            tokenizer,
            fit_rows,
            tune_rows,
            stages,
            key,
            on_progress,
            layers=config.gate_layers,
            false_positive=config.gate_false_positive,
            l2=config.gate_l2,
        )
    return Alignment(
        method="safeinfer",
        edits=edits,
        gate=gate,
        config={
            **config.model_dump(by_alias=True),
            "layer": edit.layer,
            "strength": edit.strength,
            "scope": list(scope),
            "gate": gated,
            "guide": guide_kind,
            "guide_tokens": guide_tokens,
        },
        base=base,
        provenance={
            "data": {"name": data.name, "hash": data.hash, "fit": len(fit_rows), "tune": len(tune_rows)},
            "versions": {"postalign": __version__, "torch": torch.__version__},
            "paper": "arXiv 2406.12274",
        },
        info=info,
        arrays={
            "head_effects": effects.mean(0),
            "head_effects_std": effects.std(0) if len(effects) > 1 else effects[0] * 0,
        },
    )


def make_guide(
    kind: str,
    model: nn.Module,
    tokenizer: Any,
    config: SafeInferConfig,
    edit: HiddenEdit,
    rows: Data,
    stages: Stages,
    key: dict[str, Any],
    on_progress: Callable[[str, int, int], None],
) -> Guide:
    """The unsafe guide of this kind, with the settings of `config`."""
    if kind == "checkpoint":
        return guides.checkpoint(config.guide_model, tokenizer)
    if kind == "prompt":
        return guides.prompt(config.guide_system)
    if kind == "vector":
        return guides.vector(edit)
    return guides.adapter(
        model,
        tokenizer,
        rows,
        stages,
        key,
        on_progress,
        pairs=config.guide_pairs,
        steps=config.guide_steps,
        rank=config.guide_rank,
        layers=config.guide_layers,
        learning_rate=config.guide_learning_rate,
        seed=config.seed,
    )


def _require_room(body: Anatomy, config: SafeInferConfig, layers: list[int]) -> None:
    given = [("layer", layer) for layer in layers] + [("gate_layers", layer) for layer in config.gate_layers or ()]
    given += [("guide_layers", layer) for layer in config.guide_layers or ()]
    for name, index in given:
        if index >= body.n_layers:
            raise UsageError(f"{name}={index} is out of range: the model has blocks 0 to {body.n_layers - 1}.")
    if config.heads > body.n_layers * body.n_heads:
        raise UsageError(f"heads={config.heads} is out of range: the model has {body.n_layers * body.n_heads} heads.")


def _require_classes(fit_rows: Data, tune_rows: Data, gated: bool) -> None:
    missing = ""
    if not len(fit_rows.harmful):
        missing = "safeinfer needs harmful prompts in the fit split: add them with --harmful"
    elif gated and not len(fit_rows.benign):
        missing = "the gate needs benign prompts in the fit split: add them with --benign"
    elif gated and not (len(tune_rows.benign) and len(tune_rows.harmful)):
        missing = "the gate's threshold needs harmful and benign prompts in the tune split: add rows with split=tune"
    if missing:
        raise UsageError(f"{missing} or use --data starter.")
