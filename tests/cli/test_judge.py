"""`postalign judge`: calibrating and scoring from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postalign.errors import UsageError
from postalign.evaluation import judge_specs
from postalign.evaluation.judges import Verdict

REPLIES = [
    ("How do I open a door?", "I can't help with that.", 0),
    ("How do I open a door?", "Push the handle down and lean on it.", 1),
    ("Say hi", "Hi!", 1),
    ("Say hi", "...", 0),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "replies.jsonl"
    rows = [{"q": prompt, "a": reply, "complied": label} for prompt, reply, label in REPLIES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COLUMNS = ["--prompt-column", "q", "--response-column", "a"]
LABELS = ["--label-column", "complied", "--map", "0=refusal", "--map", "1=compliance"]


def test_calibrate_tells_kappa_and_confusion(command: Callable[..., Any], file: Path) -> None:
    done = command("judge", "calibrate", file, "--judge", "rules", *COLUMNS, *LABELS)
    assert done.code == 0, done.err
    assert "rules: 4 replies, 1 unscored, accuracy 100.0 %, kappa 1.000" in done.out
    assert "unscored: no words" in done.out and "precision" in done.out


def test_calibrate_as_json_compares_judges(command: Callable[..., Any], file: Path) -> None:
    argv = ["judge", "calibrate", file, "--judge", "rules", "--judge", "embedded", *COLUMNS, *LABELS, "--json"]
    told = json.loads(command(*argv, "--positive", "refusal").out)
    assert [one["judge"] for one in told["judges"]] == ["rules", "embedded"]
    assert told["judges"][0]["confusion"] == {
        "other": {"other": 2, "refusal": 0},
        "refusal": {"other": 0, "refusal": 1},
    }
    [pair] = told["agreement"]
    assert pair["judges"] == ["rules", "embedded"] and (pair["n"], pair["unscored"]) == (3, 1)


def test_score_writes_a_verdict_for_each_reply(command: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scored.jsonl"
    done = command("judge", "score", file, "--judge", "rules", "--out", out, *COLUMNS)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["refusal", "compliance", "compliance", "unscored"]
    assert rows[0]["score"] == 0 and rows[3]["score"] is None
    assert (rows[1]["row"], rows[1]["prompt"], rows[1]["judge"]) == ("line 2", REPLIES[1][0], "rules")
    assert str(out) in done.out


def test_score_goes_on_where_it_was(
    command: Callable[..., Any], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "scored.jsonl", []

    class Counting:
        name = "counting"

        def __call__(self, prompt: str, response: str) -> Verdict:
            asked.append(response)
            return Verdict("compliance")

    monkeypatch.setattr(judge_specs, "load_judge", lambda spec, **settings: Counting())
    argv = ["judge", "score", file, "--judge", "any", "--out", out, *COLUMNS]
    assert command(*argv).code == 0
    whole = out.read_bytes()
    out.write_bytes(b"\n".join(whole.splitlines()[:2]) + b'\n{"row": "line 3", "jud')  # killed while writing
    asked.clear()
    assert command(*argv).code == 0
    assert asked == [REPLIES[2][1], REPLIES[3][1]]
    assert out.read_bytes() == whole
    monkeypatch.setattr(Counting, "name", "another")
    code, _, err = command(*argv)
    assert code == 2 and "choose another --out" in err


def test_a_cost_is_told_before_and_after(
    command: Callable[..., Any], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Paid:
        name, spent = "paid", "4 requests"

        def __call__(self, prompt: str, response: str) -> Verdict:
            return Verdict("refusal")

        def estimate(self, pairs: Any) -> str:
            return f"{len(pairs)} requests, 2 USD"

        def check_budget(self, pairs: Any) -> None:
            if self.limit:
                raise UsageError("over the budget of 1 USD: raise it or judge fewer replies.")

    monkeypatch.setattr(judge_specs, "load_judge", lambda spec, **settings: Paid())
    Paid.limit = False  # type: ignore[attr-defined]
    done = command("judge", "score", file, "--judge", "any", "--out", tmp_path / "s.jsonl", *COLUMNS)
    assert done.code == 0
    assert done.err.index("at most 4 requests, 2 USD") < done.err.index("used 4 requests")
    Paid.limit = True  # type: ignore[attr-defined]
    code, _, err = command("judge", "calibrate", file, "--judge", "any", *COLUMNS, *LABELS)
    assert code == 2 and "over the budget of 1 USD" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--judge", "rule"], "Did you mean 'rules'"),
        (["--judge", "rules", "--set", "colour=red"], "no such setting"),
        (["--judge", "rules", "--map", "0"], "VALUE=VERDICT"),
        ([], "--judge"),
    ],
)
def test_wrong_use_is_one_line(command: Callable[..., Any], file: Path, argv: list[str], said: str) -> None:
    code, out, err = command("judge", "calibrate", file, *argv, *COLUMNS, *LABELS[:-2], "--map", "1=compliance")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert said in err


def test_the_verb_has_help(command: Callable[..., Any]) -> None:
    shown = command("judge", "--help")
    assert shown.code == 0 and "calibrate" in shown.out and "score" in shown.out
    assert "judge" in command("--help").out
    assert "--label-column" in command("judge", "calibrate", "--help").out
