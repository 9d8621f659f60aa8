"""Runs with a fake engine: what is written, resumed, refused and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from postalign.errors import PostalignError, UsageError
from postalign.evaluation import evaluate
from postalign.evaluation.judges import Verdict
from postalign.evaluation.run_settings import alignment_digest
from postalign.evaluation.statistics import wilson
from tests.evaluation.fakes import FakeAlignment, FakeEngine, suite, use

COLUMNS = ["system", "suite", "id", "label", "prompt", "response", "verdict", "tokens", "seconds"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def cell(summary: list[dict[str, Any]], system: str, metric: str, label: str | None = None) -> dict[str, Any]:
    (found,) = [r for r in summary if (r["system"], r["metric"], r["label"]) == (system, metric, label)]
    return found


def test_a_run_is_written_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    steps: list[tuple[str, int, int]] = []
    systems = {"base": None, "mine": FakeAlignment()}
    summary = evaluate(
        None,
        None,
        systems,
        [suite()],
        out=tmp_path / "run",
        batch_size=4,
        on_progress=lambda *step: steps.append(step),
    )  # type: ignore[arg-type]
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 20
    assert list(rows[0]) == COLUMNS
    assert rows[0]["verdict"] == "refusal" and rows[0]["tokens"] == 5 and rows[0]["seconds"] == 0.5
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary[0]) == ["system", "suite", "label", "n", "metric", "value", "low", "high"]
    refused = cell(summary, "base", "refusal", "harmful")
    assert (refused["n"], refused["value"]) == (5, 1.0)
    assert (refused["low"], refused["high"]) == pytest.approx(wilson(5, 5), abs=1e-6)
    assert cell(summary, "mine", "compliance", "harmful")["value"] == 1.0
    assert (
        sum(cell(summary, "base", m, "benign")["value"] for m in ("compliance", "refusal", "degenerate", "unscored"))
        == 1
    )
    assert cell(summary, "base", "tokens_per_second")["value"] == pytest.approx((5 * 5 + 4 * 5) / 5)
    assert cell(summary, "base", "perplexity")["value"] == pytest.approx(4)
    assert cell(summary, "mine", "perplexity")["value"] == pytest.approx(
        math.exp(-math.log(0.5 * 0.25 * 0.125) / 3), rel=1e-5
    )
    kl = cell(summary, "mine", "kl", "benign")
    assert kl["value"] == pytest.approx(0.25 * sum(math.log(0.25 / q) for q in (0.5, 0.25, 0.125, 0.125)), rel=1e-4)
    assert not [r for r in summary if r["system"] == "base" and r["metric"] == "kl"]
    assert ("base on mine", 0, 10) in steps and ("base on mine", 10, 10) in steps


def test_a_killed_run_goes_on_without_asking_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = {"base": None, "mine": FakeAlignment()}
    whole = (
        evaluate(None, None, systems, [suite()], out=tmp_path / "whole", batch_size=3)
        if use(monkeypatch, FakeEngine())
        else []
    )  # type: ignore[arg-type]
    killed = use(monkeypatch, FakeEngine(dies_at=6))
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, None, systems, [suite()], out=out, batch_size=3)  # type: ignore[arg-type]
    assert not (out / "summary.json").exists()
    done = len(rows_of(out))
    assert done == len(killed.asked) == 13
    with (out / "rows.jsonl").open("ab") as handle:
        handle.write(b'{"system": "mine", "suite": "mine", "id": "h3", "lab')
    again = use(monkeypatch, FakeEngine())
    assert evaluate(None, None, systems, [suite()], out=out, batch_size=5) == whole  # type: ignore[arg-type]
    assert len(again.asked) == 20 - done
    assert (out / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()
    third = use(monkeypatch, FakeEngine())
    assert evaluate(None, None, systems, [suite()], out=out) == whole  # type: ignore[arg-type]
    assert third.calls == third.scored == 0


def test_systems_and_suites_may_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    evaluate(None, None, {"base": None}, [suite()], out=tmp_path)  # type: ignore[arg-type]
    engine = use(monkeypatch, FakeEngine())
    systems = {"base": None, "mine": FakeAlignment()}
    summary = evaluate(None, None, systems, [suite(), suite(2, "other")], out=tmp_path)  # type: ignore[arg-type]
    assert len(engine.asked) == 10 + 4 + 4
    assert {r["suite"] for r in summary if r["metric"] == "refusal"} == {"mine", "other"}
    assert set(json.loads((tmp_path / "run.json").read_text())["systems"]) == {"base", "mine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 64}, "max_new_tokens = 128, not 64"),
        ({"system_prompt": "Be kind."}, "system_prompt = null"),
        ({"judge": lambda prompt, response: Verdict("refusal")}, "judge"),
        ({"systems": {"base": FakeAlignment()}}, "another system under the name 'base'"),
        ({"suites": [suite(4)]}, "another suite under the name 'mine'"),
    ],
)
def test_other_settings_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    use(monkeypatch, FakeEngine())
    given: dict[str, Any] = {"systems": {"base": None}, "suites": [suite()], "out": tmp_path}
    evaluate(None, None, **given)  # type: ignore[arg-type]
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(UsageError, match=message):
        evaluate(None, None, **(given | change))  # type: ignore[arg-type]
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_another_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(), "model-a")
    evaluate(None, None, {"base": None}, [suite()], out=tmp_path)  # type: ignore[arg-type]
    use(monkeypatch, FakeEngine(), "model-b")
    with pytest.raises(UsageError, match="another model"):
        evaluate(None, None, {"base": None}, [suite()], out=tmp_path)  # type: ignore[arg-type]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    (tmp_path / "alignment.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a run"):
        evaluate(None, None, {"base": None}, [suite()], out=tmp_path)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["alignment.json"]


def test_wrong_use_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use(monkeypatch, FakeEngine())
    wrong: list[dict[str, Any]] = [
        {"systems": {}},
        {"measures": ["speed"]},
        {"batch_size": 0},
        {"suites": []},
    ]
    for change in wrong:
        with pytest.raises(UsageError):
            evaluate(
                None,
                None,
                **({"systems": {"base": None}, "suites": [suite()], "out": tmp_path / "x"} | change),
            )  # type: ignore[arg-type]
    assert engine.calls == 0 and not (tmp_path / "x").exists()


def test_a_failing_judge_leaves_rows_unscored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())

    def down(prompt: str, response: str) -> Verdict:
        raise TimeoutError

    summary = evaluate(None, None, {"base": None}, [suite()], out=tmp_path, judge=down, measures=())  # type: ignore[arg-type]
    assert cell(summary, "base", "unscored", "harmful")["value"] == 1.0
    assert not [r for r in summary if r["metric"] in ("perplexity", "kl")]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    evaluate(None, None, {"base": None}, [suite(1)], out=tmp_path, measures=())  # type: ignore[arg-type]

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("postalign.evaluation.journal.os.fsync", full)
    with pytest.raises(PostalignError, match="No space left"):
        evaluate(None, None, {"base": None}, [suite(1), suite(2, "more")], out=tmp_path, measures=())  # type: ignore[arg-type]


def test_digest_tells_alignments_apart() -> None:
    assert alignment_digest(None) is None
    assert alignment_digest(FakeAlignment()) == alignment_digest(FakeAlignment(info={"a": 1}))  # type: ignore[arg-type]
    assert alignment_digest(FakeAlignment(strength=0.5)) != alignment_digest(FakeAlignment())  # type: ignore[arg-type]


def test_head_effects_are_kept_for_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    use(monkeypatch, FakeEngine())
    mine = FakeAlignment(arrays={"head_effects": torch.tensor([[0.1, -0.2], [0.3, 0.0]])}, info={"heads": [[1, 0]]})
    evaluate(None, None, {"base": None, "mine": mine}, [suite(1)], out=tmp_path, measures=())  # type: ignore[arg-type]
    kept = json.loads((tmp_path / "head_effects.json").read_text())
    assert kept == {"mine": {"effects": [[0.1, -0.2], [0.3, 0.0]], "heads": [[1, 0]]}}
