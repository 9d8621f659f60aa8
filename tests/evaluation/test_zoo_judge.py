"""The judgezoo adapter with a stand-in for that package: its call, its scores, its absence."""

from __future__ import annotations

import builtins
import sys
from types import ModuleType
from typing import Any

import pytest

from postalign.errors import PostalignError, UsageError
from postalign.evaluation.judges import judge_all
from postalign.evaluation.zoo_judge import ZooJudge


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A package `judgezoo` whose judge scores by the reply; the list holds the conversations that it was given."""
    asked: list[Any] = []

    class Judge:
        @classmethod
        def from_name(cls, name: str, **settings: Any) -> Any:
            if name != "strong_reject":
                raise ValueError(f"Unknown judge {name}")
            return lambda chats: asked.append(chats) or {"p_harmful": [scores[c[-1]["content"]] for c in chats]}

    scores = {"do this": 0.9, "no": 0.1, "what": None, "how": float("nan")}
    module = ModuleType("judgezoo")
    module.Judge = Judge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "judgezoo", module)
    return asked


def test_scores_become_verdicts(zoo: list[Any]) -> None:
    pairs = [("p", "do this"), ("p", ""), ("p", "no"), ("p", "what"), ("p", "how")]
    verdicts = judge_all(ZooJudge("strong_reject"), pairs)
    assert [v.verdict for v in verdicts] == ["compliance", "unscored", "refusal", "unscored", "unscored"]
    assert [v.score for v in verdicts] == [0.9, None, 0.1, None, None]
    assert zoo[0][0] == [{"role": "user", "content": "p"}, {"role": "assistant", "content": "do this"}]
    assert len(zoo) == 1 and len(zoo[0]) == 4, "one call, without the reply that has no words"


def test_an_unknown_judge_is_wrong_use(zoo: list[Any]) -> None:
    with pytest.raises(UsageError, match="Unknown judge nobody"):
        ZooJudge("nobody")


def test_without_the_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def absent(name: str, *args: Any, **more: Any) -> Any:
        if name == "judgezoo":
            raise ImportError(name)
        return plain(name, *args, **more)

    monkeypatch.delitem(sys.modules, "judgezoo", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(PostalignError, match=r"pip install 'postalign\[judges\]'"):
        ZooJudge("strong_reject")
