"""`postalign benchmark build` and `list`: what they pass on and print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postalign.evaluation import construction

ROWS = [{"category": "A"}, {"category": "A"}, {"category": "B"}]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, loaded: list[Any]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def build(policies: Any, writer: Any, checker: Any, out: Path, **more: Any) -> list[dict[str, Any]]:
        calls.append({"policies": policies, "writer": writer, "checker": checker, "out": out, **more})
        return ROWS

    monkeypatch.setattr(construction, "build", build)
    return calls


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text("- {name: A, description: a}\n- {name: B, description: b}\n")
    return path


def test_build(
    command: Callable[..., Any], built: list[Any], loaded: list[Any], policies: Path, tmp_path: Path
) -> None:
    (tmp_path / "known.jsonl").write_text('{"prompt": "known"}\n')
    argv = ["benchmark", "build", "--policies", policies, "--writer", "m", "--checker", "m", "--out", tmp_path / "b"]
    done = command(*argv, "--count", 2, "--seed", 3, "--unlike", tmp_path / "known.jsonl", "--harm-threshold", 0.25)
    assert done.code == 0, done.err
    call = built[0]
    assert [(policy.name, policy.count) for policy in call["policies"]] == [("A", 2), ("B", 2)]
    assert call["writer"] is call["checker"] and len(loaded) == 1, "one model is loaded once"
    assert (call["toxicity"], call["toxicity_name"], call["unlike"]) == (None, "checker", ["known"])
    recipe = call["recipe"]
    assert (recipe.seed, recipe.harm, recipe.toxicity, recipe.balanced) == (3, 0.25, 0.7, True)
    assert "3 questions" in done.out and "B 1 of 2" in done.err and "A" not in done.err.replace("B 1 of 2", "")[:20]
    assert json.loads(command(*argv, "--json").out)["categories"] == {"A": 2, "B": 1}


def test_toxicity_by_another_model(
    command: Callable[..., Any], built: list[Any], policies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postalign.evaluation import chat_models, toxicity

    monkeypatch.setattr(chat_models.EndpointChat, "yes", lambda self, prompts: [float("rude" in p) for p in prompts])
    named: list[Any] = []
    monkeypatch.setattr(
        toxicity, "classifier", lambda name, label=None: named.append((name, label)) or (lambda t: [1.0])
    )
    argv = ["benchmark", "build", "--policies", policies, "--writer", "w", "--checker", "c", "--unbalanced", "--out"]
    assert command(*argv, tmp_path / "b", "--toxicity", "http://localhost/v1#tone").code == 0
    assert built[0]["toxicity"](["x", "y"]) == [1.0, 1.0] and built[0]["toxicity_name"] == "http://localhost/v1#tone"
    assert built[0]["recipe"].balanced is False
    assert command(*argv, tmp_path / "c", "--toxicity", "classifier:some/model#toxic").code == 0
    assert command(*argv, tmp_path / "d", "--toxicity", "classifier:some/model").code == 0
    assert named == [("some/model", "toxic"), ("some/model", None)]


def test_wrong_use_is_told_before_a_model_is_loaded(
    command: Callable[..., Any], built: list[Any], loaded: list[Any], policies: Path, tmp_path: Path
) -> None:
    argv = ["benchmark", "build", "--writer", "m", "--checker", "m", "--out", tmp_path / "b"]
    for more in (["--policies", tmp_path / "none.yaml"], ["--policies", policies, "--unlike", tmp_path / "no.jsonl"]):
        code, _, err = command(*argv, *more)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert command("benchmark", "build", "--out", tmp_path / "b").code == 2
    assert not loaded and not built
    argv[3] = "http://localhost/v1"
    code, _, err = command(*argv, "--policies", policies)
    assert code == 2 and "#MODEL" in err


def test_list(command: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in json.loads(command("benchmark", "list", "--json").out)}
    assert len(rows) == 16 and rows["harmeval"]["gated"] and rows["advbench"]["revision"] is None
    assert rows["jailbreakbench"]["parts"] == {"harmful": 100, "benign": 100}
    shown = command("benchmark", "list").out
    assert "SoftMINER-Group/HarmEval (gated)" in shown and "not pinned" in shown
