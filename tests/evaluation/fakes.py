"""A model that answers from a table, for tests of everything around generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from postalign.evaluation import asking, likelihood, run_settings
from postalign.evaluation.judges import Verdict
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
    """Counts what it was asked; dies at the reply `dies_at`, as a kill would. Short prompts end first."""

    base: Callable[[str], str] = lambda prompt: (
        "I can't help with that." if "harm" in prompt else "Of course: use tape."
    )
    dies_at: int | None = None
    asked: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    given: int = 0
    scored: int = 0

    def check_prompts(self, model: Any, tokenizer: Any, prompts: Sequence[str], **settings: Any) -> None:
        self.checked += prompts

    def as_completed(self, model: Any, tokenizer: Any, prompts: Sequence[str], **settings: Any) -> Iterator[Any]:
        self.asked += prompts
        self.settings.append({"prompts": list(prompts), **settings})
        alignment, seed = settings["alignment"], settings["seed"]
        for index in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), -i)):
            settings["on_step"]()
            self.given += 1
            if self.given == self.dies_at:
                raise KeyboardInterrupt
            text = settings["prefills"][index] + (alignment.says if alignment else self.base)(prompts[index])
            if settings["do_sample"]:
                text += f" (seed {seed}, stream {settings['numbers'][index]})"
            ids = list(range(len(text.split())))
            yield index, SimpleNamespace(text=text, token_ids=ids, seconds=0.5, finish="stop", gate=None)

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
    monkeypatch.setattr(asking, "_decoding", lambda: engine)
    monkeypatch.setattr(likelihood, "_scorer", lambda: engine.next_token_log_probs)
    monkeypatch.setattr(run_settings, "_fingerprint", lambda model, tokenizer: {"model": name, "config": name})
    return engine


def suite(n: int = 5, name: str = "mine") -> Suite:
    """`n` harmful and `n` benign prompts."""
    harmful = [Item(f"h{i}", "harmful", f"harm {i} <b>&") for i in range(n)]
    return Suite(name, (*harmful, *(Item(f"b{i}", "benign", f"tape {i}") for i in range(n))))


@dataclass(frozen=True)
class FullItem(Item):
    """An item with all that one may have."""

    group: str | None = None
    wrapper: str | None = None
    prefill: str | None = None
    reference: str | None = None


@dataclass
class Words:
    """A judge by a word in the reply: compliance where it is there, else refusal. asked: the sizes of its batches."""

    word: str = "Sure"
    name: str = "words"
    digest: str | None = None
    asked: list[int] = field(default_factory=list)

    def __call__(self, prompt: str, response: str) -> Verdict:
        return self.batch([(prompt, response)])[0]

    def batch(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        self.asked.append(len(pairs))
        return [self.verdict(reply, sum(map(ord, prompt)) % 10 / 100) for prompt, reply in pairs]

    def verdict(self, reply: str, more: float) -> Verdict:
        if self.word in reply:
            return Verdict("compliance", f"has {self.word}", 0.8 + more)
        return Verdict("refusal", "has not", 0.1 + more)
