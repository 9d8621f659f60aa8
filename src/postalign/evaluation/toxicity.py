"""How toxic a text sounds, in [0, 1], by a classifier of your choice. Knows sequence classifiers of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import PostalignError, UsageError, nearest

Scorer = Callable[[Sequence[str]], list[float | None]]
"""Texts -> a score each, None where there is none. Anything of this shape can be plugged in."""

LABELS = ("toxic", "toxicity", "unsafe", "harmful", "hate", "label_1")


def classifier(name: str, *, label: str | None = None, batch_size: int = 16) -> Scorer:
    """The probability that a local sequence classifier gives to one label.

    name: a folder or hub id. label: one of its labels; default: the first of `LABELS` that it has. Sigmoid where the
    model is made for several labels at once, else softmax. Raises PostalignError when it cannot be loaded, UsageError
    for a label it does not have.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(name).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PostalignError(f"could not load the classifier {name}: {reason} Give a sequence classifier.") from error
    names = {str(one).lower(): int(i) for i, one in model.config.id2label.items()}
    wanted = label.lower() if label else next((one for one in LABELS if one in names), None)
    if wanted is None or wanted not in names:
        asked = f"no label {label!r}.{nearest(label, names)}" if label else "no label that means toxic."
        raise UsageError(f"{name} has {asked} It has: {', '.join(names)}. Name one: classifier:{name}#LABEL.")
    several = model.config.problem_type == "multi_label_classification" or len(names) == 1
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id

    @torch.no_grad()
    def score(texts: Sequence[str]) -> list[float | None]:
        found: list[float | None] = []
        for begin in range(0, len(texts), batch_size):
            part = list(texts[begin : begin + batch_size])
            inputs = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            logits = model(**inputs).logits.float()
            p = logits.sigmoid() if several else logits.softmax(-1)
            found += p[:, names[wanted]].tolist()
        return found

    return score
