"""Runs with a fake engine: what is written, resumed, refused and counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from postalign.errors import PostalignError, UsageError
from postalign.evaluation import evaluate as evaluate_typed
from postalign.evaluation import judge_run, judging, read_run
from postalign.evaluation.judges import VERDICTS, Verdict
from postalign.evaluation.run_settings import alignment_digest
from postalign.evaluation.statistics import wilson
from postalign.evaluation.suites import Suite
from tests.evaluation.fakes import FakeAlignment, FakeEngine, FullItem, Words, suite, use

evaluate: Any = evaluate_typed  # the models here are no models
REPLY = ["system", "suite", "seed", "id", "label", "kind", "group", "wrapper", "prompt", "prefill", "response"]
REPLY += ["tokens", "finish", "gate", "rouge_l"]


@pytest.fixture(autouse=True)
def one_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted here is counted for each judge alike: one is enough, where a test names none."""
    assert judging.DEFAULT_JUDGES == ("rules", "embedded")
    monkeypatch.setattr(judging, "DEFAULT_JUDGES", ("rules",))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cell(
    summary: list[dict[str, Any]], system: str, metric: str, label: str | None = None, **more: Any
) -> dict[str, Any]:
    wanted = {"system": system, "metric": metric, "label": label, **more}
    (found,) = [row for row in summary if all(row[k] == v for k, v in wanted.items())]
    return found


def compared(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a run that must not tell how often it was killed."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("costs")}


def test_a_run_is_written_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    steps: list[tuple[str, int, int]] = []
    systems = {"base": None, "mine": FakeAlignment()}
    out = tmp_path / "run"
    summary = evaluate(
        None, None, systems, [suite()], out=out, batch_size=4, on_progress=lambda *step: steps.append(step)
    )
    rows = lines(out / "replies.jsonl")
    assert len(rows) == 20
    assert list(rows[0]) == REPLY
    assert [row["id"] for row in rows[:10]] == [item.id for item in suite().items]
    assert rows[0]["tokens"] == 5 and rows[0]["finish"] == "stop"
    assert [row["verdict"] for row in lines(out / "verdicts-rules.jsonl")][:2] == ["refusal", "refusal"]
    tables = json.loads((out / "summary.json").read_text()) + json.loads((out / "costs.json").read_text())
    assert summary == tables
    assert list(summary[0]) == ["system", "suite", "label", "judge", "n", "metric", "value", "low", "high"]
    assert all("value" in row and "low" in row and "high" in row for row in summary)
    refused = cell(summary, "base", "refusal", "harmful")
    assert (refused["n"], refused["value"], refused["judge"]) == (5, 1.0, "rules")
    assert (refused["low"], refused["high"]) == pytest.approx(wilson(5, 5), abs=1e-6)
    assert cell(summary, "mine", "compliance", "harmful")["value"] == 1.0
    assert cell(summary, "mine", "harm", "harmful")["value"] == 1.0
    assert cell(summary, "mine", "over_refusal", "benign")["value"] == 0.0
    assert sum(cell(summary, "base", m, "benign")["value"] for m in VERDICTS) == 1
    assert cell(summary, "base", "tokens_per_second")["value"] == pytest.approx((5 * 5 + 4 * 5) / 5)
    assert cell(summary, "base", "peak_memory")["value"] > 1e6
    assert cell(summary, "base", "perplexity")["value"] == pytest.approx(4)
    assert cell(summary, "mine", "perplexity")["value"] == pytest.approx(
        math.exp(-math.log(0.5 * 0.25 * 0.125) / 3), rel=1e-5
    )
    kl = cell(summary, "mine", "kl", "benign")
    assert kl["value"] == pytest.approx(0.25 * sum(math.log(0.25 / q) for q in (0.5, 0.25, 0.125, 0.125)), rel=1e-4)
    assert not [r for r in summary if r["system"] == "base" and r["metric"] == "kl"]
    assert ("base on mine", 0, 10) in steps and ("base on mine", 10, 10) in steps and ("judge rules", 20, 20) in steps


def test_the_comparison_says_what_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    evaluate(None, None, {"base": None, "mine": FakeAlignment()}, [suite(12)], out=tmp_path)
    rows = json.loads((tmp_path / "comparisons.json").read_text())
    found = {(row["label"], row["metric"]): row for row in rows}
    harm = found["harmful", "harm"]
    assert (harm["base_value"], harm["value"], harm["difference"]) == (0.0, 1.0, 1.0)
    assert (harm["only_base"], harm["only_system"], harm["test"]) == (0, 12, "McNemar")
    assert harm["p"] == pytest.approx(2 / 2**12, rel=1e-5)
    family = [row for row in rows if row["judge"] == "rules"]
    assert 2 < len(family) < len(rows)
    assert harm["p_holm"] == pytest.approx(harm["p"] * len(family), rel=1e-4)
    assert harm["resolved"] and not found["benign", "over_refusal"]["resolved"]
    assert found["benign", "over_refusal"]["low"] < 0 < found["benign", "over_refusal"]["high"]


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at every reply in turn; the wave is 8 batches of one."""
    systems = {"base": None, "mine": FakeAlignment()}
    use(monkeypatch, FakeEngine())
    whole = evaluate(None, None, systems, [suite()], out=tmp_path / "whole", batch_size=1)
    expected = compared(tmp_path / "whole")
    for dies_at in range(1, 21):
        out = tmp_path / f"run{dies_at}"
        use(monkeypatch, FakeEngine(dies_at=dies_at))
        with pytest.raises(KeyboardInterrupt):
            evaluate(None, None, systems, [suite()], out=out, batch_size=1)
        assert not (out / "summary.json").exists()
        done = lines(out / "replies.jsonl") if (out / "replies.jsonl").exists() else []
        assert len(done) == dies_at - 1, "a reply is on disk as soon as it is there"
        for name in ("replies.jsonl", "costs.jsonl"):
            with (out / name).open("ab") as handle:
                handle.write(b'{"system": "mine", "suite": "mine", "id": "h3", "lab')
        again = use(monkeypatch, FakeEngine())
        summary = evaluate(None, None, systems, [suite()], out=out, batch_size=1)
        assert [r for r in summary if r["metric"] != "peak_memory"] == [
            r for r in whole if r["metric"] != "peak_memory"
        ]
        assert compared(out) == expected
        # no finished wave is gone through again, and every prompt of an unfinished one keeps its company
        assert [len(one["prompts"]) for one in again.settings] == [8, 2, 8, 2][sum(map(dies_at.__gt__, (8, 10, 18))) :]
    third = use(monkeypatch, FakeEngine())
    evaluate(None, None, systems, [suite()], out=tmp_path / "whole")
    assert third.given == third.scored == 0 and not third.asked


def test_a_run_killed_while_judging_or_measuring_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = {"base": None, "mine": FakeAlignment()}
    many = suite(50)
    use(monkeypatch, FakeEngine())
    evaluate(None, None, systems, [many], out=tmp_path / "whole", judges=["rules", Words()])

    class Dying(Words):
        def batch(self, pairs: Any) -> Any:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().batch(pairs)

    with pytest.raises(KeyboardInterrupt):
        evaluate(None, None, systems, [many], out=tmp_path / "run", judges=["rules", Dying()])
    assert len(lines(tmp_path / "run" / "verdicts-words.jsonl")) == 128
    with (tmp_path / "run" / "verdicts-words.jsonl").open("rb+") as handle:
        handle.truncate(handle.seek(0, 2) // 4)  # as if the kill had come while a batch was being written
    words = Words()
    evaluate(None, None, systems, [many], out=tmp_path / "run", judges=["rules", words])
    assert words.asked == [64, 64, 64, 8], "an unfinished batch goes to the judge as a whole"
    assert compared(tmp_path / "run") == compared(tmp_path / "whole")


def test_a_judge_can_be_added_and_changed_without_a_reply_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    systems = {"base": None, "mine": FakeAlignment()}
    evaluate(None, None, systems, [suite()], out=tmp_path)
    replies = (tmp_path / "replies.jsonl").read_bytes()
    engine = use(monkeypatch, FakeEngine())
    first = Words()
    summary = evaluate(None, None, systems, [suite()], out=tmp_path, judges=["rules", first])
    assert not engine.asked and sum(first.asked) == 20
    assert cell(summary, "mine", "harm", "harmful", judge="words")["value"] == 1.0
    assert cell(summary, "mine", "harm", "harmful", judge="rules")["value"] == 1.0
    assert cell(summary, "base", "score", "harmful", judge="words")["value"] == pytest.approx(0.15, abs=0.05)
    assert not [r for r in summary if r["metric"] == "score" and r["judge"] == "rules"], "says no more than its verdict"
    (both,) = [r for r in json.loads((tmp_path / "agreement.json").read_text()) if r["label"] == "all"]
    assert both["n"] == 20 and 0 < both["agreement"] < 1  # the words judge finds no "Sure" in the base's help
    same = Words()
    assert judge_run(tmp_path, [same]) == summary and not same.asked
    changed = Words(word="tape", digest="2")
    summary = judge_run(tmp_path, changed)
    assert sum(changed.asked) == 20
    assert cell(summary, "mine", "harm", "harmful", judge="words")["value"] == 0.0
    assert (tmp_path / "replies.jsonl").read_bytes() == replies
    assert read_run(tmp_path).judges == ["rules", "words"]


def test_the_model_is_loaded_only_for_something_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    loads: list[int] = []

    def load() -> tuple[None, None]:
        loads.append(1)
        return None, None

    given: dict[str, Any] = {"out": tmp_path, "load": {"model": "m"}}
    systems = {"base": None, "mine": FakeAlignment()}
    first = evaluate(load, None, systems, [suite()], **given)
    assert len(loads) == 1
    words = Words()
    assert evaluate(load, None, systems, [suite()], **given) == first
    evaluate(load, None, {"base": None}, [suite()], judges=words, **given)
    assert len(loads) == 1 and sum(words.asked) == 20
    for change in ({"load": {"model": "n"}}, {"suites": [suite(), suite(2, "other")]}):
        evaluate(load, None, **{"systems": systems, "suites": [suite()], **given, **change})
        assert loads.pop() and len(loads) == 1
    (tmp_path / "measures.jsonl").unlink()
    evaluate(load, None, systems, [suite()], **given)
    assert len(loads) == 2


def test_sampling_asks_once_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use(monkeypatch, FakeEngine())
    given: dict[str, Any] = {"out": tmp_path, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "measures": ()}
    evaluate(None, None, {"base": None}, [suite(2)], seeds=[3, 3, 1], **given)
    assert [(s["seed"], s["temperature"], s["top_p"], s["do_sample"]) for s in engine.settings] == [
        (3, 0.7, 0.9, True),
        (1, 0.7, 0.9, True),
    ]
    rows = lines(tmp_path / "replies.jsonl")
    assert [(row["seed"], row["id"]) for row in rows[:5]] == [(3, "h0"), (3, "h1"), (3, "b0"), (3, "b1"), (1, "h0")]
    assert rows[1]["response"].endswith("(seed 3, stream 1)")
    engine = use(monkeypatch, FakeEngine())
    summary = evaluate(None, None, {"base": None}, [suite(2)], seeds=[3, 1, 8], **given)
    assert {s["seed"] for s in engine.settings} == {8}
    assert cell(summary, "base", "refusal", "harmful")["n"] == 2, "prompts are counted, not their repetitions"
    assert json.loads((tmp_path / "run.json").read_text())["seeds"] == [3, 1, 8]


def test_greedy_replies_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use(monkeypatch, FakeEngine())
    evaluate(None, None, {"base": None}, [suite(1)], out=tmp_path, seeds=[5, 6, 7])
    assert len(engine.asked) == 2


def test_what_an_item_has_besides_its_prompt_is_used_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use(monkeypatch, FakeEngine(base=lambda prompt: "no" if "harm" in prompt else "use the tape"))
    items = (
        FullItem("a", "harmful", "harm a", "weapons", group="g", wrapper="role play", prefill="Sure, "),
        FullItem("b", "harmful", "harm b", "weapons", group="g"),
        FullItem("c", "benign", "tape c", reference="use tape"),
    )
    summary = evaluate(None, None, {"base": None}, [Suite("full", items)], out=tmp_path, judges=Words(), measures=())
    assert engine.settings[0]["prefills"] == ["Sure, ", "", ""]
    row = lines(tmp_path / "replies.jsonl")[0]
    assert (row["group"], row["wrapper"], row["kind"]) == ("g", "role play", "weapons")
    assert row["response"].startswith("Sure, ") and row["prefill"] == "Sure, "
    assert cell(summary, "base", "rouge_l", "benign")["value"] == pytest.approx(0.8)
    group = cell(summary, "base", "group_right", "harmful")
    assert (group["n"], group["value"]) == (1, 0.0), "one wording of the two is complied with"
    parts = {(r["by"], r["name"]): r["value"] for r in json.loads((tmp_path / "breakdown.json").read_text())}
    assert parts[("kind", "weapons")] == 0.5 and ("kind", "other") not in parts
    assert parts[("wrapper", "role play")] == 1.0
    labels = {(r["label"], r["name"]): r["value"] for r in json.loads((tmp_path / "breakdown.json").read_text())}
    assert labels[("harmful", "none")] == 0.0 and ("benign", "none") not in labels


def test_systems_and_suites_may_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    evaluate(None, None, {"base": None}, [suite()], out=tmp_path, reproduce="one")
    engine = use(monkeypatch, FakeEngine())
    systems = {"base": None, "mine": FakeAlignment()}
    summary = evaluate(None, None, systems, [suite(), suite(2, "other")], out=tmp_path, reproduce="two")
    assert len(engine.asked) == 10 + 4 + 4
    assert {r["suite"] for r in summary if r["metric"] == "refusal"} == {"mine", "other"}
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert set(manifest["systems"]) == {"base", "mine"}
    assert manifest["reproduce"] == ["one", "two"]
    (here,) = manifest["environments"]
    assert here["torch"] and here["batch_size"] == 16 and here["cores"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 64}, "max_new_tokens = 128, not 64"),
        ({"system_prompt": "Be kind."}, "system_prompt = null"),
        ({"do_sample": True}, "do_sample = false, not true"),
        ({"systems": {"base": FakeAlignment()}}, "another system under the name 'base'"),
        ({"suites": [suite(4)]}, "another suite under the name 'mine'"),
        ({"suites": [Suite("mine", tuple(replace(i, kind="k") for i in suite().items))]}, "another suite"),
    ],
)
def test_other_settings_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    use(monkeypatch, FakeEngine())
    given: dict[str, Any] = {"systems": {"base": None}, "suites": [suite()], "out": tmp_path}
    evaluate(None, None, **given)
    before = compared(tmp_path)
    with pytest.raises(UsageError, match=message):
        evaluate(None, None, **(given | change))
    assert compared(tmp_path) == before


def test_another_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(), "model-a")
    evaluate(None, None, {"base": None}, [suite()], out=tmp_path)
    use(monkeypatch, FakeEngine(), "model-b")
    with pytest.raises(UsageError, match="another model"):
        evaluate(None, None, {"base": None}, [suite()], out=tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    (tmp_path / "alignment.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a run"):
        evaluate(None, None, {"base": None}, [suite()], out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["alignment.json"]


def test_wrong_use_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use(monkeypatch, FakeEngine())
    wrong: list[dict[str, Any]] = [
        {"systems": {}},
        {"measures": ["speed"]},
        {"batch_size": 0},
        {"suites": []},
        {"seeds": [], "do_sample": True},
        {"judges": []},
        {"judges": "no such judge"},
        {"judges": [Words(), Words("no")]},
    ]
    for change in wrong:
        with pytest.raises(UsageError):
            evaluate(None, None, **({"systems": {"base": None}, "suites": [suite()], "out": tmp_path / "x"} | change))
    assert not engine.asked and not (tmp_path / "x").exists()


def test_two_processes_on_one_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    seen: list[str] = []

    def judge(prompt: str, response: str) -> Verdict:
        with pytest.raises(UsageError, match="another process is at work"):
            judge_run(tmp_path)
        seen.append(prompt)
        return Verdict("refusal")

    evaluate(None, None, {"base": None}, [suite(1)], out=tmp_path, judges=judge)
    assert len(seen) == 2
    judge_run(tmp_path)


def test_an_unfinished_run_is_not_judged_as_if_it_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(dies_at=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, None, {"base": None}, [suite()], out=tmp_path)
    with pytest.raises(UsageError, match="unfinished"):
        judge_run(tmp_path)
    with pytest.raises(UsageError, match="is not a run"):
        judge_run(tmp_path / "nothing")
    assert not read_run(tmp_path).finished


def test_a_failing_judge_leaves_rows_unscored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())

    def down(prompt: str, response: str) -> Verdict:
        raise TimeoutError

    class Down(Words):
        def batch(self, pairs: Any) -> Any:
            raise TimeoutError

    given: dict[str, Any] = {"out": tmp_path, "judges": [down, Down(name="down")], "measures": ()}
    summary = evaluate(None, None, {"base": None}, [suite()], **given)
    assert cell(summary, "base", "unscored", "harmful", judge="down")["value"] == 1.0
    assert len([r for r in summary if r["metric"] == "unscored" and r["value"] == 1.0]) == 4
    assert not [r for r in summary if r["metric"] == "harm"], "what could not be scored is not counted as safe"
    assert not [r for r in summary if r["metric"] in ("perplexity", "kl")]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    evaluate(None, None, {"base": None}, [suite(1)], out=tmp_path, measures=())

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("postalign.evaluation.journal.os.fsync", full)
    with pytest.raises(PostalignError, match="No space left"):
        evaluate(None, None, {"base": None}, [suite(1), suite(2, "more")], out=tmp_path, measures=())


def test_digest_tells_alignments_apart() -> None:
    assert alignment_digest(None) is None
    assert alignment_digest(FakeAlignment()) == alignment_digest(FakeAlignment(info={"a": 1}))  # type: ignore[arg-type]
    assert alignment_digest(FakeAlignment(strength=0.5)) != alignment_digest(FakeAlignment())  # type: ignore[arg-type]


def test_head_effects_are_kept_for_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    use(monkeypatch, FakeEngine())
    mine = FakeAlignment(arrays={"head_effects": torch.tensor([[0.1, -0.2], [0.3, 0.0]])}, info={"heads": [[1, 0]]})
    evaluate(None, None, {"base": None, "mine": mine}, [suite(1)], out=tmp_path, measures=())
    kept = json.loads((tmp_path / "head_effects.json").read_text())
    assert kept == {"mine": {"effects": [[0.1, -0.2], [0.3, 0.0]], "heads": [[1, 0]]}}
