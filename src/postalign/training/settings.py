"""What a training may be told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .batches import LossOn


class TrainSettings(BaseModel):
    """Settings of `weights.train_delta`. Losses are means over a row's tokens and then over rows, in nats."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    direction: Literal["ascent", "descent", "npo"] = Field(
        "descent",
        description="make the pairs likelier (descent), or less likely: by ascent, or by NPO, which slows down",
    )
    train: Literal["full", "adapter"] = Field("full", description="the weights themselves, or LoRA beside them")
    modules: Literal["blocks"] | list[str] = Field(
        "blocks",
        description="blocks: every matrix in the blocks (adapter: every linear module). Or names, whole or in part, "
        "such as `mlp.down_proj` or `layers.3`",
    )
    loss_on: LossOn = Field("answer", description="tokens that carry the loss: answer, question (user message) or all")
    steps: int = Field(40, ge=1)
    batch_size: int = Field(8, ge=1, description="pairs in a step, over all processes")
    micro_batch: int = Field(4, ge=1, description="pairs in a forward pass")
    learning_rate: float = Field(1e-5, gt=0)
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps in which the rate rises")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="after the rise the rate stays, or falls to a tenth by the last step"
    )
    head_tokens: int | None = Field(
        None,
        ge=1,
        description="an answer's loss is the mean over its first so many tokens, and `rest_weight` times "
        "that over the others; None: the mean over all",
    )
    rest_weight: float = Field(0.3, ge=0, description="see head_tokens")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_loss_rise: float | None = Field(
        None,
        gt=0,
        description="ascent and npo end when the pairs' loss, a mean over 4 steps, has risen so far; None: never",
    )
    rank: int = Field(8, ge=1, description="of the adapter")
    alpha: float = Field(16.0, gt=0, description="of the adapter: its scale is alpha / rank")
    npo_beta: float = Field(0.1, gt=0, description="paper: 0.1")
    kl_weight: float = Field(0.0, ge=0, description="of KL(base || trained) on the benign examples; 0: not computed")
    prompt_weight: float = Field(
        0.0, ge=0, description="of the divergence on the prompts of benign pairs, beside that on their answers"
    )
    beside: float = Field(1.0, gt=0, description="benign and wanted examples in a step, each as a share of batch_size")
    wanted_weight: float = Field(1.0, ge=0, description="of the loss of the wanted pairs, where there are any")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of the passes; trained weights are kept in float32 in any case. auto: bfloat16 for 16-bit models",
    )
    optimiser: Literal["adamw", "sgd"] = "adamw"
    seed: int = 0
    save_every: int = Field(25, ge=0, description="steps between states to go on from; 0: none")
    delta_dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the differences on disk")
