"""What a guide needs at decoding time: its model, or its own view of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..edits import CheckpointGuide, PromptGuide
from ..errors import PostalignError
from ..models.chat import Batch, Messages, encode, same_vocabulary, to_messages
from ..models.load import load_model


def guide_model(guide: CheckpointGuide, tokenizer: Any, model: nn.Module) -> nn.Module:
    """The guide's checkpoint, on the model's device and in its dtype, after comparing token maps.

    Raises PostalignError when the two map any token to another id: sizes may agree where maps do not.
    """
    if guide.model is None:
        dtype: Any = model.dtype
        other, other_tokenizer = load_model(guide.name, revision=guide.revision, dtype=dtype)
        difference = same_vocabulary(tokenizer, other_tokenizer)
        if difference:
            raise PostalignError(
                f"the guide {guide.name} has another vocabulary ({difference}): "
                "choose a guide with the same tokenizer, or an adapter, prompt or vector guide."
            )
        guide.model = loaded = other.to(next(model.parameters()).device)  # type: ignore[arg-type]
        return loaded
    return guide.model


def guide_inputs(guide: PromptGuide, tokenizer: Any, prompts: Sequence[str | Messages], device: torch.device) -> Batch:
    """The prompts as a prompt guide sees them: the same turns under its own system prompt."""
    views = [
        [{"role": "system", "content": guide.system}, *(m for m in to_messages(p) if m["role"] != "system")]
        for p in prompts
    ]
    return encode(tokenizer, views, device=device)
