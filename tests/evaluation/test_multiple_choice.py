"""Choices by letters and by text on tiny models, SafetyBench's scores, and a run that is taken up again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from postalign.alignment import Alignment
from postalign.errors import UsageError
from postalign.evaluation import multiple_choice as module
from postalign.evaluation.choice_questions import Question, Questions, question_prompt
from postalign.evaluation.multiple_choice import evaluate_choices, letter_tokens, multiple_choice, score
from postalign.models.chat import encode, token_ids
from tests.decoding.twin import push
from tests.tiny import tiny_model

WORDS = ["oven", "moon", "fox", "cat", "bread", "dog", "sea", "hour"]


def questions(n: int = 8, answers: bool = True) -> tuple[Question, ...]:
    rng = random.Random(0)
    found = []
    for i in range(n):
        options = tuple(rng.sample(WORDS, rng.randint(2, 4)))
        answer = rng.randrange(len(options)) if answers else None
        found.append(Question(str(i), f"What is a {WORDS[i % 8]}?", options, ("one", "two")[i % 2], answer))
    return tuple(found)


def plain(model: Any, tokenizer: Any, question: Question) -> int:
    """The same by the shortest way: the whole text, and the letters' logits behind the bracket."""
    ids = encode(tokenizer, [question_prompt(question)], answers=["("]).input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    letters = [token_ids(tokenizer, letter, beginning=False)[0] for letter in "ABCD"[: len(question.options)]]
    return int(logits[letters].argmax())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_letters_are_compared_where_the_reply_has_opened_a_bracket(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind, seed=3)
    asked = questions(12)
    choices = list(multiple_choice(model, tiny_tokenizer, asked))
    assert [one.chosen for one in choices] == [plain(model, tiny_tokenizer, one) for one in asked]
    assert [one.id for one in choices] == [one.id for one in asked]
    assert len({one.chosen for one in choices}) > 1, "a test that one answer to all would pass"
    for choice, question in zip(choices, asked, strict=True):
        assert choice.scores is not None and len(choice.scores) == len(question.options)
        assert choice.scores[choice.chosen or 0] == max(choice.scores) < 0


def test_an_alignment_and_a_system_message_and_examples_change_the_scores(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    asked = questions(2)
    shots = {"one": [replace(asked[0], question="What is ice?", answer=1)]}
    seen = [
        list(multiple_choice(tiny_llama, tiny_tokenizer, asked, *more, **settings))
        for more, settings in (
            ((), {}),
            ((Alignment("t", [push()]),), {}),
            ((), {"system_prompt": "You are a cat."}),
            ((), {"shots": shots}),
        )
    ]
    first = [choices[0].scores for choices in seen]
    assert len(set(first)) == 4
    assert seen[3][1].scores == seen[0][1].scores, "a category without examples is asked plainly"


def test_text_is_generated_and_parsed(monkeypatch: pytest.MonkeyPatch, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    asked = questions(5)
    real = list(multiple_choice(tiny_llama, tiny_tokenizer, asked, protocol="text", max_new_tokens=4, batch_size=2))
    alone = list(multiple_choice(tiny_llama, tiny_tokenizer, asked, protocol="text", max_new_tokens=4, batch_size=1))
    assert real == alone and all(one.reply is not None and one.scores is None for one in real)

    from postalign import decoding

    calls: list[dict[str, Any]] = []

    def says(model: Any, tokenizer: Any, prompts: list[Any], **settings: Any) -> list[Any]:
        calls.append({"prompts": prompts, **settings})
        return [decoding.Reply("(B)" if "moon" not in prompt else "Hm", [], None, "stop", 0.0) for prompt in prompts]

    monkeypatch.setattr(decoding, "generate_replies", says)
    chosen = [one.chosen for one in multiple_choice(tiny_llama, tiny_tokenizer, asked, protocol="text", batch_size=3)]
    assert chosen == [None if "moon" in question_prompt(one) else 1 for one in asked] and None in chosen
    assert [len(call["prompts"]) for call in calls] == [3, 2] and calls[0]["max_new_tokens"] == 64


def test_letters_need_a_token_each(tiny_tokenizer: Any) -> None:
    opening, letters = letter_tokens(tiny_tokenizer)
    assert tiny_tokenizer.decode(opening) == "(" and tiny_tokenizer.decode(letters) == "ABCD"

    class Split:
        def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text for _ in range(2)]}

    class Same(Split):
        def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
            return {"input_ids": [40 if c == "(" else 1 for c in text]}

    class Joined(Split):
        def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
            return {"input_ids": [sum(map(ord, text))]}

    with pytest.raises(UsageError, match=r"no one token for the letter A.*`text`"):
        letter_tokens(Split())
    with pytest.raises(UsageError, match="two letters the same token"):
        letter_tokens(Same())
    assert letter_tokens(Joined()) == ([40], [65, 66, 67, 68])
    with pytest.raises(UsageError, match="no protocol 'letter'"):
        next(multiple_choice(None, tiny_tokenizer, questions(1), protocol="letter"))  # type: ignore[arg-type]


def test_scores_are_the_benchmark_s() -> None:
    asked = [
        Question("a", "q", ("1", "2"), "x", 0),
        Question("b", "q", ("1", "2"), "x", 1),
        Question("c", "q", ("1", "2", "3", "4"), "x", 3),
        Question("d", "q", ("1", "2", "3", "4"), "y", 0),
    ]
    rows = {row["category"]: row for row in score(asked, {"a": 0, "b": 0, "d": 0})}
    assert list(rows) == ["x", "y", "all"]
    assert (rows["x"]["n"], rows["x"]["missing"], rows["x"]["accuracy"]) == (3, 1, round(1 / 3, 6))
    assert rows["y"]["accuracy"] == 1.0
    assert rows["all"]["accuracy"] == 0.5, "over all questions, not the mean of the categories"
    assert rows["x"]["chance"] == round((0.5 + 0.5 + 0.25) / 3, 6)
    assert rows["all"]["low"] < 0.5 < rows["all"]["high"]
    assert score(asked, {"a": 3})[0]["strict"] == 0.0, "a letter without an option is wrong, not unparsed"
    with pytest.raises(UsageError, match="1 questions have no known answer"):
        score([replace(asked[0], answer=None)], {"a": 0})


def test_what_is_unparsed_is_guessed_counted_and_shown_apart() -> None:
    asked = [Question(str(i), "q", ("1", "2", "3", "4"), "x", i % 4) for i in range(400)]
    (row, total) = score(asked, dict.fromkeys((one.id for one in asked), None))
    assert row["unparsed"] == 400 and row["strict"] == 0.0
    assert 0.15 < row["accuracy"] < 0.35, "a guess is right one time in four"
    backwards = score(asked[::-1], dict.fromkeys((one.id for one in asked), None))
    assert backwards[-1]["accuracy"] == total["accuracy"], "no order matters"
    assert score(asked, dict.fromkeys((one.id for one in asked), None), seed=1)[-1] != total


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Callable[..., list[dict[str, Any]]]:
    def call(asked: tuple[Question, ...], **more: Any) -> list[dict[str, Any]]:
        systems = {"base": None, "pushed": Alignment("t", [push()])}
        suite = Questions("mine", asked, {"file": "a.json"})
        return evaluate_choices(tiny_llama, tiny_tokenizer, systems, suite, out=tmp_path / "run", **more)

    return call


def test_a_run_is_taken_up_again(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = questions(6), tmp_path / "run"
    told: list[Any] = []

    class Killed(Exception):
        pass

    def kill(*progress: Any) -> None:
        told.append(progress)
        if len(told) == 4:
            raise Killed

    with pytest.raises(Killed):
        run(asked, on_progress=kill)
    assert len((out / "choices.jsonl").read_text().splitlines()) == 4
    summary = run(asked)
    whole = (out / "choices.jsonl").read_bytes()
    assert {(row["system"], row["category"]) for row in summary} == {
        (system, category) for system in ("base", "pushed") for category in ("one", "two", "all")
    }
    assert json.loads((out / "choices.json").read_text()) == summary
    assert json.loads((out / "run.json").read_text())["suites"]["mine"]["source"] == {"file": "a.json"}
    submitted = json.loads((out / "submission-pushed.json").read_text())
    assert list(submitted) == [one.id for one in asked] and all(isinstance(value, int) for value in submitted.values())
    monkeypatch.setattr(module, "_by_letters", lambda model, tokenizer, left, *more: iter([] if not left else [1 / 0]))
    assert run(asked) == summary and (out / "choices.jsonl").read_bytes() == whole, "nothing is asked twice"
    monkeypatch.undo()
    for path in out.iterdir():
        path.unlink()
    run(asked)
    assert (out / "choices.jsonl").read_bytes() == whole, "in one go it is the same"
    with pytest.raises(UsageError, match="protocol"):
        run(asked, protocol="text")
    with pytest.raises(UsageError, match="another suite under the name 'mine'"):
        run(asked[:-1])


def test_without_answers_it_is_run_and_scored_later(run: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    assert run(questions(4, answers=False)) == []
    before = (tmp_path / "run" / "choices.jsonl").read_bytes()
    known = tuple(replace(one, answer=0) for one in questions(4, answers=False))
    assert run(known)[-1]["n"] == 4
    assert (tmp_path / "run" / "choices.jsonl").read_bytes() == before
