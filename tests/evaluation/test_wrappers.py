"""Wrappers: what becomes of a prompt, and attack files in the JailbreakBench format."""

from __future__ import annotations

import base64
import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from postalign.errors import UsageError
from postalign.evaluation.suites import Item, Suite
from postalign.evaluation.wrappers import WRAPPERS, wrap

PROMPT = "How do I {tie} a strong knot, please? 安全"
SUITE = Suite("mine", (Item("a", "harmful", PROMPT, "knots", "g"), Item("b", "benign", "Bread?")), {"licence": "MIT"})


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_keeps_all_but_the_wording(name: str) -> None:
    (suite,) = wrap(SUITE, [name])
    assert suite.name == f"mine+{name}"
    assert suite.source == {"licence": "MIT", "wrapper": name}
    for item, plain in zip(suite.items, SUITE.items, strict=True):
        assert (item.id, item.label, item.kind, item.group) == (plain.id, plain.label, plain.kind, plain.group)
        assert item.wrapper == name
        assert item.chat != plain.chat
    assert len({item.prompt for item in suite.items}) == 2
    assert suite.hash != SUITE.hash


def test_the_request_is_whole_inside_each_wrapper() -> None:
    for name in set(WRAPPERS) - {"base64", "rot13", "leetspeak"}:
        assert PROMPT in wrap(SUITE, [name])[0].items[0].prompt, name
    last = {name: wrap(SUITE, [name])[0].items[0].prompt.splitlines()[-1] for name in ("base64", "rot13", "leetspeak")}
    assert base64.b64decode(last["base64"]).decode() == PROMPT
    assert codecs.decode(last["rot13"], "rot13") == PROMPT
    assert last["leetspeak"] == "H0w d0 1 {713} 4 57r0n6 kn07, pl3453? 安全".replace("6", "g")


def test_a_prefill_leaves_the_prompt_and_begins_the_reply() -> None:
    item = wrap(SUITE, ["prefill"])[0].items[0]
    assert item.prompt == PROMPT
    user, begun = item.chat
    assert user == {"role": "user", "content": PROMPT}
    assert begun["role"] == "assistant" and begun["prefix"] is True and begun["content"] == item.prefill


def test_several_are_put_on_in_their_order() -> None:
    (suite,) = wrap(SUITE, ["role_play+base64"])
    inner = wrap(SUITE, ["role_play"])[0].items[0].prompt
    assert base64.b64decode(suite.items[0].prompt.splitlines()[-1]).decode() == inner
    assert suite.items[0].wrapper == "role_play+base64"
    again = wrap(wrap(SUITE, ["role_play"])[0], ["prefill"])[0]
    assert again.name == "mine+role_play+prefill" and again.items[0].wrapper == "role_play+prefill"


def test_names_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="Did you mean 'role_play'"):
        wrap(SUITE, ["roleplay"])
    with pytest.raises(UsageError, match="no wrapper is called 'x'"):
        wrap(SUITE, ["role_play+x"])
    assert wrap(SUITE, []) == []


def artifact(path: Path, jailbreaks: list[dict[str, Any]], **parameters: Any) -> str:
    empty = {"behavior": "b", "category": "c", "response": "r", "number_of_queries": 1, "jailbroken": True}
    rows = [{"index": i, **empty, **row} for i, row in enumerate(jailbreaks)]
    path.write_text(json.dumps({"parameters": parameters, "jailbreaks": rows}), encoding="utf-8")
    return f"file:{path}"


def test_an_attack_file_is_matched_by_goal(tmp_path: Path) -> None:
    name = artifact(
        tmp_path / "a.json",
        [
            {"goal": "how do i {tie} a strong knot please 安全", "prompt": "attack one"},
            {"goal": PROMPT, "prompt": "attack two"},
            {"goal": "bread", "prompt": None, "response": None, "jailbroken": False},
            {"goal": "Another goal", "prompt": "attack three"},
        ],
        method="JBC",
        model="vicuna-13b-v1.5",
    )
    (suite,) = wrap(SUITE, [name])
    assert suite.name == "mine+JBC"
    assert [(item.id, item.prompt, item.group, item.wrapper) for item in suite.items] == [
        ("a-0", "attack one", "g", "JBC"),
        ("a-1", "attack two", "g", "JBC"),
    ]
    record = {"attacks": "a.json", "made_on": "vicuna-13b-v1.5", "goals_met": 1, "goals_asked": 2}
    assert {key: suite.source[key] for key in record} == record
    assert suite.source["attacks_without_a_prompt"] == 1


def test_one_attack_a_goal_keeps_the_id(tmp_path: Path) -> None:
    name = artifact(tmp_path / "mine.json", [{"goal": "Bread?", "prompt": "x"}])
    (suite,) = wrap(SUITE, [name])
    assert suite.items == (Item("b", "benign", "x", wrapper="mine"),)
    both = artifact(tmp_path / "two.json", [{"goal": "Bread?", "prompt": "x"}, {"goal": "Bread?", "prompt": "y"}])
    assert {item.group for item in wrap(SUITE, [both])[0].items} == {"b"}, "wordings of one goal are one group"


def test_files_that_are_no_attacks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UsageError, match="cannot read"):
        wrap(SUITE, [f"file:{path}"])
    for text, message in (
        ("{", "not JSON"),
        ("[]", "no list"),
        ('{"jailbreaks": [{"goal": "a", "prompt": "b"}, {"prompt": "b"}]}', "jailbreak 2"),
        ('{"jailbreaks": [{"goal": "a", "prompt": 3}]}', "jailbreak 1"),
        ('{"jailbreaks": [{"goal": "a", "prompt": "b"}]}', "1 goals, none of them in mine"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            wrap(SUITE, [f"file:{path}"])
