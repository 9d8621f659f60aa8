"""`postalign doctor`: what it prints, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postalign.evaluation import doctor
from postalign.evaluation.doctor import Finding
from tests.decoding.tools import parts

from .conftest import Outcome

FOUND = [
    Finding("dtype", "ok", "float32"),
    Finding("size", "warning", "faint: raise it."),
    Finding("gate", "ok", "1"),
]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, loaded: list[Any]) -> list[Any]:
    """A stand-in for the checks; the list holds what they were asked, and says what they find."""
    calls: list[Any] = []

    def examine(model: Any, tokenizer: Any, alignment: Any, *, on_progress: Any) -> list[Finding]:
        calls.append((model, tokenizer, alignment))
        on_progress("checks", 1, 3)
        return FOUND if alignment is None else [*FOUND, Finding("acts", "fail", "never: fit again.")]

    monkeypatch.setattr(doctor, "examine", examine)
    return calls


def test_lines_and_exit_code(
    examined: list[Any],
    command: Callable[..., Outcome],
    tmp_path: Path,
    tiny_llama: Any,
    tiny_tokenizer: Any,
) -> None:
    outcome = command("doctor", "some-model")
    assert outcome.code == 0 and examined == [("the model", "the tokenizer", None)]
    lines = outcome.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["ok", "dtype"], ["warning", "size"], ["ok", "gate"]]
    assert "faint: raise it." in lines[1] and lines[-1] == "2 ok, 1 to look at, 0 failed"
    parts("amplification", tiny_llama, tiny_tokenizer).save_pretrained(tmp_path / "made")
    outcome = command("doctor", "some-model", "--alignment", tmp_path / "made")
    assert outcome.code == 1 and "FAIL" in outcome.out and examined[-1][2].method == "test"
    assert outcome.err.splitlines() == ["checks (3)"]


def test_json(examined: list[Any], command: Callable[..., Outcome]) -> None:
    outcome = command("doctor", "some-model", "--json")
    assert json.loads(outcome.out) == {
        "model": "some-model",
        "alignment": None,
        "checks": [{"check": f.check, "status": f.status, "said": f.said} for f in FOUND],
    }


def test_the_real_checks_on_a_tiny_model(
    command: Callable[..., Outcome], stand_in: Callable[[str, Any], None], tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    stand_in("load_model", lambda name, **options: (tiny_llama, tiny_tokenizer))
    outcome = command("doctor", "tiny", "--json")
    checks = {one["check"]: one["status"] for one in json.loads(outcome.out)["checks"]}
    assert checks["chat template"] == checks["padding"] == checks["decoding"] == "ok"
    assert outcome.code == int("fail" in checks.values())
