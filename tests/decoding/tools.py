"""What the tests of decoding share: alignments by name, the engine's own distributions, a streamer, small checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postalign.alignment import Alignment
from postalign.decoding.engine import Stream
from postalign.decoding.guides import guide_inputs
from postalign.edits import PromptGuide
from postalign.models.chat import encode
from tests.decoding.twin import PROMPTS, guidance_of, patch_for, push, splitting_gate
from tests.tiny import tiny_model

STEPS = 7
ENDS = {2, 5}  # </s> and <|im_end|>
GUIDES = ["adapter", "checkpoint", "prompt", "vector"]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def parts(name: str, model: Any, tokenizer: Any) -> Alignment:
    """The alignments that are put to the test, by name: `amplification`, a guide's name, or several joined by +."""
    edits: list[Any] = []
    gate = splitting_gate(model, tokenizer, PROMPTS) if "gate" in name else None
    if "amplification" in name:
        edits.append(push())
    if "patch" in name:
        edits.append(patch_for(model, seed=5))
    for kind in GUIDES:
        if kind in name:
            edits.append(guidance_of(kind, model, other=tiny_model("llama", seed=7)))
    return Alignment("test", edits, gate)


def forced_steps(model: Any, tokenizer: Any, alignment: Alignment, prompts: list[str], replies: list[list[int]]) -> Any:
    """The stream's log-probabilities `[rows, steps, vocab]` along given replies of equal length, as one batch."""
    guide = alignment.guidance.guide if alignment.guidance else None
    device = torch.device("cpu")
    with torch.no_grad(), Stream(model, alignment, getattr(guide, "model", None)) as stream:
        other = guide_inputs(guide, tokenizer, prompts, device) if isinstance(guide, PromptGuide) else None
        found = [stream.first(encode(tokenizer, prompts), other)]
        for step in range(len(replies[0]) - 1):
            found.append(stream.next(torch.tensor([reply[step] for reply in replies])))
        return torch.stack(found, dim=1), stream.strength


class Ear:
    """Takes what a streamer of transformers takes."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def assert_one_line(error: BaseException) -> None:
    assert "\n" not in str(error) and len(str(error)) > 10
