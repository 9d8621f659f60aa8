"""Suites by name, by file and from loaded data; texts for perplexity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from postalign.errors import PostalignError, UsageError
from postalign.evaluation.suites import Item, Suite, load_suite, load_suites, load_texts


class Rows(list[Any]):
    name = "mine"


def row(prompt: str, label: str | None = None, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"prompt": prompt, "label": label, "id": None, "category": None, "type": None} | more))


def test_ids_are_the_file_s_or_row_numbers() -> None:
    suite = load_suite(Rows([row("a", id="x1"), row("b", id="x2", category="fraud")]))  # type: ignore[arg-type]
    assert suite == Suite("mine", (Item("x1", None, "a"), Item("x2", None, "b", "fraud")))
    assert [i.id for i in load_suite(Rows([row("a", id="x"), row("b", id="x")])).items] == ["0", "1"]  # type: ignore[arg-type]
    assert [i.id for i in load_suite(Rows([row("a", id="x"), row("b")])).items] == ["0", "1"]  # type: ignore[arg-type]


def test_a_label_fills_the_gaps_only() -> None:
    suite = load_suite(Rows([row("a"), row("b", "benign")]), label="harmful")  # type: ignore[arg-type]
    assert [item.label for item in suite.items] == ["harmful", "benign"]


def test_bad_suites_are_named() -> None:
    with pytest.raises(UsageError, match="has no rows"):
        load_suite(Rows([]))  # type: ignore[arg-type]
    with pytest.raises(PostalignError, match="empty prompt"):
        load_suite(Rows([row("a"), row("  ")]))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="two suites are named 'a'"):
        load_suites([Suite("a", ()), Suite("a", ())])
    with pytest.raises(UsageError, match="no suite given"):
        load_suites([])


def test_limited_takes_evenly_from_each_label() -> None:
    items = tuple(Item(str(i), "harmful" if i < 100 else "benign", f"p{i}") for i in range(130))
    small = Suite("s", items).limited(10)
    assert [i.id for i in small.items if i.label == "harmful"] == [str(i) for i in range(0, 100, 10)]
    assert [i.id for i in small.items if i.label == "benign"] == [str(i) for i in range(100, 130, 3)]
    assert Suite("s", items).limited(500).items == items
    with pytest.raises(UsageError, match="1 or more"):
        Suite("s", items).limited(0)


def test_hash_tells_prompts_and_labels_apart() -> None:
    one, other = Suite("s", (Item("0", None, "a"),)), Suite("s", (Item("0", "benign", "a"),))
    assert one.hash == Suite("t", (Item("0", None, "a"),)).hash != other.hash


def test_hash_covers_all_that_is_asked() -> None:
    plain = Item("0", None, "a")
    hashes = {Suite("s", (plain,)).hash}
    for name in ("kind", "group", "wrapper", "prefill", "reference"):
        hashes.add(Suite("s", (replace(plain, **{name: "x"}),)).hash)
    assert len(hashes) == 6
    assert Suite("s", (plain,), {"file": "x"}) == Suite("s", (plain,)), "the source tells no two suites apart"


def test_references_and_groups() -> None:
    rows = [row("a", "benign", response="b", group="g"), row("c", "harmful", response="I cannot help with that.")]
    one, other = load_suite(Rows(rows)).items  # type: ignore[arg-type]
    assert (one.reference, one.group, other.reference) == ("b", "g", None)


def test_a_group_is_right_when_all_of_it_is() -> None:
    items = [Item(str(i), "harmful", f"p{i}", group=group) for i, group in enumerate(["g", "g", "h", "h", None])]
    suite = Suite("s", tuple(items))
    assert suite.groups_right({"0": True, "1": True, "2": True, "3": False, "4": True}) == (2, 3)
    assert suite.groups_right({"0": True, "2": True, "3": True}) == (1, 3), "what was not answered is wrong"


def test_names_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "a=b.jsonl"
    path.write_text('{"prompt": "p"}\n')
    assert load_suite(path).name == "a=b", "a file that is there is a file"
    assert load_suite(f"mine={path}").name == "mine"
    assert load_suite(f"mine={path}[0:1]").items == (Item("0", None, "p"),)
    assert load_suite(f"mine={path}", label="benign").items[0].label == "benign"
    with pytest.raises(UsageError, match="Did you mean 'xstest'"):
        load_suite("xtest")


def test_a_file_with_labels_and_a_slice(tmp_path: Path) -> None:
    pytest.importorskip("postalign.data.sources")
    path = tmp_path / "mine.v2.jsonl"
    labels = ["harmful", "benign", "unsafe", "safe"]
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    assert [i.label for i in load_suite(path).items] == ["harmful", "benign", "harmful", "benign"]
    part = load_suite(f"{path}[1:3]")
    assert part.name == "mine.v2"
    assert [i.prompt for i in part.items] == ["p1", "p2"]


def test_starter_is_its_test_split() -> None:
    sources = pytest.importorskip("postalign.data.sources")
    try:
        whole = sources.load_data("starter", split="test")
    except PostalignError:
        pytest.skip("the starter data are not there")
    suite = load_suite("starter")
    assert suite.name == "starter"
    assert [item.prompt for item in suite.items] == [r.prompt for r in whole]
    assert {item.label for item in suite.items} == {"harmful", "benign"}
    assert load_suite("starter[2:5]").items == suite.items[2:5]


def test_texts(tmp_path: Path) -> None:
    assert len(load_texts()) == 12
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert load_texts(tmp_path / "a.txt") == ["one\ntwo", "three"]
    (tmp_path / "b.jsonl").write_text('{"text": " x "}\n\n{"txt": "y"}\n')
    with pytest.raises(UsageError, match="row 3"):
        load_texts(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert load_texts(tmp_path / "c.jsonl", limit=1) == ["x"]
    for name in ("none.jsonl", "a.csv"):
        with pytest.raises(UsageError):
            load_texts(tmp_path / name)
    (tmp_path / "d.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="no text"):
        load_texts(tmp_path / "d.txt")
