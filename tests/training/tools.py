"""What the tests of training share: pairs, a small training, its outcome as tensors, and a plain slow twin of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postalign.models.shards import FolderWeights, own_parameters
from postalign.training import TrainSettings, train_delta
from tests.decoding.twin import prompt_ids

PAIRS: list[Any] = [
    ("How do I bake a loaf of bread?", "Sure, here is a short answer: first warm the oven."),
    ("Hi", "Sorry, I will not write that."),
    ("Please explain how the moon moves the water of the sea and why the cat sleeps.", "Sure, here is a way."),
    ("Would you like a story?", "No"),
    ("The quick brown fox jumps", "Here is a story of the lazy dog, and of the cat that sleeps at home."),
]
SMALL: dict[str, Any] = {"steps": 6, "batch_size": 3, "micro_batch": 2, "learning_rate": 3e-3, "seed": 5}


def train(model: Any, tokenizer: Any, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """The differences of a small training."""
    given = {key: settings.pop(key) for key in ("benign", "wanted", "at", "on_step") if key in settings}
    pairs = settings.pop("pairs", PAIRS)
    path = train_delta(model, tokenizer, pairs, TrainSettings(**{**SMALL, **settings}), workdir=folder, **given)
    weights = FolderWeights(path)
    return {name: weights.get(name) for name in weights.names()}


def moved(model: Any, deltas: dict[str, Tensor]) -> Any:
    """A copy of the model with the differences added, in float32."""
    twin = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, delta in deltas.items():
            own_parameters(twin)[name].add_(delta)
    return twin


def slow_loss(model: Any, tokenizer: Any, pairs: list[Any]) -> Tensor:
    """One row at a time, without padding: the mean loss of the answers' tokens."""
    losses = []
    for prompt, answer in pairs:
        head, tail = prompt_ids(tokenizer, prompt), tokenizer(answer, add_special_tokens=False)["input_ids"]
        scores = torch.log_softmax(model(input_ids=torch.tensor([[*head, *tail]]), use_cache=False).logits[0], -1)
        losses.append(-torch.stack([scores[len(head) - 1 + i, token] for i, token in enumerate(tail)]).mean())
    return torch.stack(losses).mean()


def slow_training(
    model: Any, tokenizer: Any, names: list[str], sign: float, steps: int, rate: float
) -> dict[str, Tensor]:
    """The same training as a plain loop, all pairs in every step."""
    twin = copy.deepcopy(model).requires_grad_(False)
    weights = {name: parameter for name, parameter in twin.named_parameters() if name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, steps // 10))
        optimiser.zero_grad()
        (sign * slow_loss(twin, tokenizer, PAIRS)).backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimiser.step()
    base = dict(model.named_parameters())
    return {name: (weight - base[name]).detach() for name, weight in weights.items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
