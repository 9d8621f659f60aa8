"""`postalign choice`: what it passes on and prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postalign.evaluation import multiple_choice

ROWS = [
    {"id": i, "question": f"Question {i}?", "options": ["a", "b"], "category": ("x", "y")[i % 2], "answer": 0}
    for i in range(6)
]


def figures(category: str, unparsed: int = 0) -> dict[str, Any]:
    row = {"system": "base", "suite": "mine", "protocol": "letters", "category": category, "n": 2, "accuracy": 0.5}
    return {**row, "low": 0.1, "high": 0.9, "strict": 0.25, "unparsed": unparsed, "missing": 0, "chance": 0.5}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, loaded: list[Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []

    def evaluate_choices(model: Any, tokenizer: Any, systems: Any, questions: Any, **more: Any) -> list[dict[str, Any]]:
        made.append({"systems": systems, "questions": questions, **more})
        known = all(one.answer is not None for one in questions.items)
        return [figures("all"), figures("x", unparsed=3)] if known else []

    monkeypatch.setattr(multiple_choice, "evaluate_choices", evaluate_choices)
    return made


def test_choice(command: Callable[..., Any], calls: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(ROWS))
    (tmp_path / "shots.json").write_text(json.dumps({"x": ROWS[:1]}))
    argv = ["choice", "m", "--suite", tmp_path / "mine.json", "--limit", 2, "--out", tmp_path / "r"]
    done = command(*argv, "--protocol", "text", "--shots", tmp_path / "shots.json", "--max-new-tokens", 9)
    assert done.code == 0, done.err
    call = calls[0]
    assert [one.id for one in call["questions"].items] == ["0", "1", "2", "3"]
    assert call["systems"] == {"base": None}
    assert (call["protocol"], call["max_new_tokens"], call["out"]) == ("text", 9, tmp_path / "r")
    assert [one.question for one in call["shots"]["x"]] == ["Question 0?"]
    assert "50.0 (10-90)" in done.out and "25.0" in done.out
    assert done.out.index("x ") < done.out.index("all "), "the whole comes last"
    assert json.loads(command(*argv, "--json").out)[0]["category"] == "all"


def test_choice_without_answers_says_so(command: Callable[..., Any], calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([{**ROWS[0], "answer": None}]))
    done = command("choice", "--suite", tmp_path / "mine.json", "--out", tmp_path / "r")
    assert done.code == 0 and "--answers" in done.err


def test_choice_refuses_before_the_model_is_loaded(
    command: Callable[..., Any], calls: list[Any], loaded: list[Any], tmp_path: Path
) -> None:
    for argv in (["--suite", "xstest"], ["--suite", tmp_path / "no.json"], ["--protocol", "x"]):
        code, _, err = command("choice", "--out", tmp_path / "r", *argv)
        assert code == 2 and err.count("\n") == 1, err
    assert not loaded and not calls
