"""Judges against labels: reading the file, and figures that can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from postalign.errors import UsageError
from postalign.evaluation.calibration import CHUNK, Replies, between, calibrate, judge_in_chunks, read_replies
from postalign.evaluation.judges import Verdict

ROWS = [
    {"prompt": "p1", "response": "no", "label": "refusal"},
    {"prompt": "p1", "response": "yes", "label": "compliance"},
    {"prompt": "p2", "response": "no", "label": "compliance"},
    {"prompt": "p3", "response": "yes", "label": "compliance"},
    {"prompt": "p3", "response": "?", "label": "refusal"},
]


def said(prompt: str, response: str) -> Verdict:
    """no: refusal, yes: compliance, half: partial; anything else is a failure."""
    return Verdict({"no": "refusal", "yes": "compliance", "half": "partial"}[response])  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_figures_are_those_counted_by_hand(file: Path) -> None:
    figures, verdicts = calibrate(said, read_replies(file, label="label"))
    assert (figures["n"], figures["scored"], figures["unscored"]) == (5, 4, 1)
    assert (figures["accuracy"], figures["accuracy_of_all"]) == (0.75, 0.6)
    assert figures["kappa"] == 0.5  # seen 3/4, by chance (1 * 2 + 3 * 2) / 16
    assert figures["low"] <= 0.5 <= figures["high"]
    assert figures["verdicts"]["refusal"]["precision"]["value"] == 0.5
    assert figures["verdicts"]["refusal"]["recall"]["value"] == 1.0
    assert figures["verdicts"]["compliance"]["recall"] == {"n": 3, "value": 0.6667, "low": 0.2077, "high": 0.9385}
    assert figures["confusion"]["compliance"] == {"compliance": 2, "refusal": 1}
    assert "KeyError" in figures["unscored_reasons"][0]
    assert verdicts[-1].verdict == "unscored"


def test_one_verdict_against_all_others() -> None:
    replies = Replies(
        [("a", "no"), ("b", "half"), ("c", "yes")], ["refusal", "compliance", "compliance"], ["1", "2", "3"]
    )
    assert calibrate(said, replies)[0]["accuracy"] == 0.6667
    figures, _ = calibrate(said, replies, positive="refusal")
    assert (figures["accuracy"], figures["kappa"], set(figures["verdicts"])) == (1.0, 1.0, {"refusal", "other"})
    with pytest.raises(UsageError, match="Did you mean 'refusal'"):
        calibrate(said, replies, positive="refuse")


def test_a_judge_that_scores_nothing_has_no_kappa(file: Path) -> None:
    def fails(prompt: str, response: str) -> Verdict:
        raise ValueError("no")

    figures, _ = calibrate(fails, read_replies(file, label="label"))
    assert (figures["scored"], figures["kappa"], figures["accuracy"], figures["accuracy_of_all"]) == (0, None, None, 0)
    json.dumps(figures, allow_nan=False)


def test_two_judges_are_compared_where_both_scored() -> None:
    one = [Verdict("refusal"), Verdict("compliance"), Verdict("unscored"), Verdict("compliance")]
    other = [Verdict("refusal"), Verdict("compliance"), Verdict("refusal"), Verdict("unscored")]
    found = between(one, other, [("a", ""), ("b", ""), ("c", ""), ("d", "")])
    assert (found["n"], found["unscored"], found["kappa"]) == (2, 2, 1.0)


@pytest.mark.parametrize("value", [1, "1", True, 1.0])
def test_labels_are_mapped_whatever_their_type(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"q": "p", "a": "r", "bad": value}) + "\n" + json.dumps({"q": "p", "a": "s", "bad": 3}))
    columns = {"prompt": "q", "response": "a", "label": "bad"}
    replies = read_replies(path, **columns, mapping={"1": "compliance", "3": "skip"})
    assert (replies.pairs, replies.labels, replies.where) == ([("p", "r")], ["compliance"], ["line 1"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "lable"}, "line 1: no column 'lable'. Did you mean 'label'?"),
        ({"prompt": "label", "response": "answer"}, "no column 'answer'"),
        ({"label": "response"}, "--map no=refusal"),
        ({"label": "label", "mapping": {"refusal": "refuse"}}, "Did you mean 'refusal'"),
        ({"label": "label", "mapping": {"refusal": "skip", "compliance": "skip"}}, "no reply to judge"),
    ],
)
def test_files_that_do_not_fit_are_told(file: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_replies(file, **settings)
    assert message in str(refused.value)


def test_a_limit_takes_the_first_rows(file: Path) -> None:
    assert read_replies(file, limit=2).where == ["line 1", "line 2"]
    with pytest.raises(UsageError, match="needs labels"):
        calibrate(said, read_replies(file))


def test_progress_and_the_budget_come_before_the_work() -> None:
    class Poor:
        name = "poor"
        asked = 0

        def __call__(self, prompt: str, response: str) -> Verdict:
            self.asked += 1
            return Verdict("refusal")

        def check_budget(self, pairs: Any) -> None:
            if len(pairs) > 100:
                raise UsageError("over the budget")

    seen: list[tuple[str, int, int]] = []
    judge = Poor()
    chunks = list(judge_in_chunks(judge, [("p", "r")] * (CHUNK + 6), lambda *step: seen.append(step)))
    assert [len(chunk) for chunk in chunks] == [CHUNK, 6]
    assert seen == [("poor", CHUNK, CHUNK + 6), ("poor", CHUNK + 6, CHUNK + 6)]
    with pytest.raises(UsageError, match="over the budget"):
        list(judge_in_chunks(judge, [("p", "r")] * 101))
    assert judge.asked == CHUNK + 6
