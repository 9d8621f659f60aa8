"""Data, settings and a judge with which SafeInfer is fitted on a tiny model in a second. Knows no test."""

from __future__ import annotations

from typing import Any

from postalign import methods
from postalign.alignment import Alignment
from postalign.data.records import Data, Prompt

THINGS = ("bread", "moon", "oven", "fox", "dog", "sea")
REFUSALS = ("I cannot help with that. Ask a baker.", "Sorry, I will not. It may hurt.", "No. Try a story.")


def rows(harmful: int, benign: int, split: str | None, first: int = 0) -> list[Prompt]:
    return [
        *(
            Prompt(f"How do I harm a {THINGS[i]}?", "harmful", response=REFUSALS[i % 3], split=split)
            for i in range(first, first + harmful)
        ),
        *(Prompt(f"Tell me of the {THINGS[i]}.", "benign", split=split) for i in range(first, first + benign)),
    ]


DATA = Data([*rows(4, 4, "fit"), *rows(2, 2, "tune", first=4), *rows(1, 1, "test")], "mine")
SMALL: dict[str, Any] = {
    "shots": 2, "trials": 3, "effect_prompts": 3, "heads": 2, "strengths": [0.5, 1.0],
    "guide": "adapter", "guide_pairs": 2, "guide_steps": 2, "guide_rank": 2,
}  # fmt: skip
ALL_STAGES = [
    "mean head outputs",
    "indirect effects of heads",
    "choosing strength",
    "pairs for the unsafe guide",
    "training the unsafe guide",
    "states for the gate",
    "fitting the gate",
]


def by_bytes(prompt: str, reply: str) -> str:
    """A stand-in for a judge: any word will do, as long as it is the same for the same reply."""
    return ("refusal", "compliance", "degenerate")[sum(reply.encode()) % 3]


def fit(model: Any, tokenizer: Any, *, data: Data = DATA, judge: Any = by_bytes, **settings: Any) -> Alignment:
    where = {key: settings.pop(key) for key in ("on_progress", "workdir") if key in settings}
    return methods.fit("safeinfer", model, tokenizer, data=data, judge=judge, config={**SMALL, **settings}, **where)


class Told:
    """Records progress; raises KeyboardInterrupt at the first report of `stage`."""

    def __init__(self, stage: str = ""):
        self.stage, self.stages = stage, []

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 1 <= done <= total
        stage, _, figure = stage.partition(" | ")
        assert not figure or float(figure.removeprefix("loss ")) >= 0
        if stage not in self.stages:
            self.stages.append(stage)
        if stage == self.stage:
            raise KeyboardInterrupt
