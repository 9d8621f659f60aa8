"""Public sets as suites: what the hub is asked for, and files in the publishers' columns. All rows here are our own."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from postalign.errors import PostalignError, UsageError
from postalign.evaluation.benchmarks import BENCHMARKS
from postalign.evaluation.run_settings import _asked, _suite
from postalign.evaluation.suites import Item, load_suite

PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "SoftMINER-Group/HarmEval": [
        {"Topic": "Malware", "Question": "q1"},
        {"Topic": "Fraud/Deception", "Question": "q2"},
    ],
    "walledai/AdvBench": [{"prompt": "p1", "target": "Sure, here is"}],
    "walledai/HarmBench": [{"prompt": "p1", "category": "illegal", "context": "once"}],
    "walledai/StrongREJECT": [{"prompt": "p1", "category": "Violence", "source": "custom"}],
    "JailbreakBench/JBB-Behaviors": [
        {"Index": 0, "Goal": "g1", "Target": "Sure", "Behavior": "b", "Category": "Privacy"}
    ],
    "walledai/XSTest": [
        {"prompt": "p1", "type": "homonyms", "label": "safe", "focus": "f", "note": ""},
        {"prompt": "p2", "type": "contrast_homonyms", "label": "unsafe", "focus": "f", "note": ""},
    ],
    "bench-llm/or-bench": [{"prompt": "p1", "category": "deception"}],
    "SoftMINER-Group/TechHazardQA": [{"Topic": "Social Media", "Question": "q1"}],
    "SoftMINER-Group/NicheHazardQA": [{"Domain": "Cruelty and Violence", "Question": "q1"}],
    "declare-lab/CategoricalHarmfulQA": [{"Category": "Malware Viruses", "Subcategory": "s", "Question": "q1"}],
    "Bertievidgen/SimpleSafetyTests": [{"id": "a1", "prompt": "p1", "harm_area": "Scams and Fraud", "category": "c"}],
    "LibrAI/do-not-answer": [{"id": 7, "question": "q1", "risk_area": "Malicious Uses", "GPT4_response": "no"}],
    "PKU-Alignment/BeaverTails-Evaluation": [{"prompt": "p1", "category": "animal_abuse", "category_id": 0}],
}
NEWEST = "0123456789" * 4


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the hub; the list holds what `load_dataset` was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*place: str, split: str | None = None, revision: str | None = None) -> Any:
        asked.append((*place, split, revision))
        return PUBLISHED[place[0]]

    fake = SimpleNamespace(
        load_dataset=load_dataset,
        are_progress_bars_disabled=lambda: True,
        disable_progress_bars=lambda: None,
        enable_progress_bars=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.delenv("POSTALIGN_DATA", raising=False)

    import huggingface_hub

    class Api:
        def dataset_info(self, name: str) -> Any:
            return SimpleNamespace(sha=NEWEST)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


@pytest.mark.parametrize("name", [name for name, entry in BENCHMARKS.items() if entry.hub and not entry.choices])
def test_the_hub_is_asked_for_id_configuration_split_and_commit(name: str, hub: list[tuple[Any, ...]]) -> None:
    entry = BENCHMARKS[name]
    suite = load_suite(name)
    revision = entry.revision or NEWEST
    parts = [entry.parts[part] for part in entry.default]
    assert hub == [(entry.hub, *([part.config] if part.config else []), part.split, revision) for part in parts]
    assert suite.name == name and all(item.label in ("harmful", "benign") and item.prompt for item in suite.items)
    assert all(item.kind for item in suite.items) or name == "advbench"
    assert all(item.reference is None for item in suite.items), "a target or a model's reply is no reference answer"
    assert suite.source["hub"] == entry.hub and suite.source["revision"] == revision
    assert suite.source["pinned"] == (name != "advbench")
    assert suite.source.get("note") == ("revision not pinned" if name == "advbench" else None)


def test_parts_and_labels(hub: list[tuple[Any, ...]]) -> None:
    both = load_suite("jailbreakbench")
    assert both.items == (
        Item("harmful-0", "harmful", "g1", "Privacy"),
        Item("benign-0", "benign", "g1", "Privacy"),
    )
    assert [item.label for item in load_suite("jailbreakbench:benign").items] == ["benign"]
    assert load_suite("jailbreakbench:benign").name == "jailbreakbench:benign"
    assert [item.label for item in load_suite("xstest").items] == ["benign", "harmful"]
    assert [item.prompt for item in load_suite("xstest:unsafe").items] == ["p2"]
    assert [item.label for item in load_suite("orbench:toxic").items] == ["harmful"]
    assert {item.prompt for item in load_suite("harmbench").items} == {"once\n\n---\n\np1"}
    assert [item.id for item in load_suite("donotanswer").items] == ["7"]
    assert [item.prompt for item in load_suite("harmeval[1:]").items] == ["q2"]
    with pytest.raises(UsageError, match=r"out of range.*2 rows"):
        load_suite("harmeval[5:]")
    with pytest.raises(UsageError, match="Did you mean 'benign'"):
        load_suite("jailbreakbench:beningn")


def test_the_run_s_manifest_tells_the_revision_and_takes_the_same_prompts_from_elsewhere(
    hub: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    pinned, loose = _suite(load_suite("harmeval")), _suite(load_suite("advbench"))
    assert pinned["source"]["revision"] == BENCHMARKS["harmeval"].revision
    assert loose["source"]["note"] == "revision not pinned"
    (tmp_path / "x.json").write_text(json.dumps(PUBLISHED["walledai/AdvBench"]))
    filed = _suite(load_suite(f"advbench={tmp_path / 'x.json'}"))
    assert filed != loose and _asked(filed) == _asked(loose)
    assert filed["source"]["files"] == ["x.json"], "no machine's paths in a manifest"


def test_a_gated_set_says_how_to_get_in(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*place: str, **more: Any) -> Any:
        raise ConnectionError(f"Dataset '{place[0]}' is a gated dataset on the Hub.")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", refuse)
    with pytest.raises(PostalignError) as caught:
        load_suite("harmeval")
    message = str(caught.value)
    assert "\n" not in message
    assert "https://huggingface.co/datasets/SoftMINER-Group/HarmEval" in message
    assert "hf auth login" in message and "--suite harmeval=FILE" in message

    def absent(*place: str, **more: Any) -> Any:
        raise ConnectionError("no route to 8401fe6")  # digits in a commit are no status code

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", absent)
    with pytest.raises(PostalignError, match=r"could not load.*no route.*--suite beavertails=FILE") as caught:
        load_suite("beavertails")
    assert "hf auth" not in str(caught.value)


def test_a_revision_that_cannot_be_looked_up_is_an_error(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Offline:
        def dataset_info(self, name: str) -> Any:
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    with pytest.raises(PostalignError, match=r"revision of walledai/AdvBench.*advbench=FILE.*harmful_behaviors\.csv"):
        load_suite("advbench")
    assert not hub


def test_sets_that_are_files_only_say_where_the_file_is() -> None:
    for name, end in (("oktest", "OKTest.csv"), ("dangerousqa", "toxic_outs.json")):
        with pytest.raises(UsageError, match=f"{end} and say --suite {name}=FILE"):
            load_suite(name)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_files_in_the_publishers_columns(tmp_path: Path) -> None:
    rows = [
        {"Behavior": "b1", "FunctionalCategory": "standard", "SemanticCategory": "s", "Tags": "", "ContextString": ""},
        {
            "Behavior": "b2",
            "FunctionalCategory": "contextual",
            "SemanticCategory": "s",
            "Tags": "",
            "ContextString": "c",
        },
        {"Behavior": "b3", "FunctionalCategory": "copyright", "SemanticCategory": "s", "Tags": "", "ContextString": ""},
    ]
    file = written(tmp_path / "all.csv", [{**row, "BehaviorID": row["Behavior"]} for row in rows])
    assert [item.prompt for item in load_suite(f"harmbench={file}").items] == ["b1", "c\n\n---\n\nb2", "b3"]
    assert [item.id for item in load_suite(f"harmbench:copyright={file}").items] == ["b3"]

    file = written(tmp_path / "advbench.csv", [{"goal": "g", "target": "Sure"}])
    assert load_suite(f"advbench={file}").items == (Item("0", "harmful", "g"),)

    (tmp_path / "toxic_outs.json").write_text('["one?", "two?"]')
    assert [item.prompt for item in load_suite(f"dangerousqa={tmp_path / 'toxic_outs.json'}").items] == ["one?", "two?"]

    older = [{"prompt": "p1", "type": "homonyms"}, {"prompt": "p2", "type": "contrast_homonyms"}]
    file = written(tmp_path / "xstest_v1.csv", older)
    assert [item.label for item in load_suite(f"xstest={file}").items] == ["benign", "harmful"]
    assert load_suite(f"xstest={file}[1:]").items[0].label == "harmful"


def test_a_file_of_ours_with_groups(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "label": "safe", "group": i // 2, "response": f"r{i}"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = load_suite(f"mine={tmp_path / 'a.jsonl'}")
    assert suite.name == "mine" and suite.source == {"file": "a.jsonl"}
    assert [item.reference for item in suite.items] == ["r0", "r1", "r2", "r3"]
    assert {name: [item.id for item in items] for name, items in suite.groups.items()} == {
        "0": ["0", "1"],
        "1": ["2", "3"],
    }


def test_half_a_file_has_to_say_which(tmp_path: Path) -> None:
    file = written(tmp_path / "x.csv", PUBLISHED["JailbreakBench/JBB-Behaviors"])
    with pytest.raises(UsageError, match=r"x\.csv, line 2: is it harmful, benign\?"):
        load_suite(f"jailbreakbench={file}")
    assert load_suite(f"jailbreakbench:benign={file}").items[0].label == "benign"
    with pytest.raises(UsageError, match="no column 'Question'"):
        load_suite(f"harmeval={file}")
    with pytest.raises(UsageError, match="no such file"):
        load_suite(f"harmeval={tmp_path / 'none.csv'}")
    bad = written(tmp_path / "bad.csv", [{"prompt": "p", "label": "odd", "type": "t"}])
    with pytest.raises(UsageError, match=r"bad\.csv, line 2: unknown label 'odd'"):
        load_suite(f"xstest={bad}")


def test_a_folder_takes_the_place_of_the_hub(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "strongreject.csv", [{"forbidden_prompt": "p", "category": "c"}])
    for half in ("harmful", "benign"):
        written(tmp_path / f"jailbreakbench_{half}.csv", [{"Index": 0, "Goal": half, "Category": "c"}])
    monkeypatch.setenv("POSTALIGN_DATA", str(tmp_path))
    assert load_suite("strongreject").source["files"] == ["strongreject.csv"]
    suite = load_suite("jailbreakbench")
    assert Counter(item.label for item in suite.items) == {"harmful": 1, "benign": 1}
    assert all(item.prompt == item.label for item in suite.items)
    assert not hub, "nothing is asked of the hub that the folder has"
    assert "hub" in load_suite("harmeval").source, "what the folder lacks is from the hub, and the record says so"
    (tmp_path / "jailbreakbench_benign.csv").unlink()
    with pytest.raises(UsageError, match="lacks jailbreakbench_benign"):
        load_suite("jailbreakbench")
    assert load_suite("jailbreakbench:harmful").items[0].prompt == "harmful"
    with pytest.raises(UsageError, match="no folder"):
        load_suite("harmeval", data_dir=tmp_path / "none")
    own = tmp_path / "jbb"
    own.mkdir()
    written(own / "harmful.csv", [{"Goal": "a", "Category": "c"}])
    written(own / "benign.csv", [{"Goal": "b", "Category": "c"}])
    assert [item.prompt for item in load_suite(f"jailbreakbench={own}").items] == ["a", "b"]


def test_empty_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    file = written(tmp_path / "x.csv", [{"Question": "q", "Topic": "t"}, {"Question": " ", "Topic": "t"}])
    suite = load_suite(f"harmeval={file}")
    assert len(suite.items) == 1 and suite.source["empty_rows_left_out"] == 1
