"""The settings of SafePatching: what the paper names, every choice that it leaves open, presets, and its baselines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import UsageError
from .settings import checked
from .sparsify import Scope

KINDS = ("safety", "over_safety")
# The defaults of the fields are `published`: the paper's recipe as far as it is known. On one harmful set the two
# patches are each other's mirror image; in `anchored` each learns what the other may not undo: refusals of harmful
# prompts beside answers to harmless ones, and answers to harmless ones while the refusals are held. What they merge to
# is then trained on in its places.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "anchored": {
        **{
            "pairs": 1000,
            "kl_pairs": 1000,
            "pair_tokens": 48,
            "held_tokens": 20,
            "refusal_tokens": 14,
            "balance": True,
        },
        **{"head_tokens": 4, "rest_weight": 0.5, "batch_size": 8, "micro_batch": 4, "beside": 0.75, "p": 1.0},
        **{"schedule": "linear", "untouched": 0.5, "importance": "magnitude", "a": 0.07, "b": 0.005},
        **{"safety": "refusal", "refusals": "own", "benign_weight": 1.5, "safety_kl_weight": 3.0, "prompt_weight": 1.0},
        **{"safety_steps": 20, "safety_learning_rate": 2e-4, "over_safety": "benign", "over_safety_kl_weight": 1.0},
        **{"over_safety_steps": 8, "over_safety_learning_rate": 5e-5, "alpha": 1.0, "beta": 1.0},
        **{"refine_steps": 225, "refine_parts": 5, "refine_learning_rate": 6e-4, "refine_lean": 3.0},
        **{"refine_last": 3, "refine_scale": 1.25},
    },
}
DEFAULT = "published"
Combine = Literal["difference", "intersection", "union", "safety", "over_safety", "ties"]


class SafePatchingConfig(BaseModel):
    """Settings, named as in the paper. Shares are from 0 to 1. A preset changes defaults; what is given wins."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    preset: Literal["published", "anchored"] = "published"
    # equations 1 and 2
    pairs: int = Field(128, ge=1, description="harmful pairs; made by the model itself where the data has none")
    pair_tokens: int = Field(64, ge=1, description="length of the answers made")
    held_tokens: int | None = Field(
        None, ge=1, description="so many first tokens of a reply to a harmless prompt are held; None: all of it"
    )
    refusals: Literal["given", "own"] = Field(
        "given",
        description="where refusals are learned: the data's, or those of the model itself, if it has any (`own`)",
    )
    refusal_tokens: int = Field(24, ge=1, description="length of the model's own refusals")
    head_tokens: int | None = Field(
        None,
        ge=1,
        description="the first tokens of an answer, where it shows whether one complies, count as much as "
        "the others together count `rest_weight` times; None: all alike",
    )
    rest_weight: float = Field(0.3, ge=0, description="see head_tokens")
    balance: bool = Field(False, description="refusals of rare categories several times")
    schedule: Literal["constant", "linear"] = Field("constant", description="of the learning rates: see TrainSettings")
    safety: Literal["ascent", "npo", "refusal"] = Field(
        "ascent", description="paper: ascent on harmful pairs. npo: bounded by itself. refusal: descent on refusals"
    )
    over_safety: Literal["harmful", "benign"] = Field(
        "harmful", description="descent on the harmful pairs (paper), or on answers to harmless prompts (no jailbreak)"
    )
    train: Literal["full", "adapter"] = "full"
    modules: Literal["blocks"] | list[str] = Field("blocks", description="blocks: all matrices of the blocks")
    untouched: float = Field(
        0.0, ge=0, lt=1, description="share of the blocks, the lowest ones, that are not trained; training is quicker"
    )
    loss_on: Literal["answer", "question", "all"] = "answer"
    safety_steps: int = Field(40, ge=1)
    safety_learning_rate: float = Field(2e-5, gt=0)
    max_loss_rise: float | None = Field(
        0.7, gt=0, description="how far ascent may raise the answers' loss, nats per token; None: no stop"
    )
    over_safety_steps: int = Field(30, ge=1)
    over_safety_learning_rate: float = Field(3e-5, gt=0)
    batch_size: int = Field(8, ge=1)
    micro_batch: int = Field(4, ge=1)
    beside: float = Field(1.0, gt=0, description="pairs of each other loss in a step, as a share of batch_size")
    max_grad_norm: float = Field(1.0, gt=0)
    optimiser: Literal["adamw", "sgd"] = "adamw"
    rank: int = Field(8, ge=1, description="of adapters")
    refusal_weight: float = Field(0.0, ge=0, description="of the refusals' loss beside ascent (paper: none)")
    benign_weight: float = Field(
        0.0,
        ge=0,
        description="beside safety=refusal: of the loss of answers to harmless prompts that the model refuses",
    )
    safety_kl_weight: float = Field(
        0.0,
        ge=0,
        description="of the divergence from the base on what it says to harmless prompts, of the safety patch and of "
        "the merged one while it is refined (paper: none)",
    )
    prompt_weight: float = Field(
        0.0,
        ge=0,
        description="of the divergence on the harmless prompts themselves, beside that on what it says to them: keeps "
        "what it knows of language (paper: none)",
    )
    over_safety_kl_weight: float = Field(
        0.0, ge=0, description="the same for the other patch; on refusals where it is made of harmless answers"
    )
    kl_pairs: int = Field(128, ge=1, description="harmless prompts with answers; for over_safety=benign, refusals")
    # equation 4
    p: float = Field(0.5, gt=0, le=1, description="share of each patch that is retained at random")
    rescale: bool = Field(False, description="divide what is retained by p, as DARE does")
    # equations 5 and 6
    importance: Literal["snip", "patch", "magnitude"] = Field(
        "snip", description="|W dL/dW| (paper), |P dL/dW| of the patch's own entries, or |P| without a gradient"
    )
    score_on: Literal["patched", "base"] = Field("patched", description="the weights at which the gradient is taken")
    score_loss_on: Literal["answer", "question", "all"] = "answer"
    score_pairs: int = Field(128, ge=1)
    # equations 7 and 8
    a: float = Field(0.05, ge=0, le=1, description="share of weights that matter to the safety patch")
    b: float = Field(0.05, ge=0, le=1, description="the same for the over-safety patch")
    scope: Scope = Field("matrix", description="what the shares are of: each matrix, each row, or all weights together")
    combine: Combine = Field("difference", description="how the two patches' top sets are combined (paper: difference)")
    alpha: float | list[float] = Field(
        [1.0, 2.0, 4.0], description="weight of the safety patch; several: the best on tune prompts"
    )
    beta: float | list[float] = Field([1.0, 2.0], description="the same for the over-safety patch")
    refine_steps: int = Field(
        0,
        ge=0,
        description="afterwards train the merged patch on, at its own weights: refusals of harmful prompts beside "
        "harmless answers (paper: none)",
    )
    refine_parts: int = Field(
        1,
        ge=1,
        description="the refinement in so many parts; with a judge, prompts that the patch gets wrong at the beginning "
        "of any but the first come more often in it",
    )
    refine_tried: int = Field(
        300, ge=1, description="harmful and harmless fit prompts on which the patch is tried between parts, of each"
    )
    refine_learning_rate: float = Field(3e-4, gt=0)
    refine_lean: float = Field(
        1.0, gt=0, description="in the third part, the fifth and so on, the harmless losses weigh so many times more"
    )
    refine_last: int = Field(1, ge=1, description="the patch is the mean of what the last so many parts end at")
    refine_scale: float = Field(1.0, gt=0, description="and goes so many times as far as that mean")
    # the outcome
    values: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="number format of the patch; auto: the weights' own if it has 16 bits, else bfloat16"
    )
    keep_over_safety: bool = Field(False, description="keep the over-safety patch, a jailbreak, in the alignment")
    after: str | None = Field(None, description="an alignment's folder: its patches come first, this one on top")
    categories: list[str] | None = Field(None, min_length=1, description="fit on these categories only")
    choice_prompts: int = Field(48, ge=1, description="tune prompts of each label by which alpha and beta are chosen")
    effect_prompts: int = Field(32, ge=0, description="tune prompts of each label on which the effect is measured")
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return {**PRESETS.get(values.get("preset", DEFAULT), {}), **values} if isinstance(values, dict) else values

    @field_validator("alpha", "beta")
    @classmethod
    def _some(cls, value: float | list[float]) -> float | list[float]:
        if value == []:
            raise ValueError("give one value at least")
        return value

    @property
    def candidates(self) -> list[SafePatchingConfig]:
        """These settings with one alpha and one beta each, all pairs of them."""
        alphas, betas = (v if isinstance(v, list) else [v] for v in (self.alpha, self.beta))
        return [self.model_copy(update={"alpha": alpha, "beta": beta}) for alpha in alphas for beta in betas]

    @property
    def merge_weights(self) -> tuple[float, float]:
        """alpha and beta. Raises UsageError where there are several to choose from."""
        if isinstance(self.alpha, list) or isinstance(self.beta, list):
            raise UsageError("several alpha or beta: merge with one of `candidates`.")
        return self.alpha, self.beta

    @property
    def parts(self) -> int:
        """The parts that the refinement has: none without steps, and none without a step of its own."""
        return min(self.refine_parts, self.refine_steps)

    @property
    def kinds(self) -> list[str]:
        """The patches that have a part in the outcome: `safety`, `over_safety`."""
        used = {"safety": self.a > 0 and self.combine != "over_safety"}
        used["over_safety"] = self.b > 0 and self.combine != "safety"
        return [kind for kind in KINDS if used[kind]]


PLAIN = {"alpha": 1.0, "beta": 1.0}
# what the paper compares with, and what it leaves out of itself: settings beside the ones of a fit with `published`
BASELINES: dict[str, dict[str, Any]] = {
    "gradient_ascent": {"combine": "safety", "p": 1.0, "a": 1.0, **PLAIN},
    "npo": {"combine": "safety", "p": 1.0, "a": 1.0, "safety": "npo", **PLAIN},
    "task_arithmetic": {"combine": "union", "p": 1.0, "a": 1.0, "b": 1.0, **PLAIN},
    "dare": {"combine": "union", "p": 0.5, "a": 1.0, "b": 1.0, "rescale": True, **PLAIN},
    "ties": {"combine": "ties", "p": 1.0, "a": 0.2, "b": 0.2, **PLAIN},
    # the tuned model as the unaligned one
    "resta": {"combine": "over_safety", "p": 1.0, "b": 1.0, "alpha": 1.0, "beta": -1.0},
    "safety_only": {"combine": "safety"},
    "over_safety_only": {"combine": "over_safety"},
    "intersection": {"combine": "intersection"},
    "union": {"combine": "union"},
    "no_retention": {"p": 1.0},
}


def read_config(settings: dict[str, Any]) -> SafePatchingConfig:
    """The settings checked: an unknown key or a bad value is a UsageError that names it."""
    return checked("safepatching", SafePatchingConfig, settings)
