"""A model that answers from a table, for tests of everything around generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from postalign.evaluation import likelihood, run_settings, runner
from postalign.evaluation.suites import Item, Suite


@dataclass
class FakeAlignment:
    """What the runner touches of an alignment; `says(prompt)` is its reply."""

    says: Callable[[str], str] = lambda prompt: "Sure, here it is."
    strength: float = 1.0
    method: str = "fake"
    gate: Any = None
    info: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)

    @property
    def edits(self) -> list[Any]:
        return [self]

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {"kind": "fake", "strength": self.strength}, {}

    def check(self, model: Any, tokenizer: Any = None) -> None:
        pass


@dataclass
class FakeEngine:
    """Counts what it was asked; dies at the call `dies_at`, as a kill would."""

    base: Callable[[str], str] = lambda prompt: (
        "I can't help with that." if "harm" in prompt else "Of course: use tape."
    )
    dies_at: int | None = None
    asked: list[str] = field(default_factory=list)
    calls: int = 0
    scored: int = 0

    def generate_replies(self, model: Any, tokenizer: Any, prompts: Sequence[str], **settings: Any) -> list[Any]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.asked += prompts
        alignment = settings["alignment"]
        texts = [(alignment.says if alignment else self.base)(prompt) for prompt in prompts]
        return [SimpleNamespace(text=t, token_ids=list(range(len(t.split()))), seconds=0.5) for t in texts]

    def next_token_log_probs(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Any],
        answers: Sequence[str],
        alignment: Any = None,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Base: uniform over four tokens. Aligned: half the probability on token 0."""
        self.scored += len(prompts)
        p = [0.25] * 4 if alignment is None else [0.5, 0.25, 0.125, 0.125]
        return [(torch.tensor([p] * 3).log(), torch.tensor([0, 1, 2])) for _ in answers]


def use(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, name: str = "model-a") -> FakeEngine:
    """Put `engine` and a model of that name in the place of the real ones."""
    monkeypatch.setattr(runner, "_engine", lambda: engine)
    monkeypatch.setattr(likelihood, "_scorer", lambda: engine.next_token_log_probs)
    monkeypatch.setattr(run_settings, "_fingerprint", lambda model, tokenizer: {"model": name, "config": name})
    return engine


def suite(n: int = 5, name: str = "mine") -> Suite:
    """`n` harmful and `n` benign prompts."""
    harmful = [Item(f"h{i}", "harmful", f"harm {i} <b>&") for i in range(n)]
    return Suite(name, (*harmful, *(Item(f"b{i}", "benign", f"tape {i}") for i in range(n))))
