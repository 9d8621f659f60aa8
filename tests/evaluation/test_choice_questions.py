"""Multiple-choice questions: their files, their wording, and the letter in a reply. All questions here are our own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from postalign.errors import UsageError
from postalign.evaluation.benchmarks import BENCHMARKS
from postalign.evaluation.choice_questions import (
    Question,
    Questions,
    load_questions,
    load_shots,
    parse_choice,
    question_prompt,
)

ROWS = [
    {"id": 0, "question": "Is fire hot? ", "options": ["Yes", "No"], "category": "Physical Health"},
    {"id": 1, "question": "火热吗？", "options": ["对", "不", "也许"], "category": "Mental Health"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test_en.json"
    path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    return path


def test_a_file_in_the_published_columns_with_its_answers(file: Path, tmp_path: Path) -> None:
    loaded = load_questions(f"safetybench={file}")
    assert loaded.name == "safetybench" and loaded.source["files"] == ["test_en.json"]
    assert loaded.items[0] == Question("0", "Is fire hot? ", ("Yes", "No"), "Physical Health")
    answers = tmp_path / "test_answers_en.json"
    answers.write_text(json.dumps({"1": {"category": "x", "answer": 2}, "0": {"category": "x", "answer": 0}}))
    known = load_questions(f"safetybench={file}", answers=answers)
    assert [one.answer for one in known.items] == [0, 2]
    assert known.hash == loaded.hash, "a run can be scored later"
    assert load_questions(f"safetybench:zh={file}").name == "safetybench:zh"
    assert load_questions(f"mine={file}").name == "mine" and load_questions(str(file)).name == "test_en"


def test_the_hub_is_asked_for_its_pinned_test_split(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    asked: list[Any] = []

    def load_dataset(*place: str, split: str, revision: str) -> Any:
        asked.append((*place, split, revision))
        return ROWS if place[1] == "test" else [{"Physical Health": [{**ROWS[0], "answer": 0}]}]

    fake = SimpleNamespace(load_dataset=load_dataset, are_progress_bars_disabled=lambda: True)
    fake.disable_progress_bars = fake.enable_progress_bars = lambda: None
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.delenv("POSTALIGN_DATA", raising=False)
    commit = BENCHMARKS["safetybench"].revision
    assert load_questions("safetybench:zh_subset").source["revision"] == commit
    assert load_questions("safetybench").items[1].options == ("对", "不", "也许")
    assert load_shots("zh")["Physical Health"][0].answer == 0
    place = "thu-coai/SafetyBench"
    assert asked == [(place, "test", "zh_subset", commit), (place, "test", "en", commit), (place, "dev", "zh", commit)]
    monkeypatch.setenv("POSTALIGN_DATA", str(file.parent))
    file.rename(file.with_name("safetybench_zh.json"))
    assert load_questions("safetybench:zh").source["files"] == ["safetybench_zh.json"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": " ", "options": ["a", "b"]}, "item 1: a question needs a text"),
        ({"question": "q", "options": ["a"]}, "item 1: `options` must be a list of 2 to 4"),
        ({"question": "q", "options": ["a", "b", "c", "d", "e"]}, "list of 2 to 4"),
        ({"question": "q", "options": "a"}, "list of 2 to 4"),
        ({"question": "q", "options": ["a", "b"], "answer": 2}, "0 to 1"),
        ({"question": "q", "options": ["a", "b"], "answer": True}, "0 to 1"),
    ],
)
def test_malformed_questions(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(UsageError, match=message):
        load_questions(str(tmp_path / "a.json"))


def test_wrong_sources(file: Path, tmp_path: Path) -> None:
    for source, message in (
        ("xstest", "not multiple choice: run `postalign eval"),
        ("safetybench:fr", "no part 'fr'"),
        ("safetybnch", "Did you mean 'safetybench'"),
    ):
        with pytest.raises(UsageError, match=message):
            load_questions(source)
    (tmp_path / "twice.json").write_text(json.dumps([ROWS[0], ROWS[0]]))
    with pytest.raises(UsageError, match="two questions with one id"):
        load_questions(str(tmp_path / "twice.json"))
    for text, message in (
        ('{"0": 0}', "no answer of 0 to 2 for question 1"),
        ('{"0": 7}', "question 0"),
        ("[", "not JSON"),
    ):
        (tmp_path / "answers.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            load_questions(f"safetybench={file}", answers=tmp_path / "answers.json")
    (tmp_path / "shots.json").write_text(json.dumps({"Physical Health": [ROWS[0]]}))
    with pytest.raises(UsageError, match="has no answer"):
        load_shots(tmp_path / "shots.json")
    (tmp_path / "shots.json").write_text("[]")
    with pytest.raises(UsageError, match="must hold"):
        load_shots(tmp_path / "shots.json")


def test_limited_takes_evenly_from_each_category() -> None:
    rows = tuple(Question(str(i), "q", ("a", "b"), "x" if i < 10 else "y") for i in range(13))
    assert [one.id for one in Questions("s", rows, {}).limited(5).items] == ["0", "2", "4", "6", "8", "10", "11", "12"]
    with pytest.raises(UsageError, match="1 or more"):
        Questions("s", rows, {}).limited(0)


def test_wording_in_both_languages_and_with_examples() -> None:
    english = Question("0", " Is fire hot? ", ("Yes", "No"), "c")
    assert question_prompt(english) == "Question: Is fire hot?\nOptions:\n(A) Yes\n(B) No\nAnswer:"
    chinese = Question("1", "火热吗？", ("对", "不"), "c")
    assert question_prompt(chinese) == "问题：火热吗？\n选项：\n(A) 对\n(B) 不\n答案："
    shown = question_prompt(english, [Question("2", "Is ice hot?", ("Yes", "No"), "c", 1)])
    header, example, asked = shown.split("\n\n")
    assert "multiple-choice" in header
    assert example.endswith("(B) No\nAnswer: (B)") and asked == question_prompt(english)


OPTIONS = ("Run away.", "Call for help", "Nothing")


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("(B) Call for help", 1),
        ("B", 1),
        ("The answer is C", 2),
        ("The answer is C.", 2),
        ("B. That is best", 1),
        ("B because", 1),
        ("答案：C。因为", 2),
        ("A：跑", 0),
        ("(D)", 3),  # no such option: an answer, and a wrong one
        ("you should call FOR help now", 1),
        ("run away", 0),  # the final stop of the option may be missing
        ("Let me think\n\n(C)", 2),
        ("\n  \nC", 2),
        ("(A) or (B)", 0),  # the first letter that stands so, as the rules are
        ("I would rather not say", None),
        ("Let me think\nI cannot\n(C)", None),  # only the second line is read beside the first
        ("", None),
        ("   ", None),
        ("ABLE", None),
    ],
)
def test_a_letter_in_a_reply(reply: str, chosen: int | None) -> None:
    assert parse_choice(reply, OPTIONS) == chosen


def test_yes_and_no_stand_for_right_and_wrong_in_chinese() -> None:
    assert parse_choice("是的", ("对", "不")) == 0
    assert parse_choice("否", ("对", "不")) == 1
    assert parse_choice("是的", ("好", "坏")) is None
