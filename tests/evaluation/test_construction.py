"""Building a benchmark: with a writer and a checker from a table, killed and taken up again, and with a tiny model.

The "harmful" questions here are about bread and knots: what matters is which stage they fall out at.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from postalign.data.duplicates import similarity
from postalign.errors import PostalignError, UsageError
from postalign.evaluation.chat_models import LocalChat
from postalign.evaluation.construction import Policy, Recipe, build, load_policies, parse_questions
from postalign.evaluation.suites import load_suite

POLICIES = [Policy("Bread/Baking", "Nothing about bread.", 4), Policy("Knots", "Nothing about knots.", 4)]
WORDS = "amber birch cedar dune ember fjord grove heath inlet jetty knoll larch marsh nook oasis pine quay reef".split()


def candidate(policy: str, number: int, i: int) -> str:
    number += 11 * (policy == "Knots")
    a, b, c = (WORDS[(number * 7 + i * k) % len(WORDS)] for k in (1, 3, 5))
    return f"{policy.split('/')[0].lower()} {a}{number} {b}{i} {c}{number * i}"


@dataclass
class Writer:
    """Some candidates a round: one too short, one twice, one of the round before, others all different."""

    name: str = "writer"
    declines: str = "none"
    dies_at: int | None = None
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def write(self, prompts: Sequence[str], *, seed: int, max_new_tokens: int, temperature: float) -> list[str]:
        if self.dies_at == len(self.prompts):
            raise KeyboardInterrupt
        (prompt,) = prompts
        self.prompts.append(prompt)
        self.seeds.append(seed)
        policy = next(policy.name for policy in POLICIES if policy.name in prompt)
        if policy == self.declines:
            return [""]
        number = seed % 1_000_003
        lines = [candidate(policy, number, i) for i in range(1, 8)]
        lines += [candidate(policy, number - 1, 3)] if number else []
        lines += [lines[0].upper(), "Too short"]
        return ["Here they are:\n" + "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1))]


@dataclass
class Checker:
    """What it says depends on the question's fourth word's last digit: no, barely, yes, or nothing at all."""

    name: str = "checker"
    asked: list[str] = field(default_factory=list)

    def yes(self, prompts: Sequence[str]) -> list[float | None]:
        questions = [re.search(r"Request: (.*)", prompt).group(1) for prompt in prompts]  # type: ignore[union-attr]
        self.asked += questions
        return [harm(question) for question in questions]

    def write(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        raise AssertionError("a checker does not write")


def harm(question: str) -> float | None:
    return (0.9, 0.95, 0.1, 0.6, None)[sum(map(ord, question)) % 5]


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def test_candidates_fall_out_where_they_should(tmp_path: Path) -> None:
    writer, checker = Writer(), Checker()
    rows = build(POLICIES, writer, checker, tmp_path / "b")
    assert Counter(row["category"] for row in rows) == {"Bread/Baking": 4, "Knots": 4}
    assert {row["label"] for row in rows} == {"harmful"}
    assert [row["id"] for row in rows][:2] == ["bread-baking-001", "bread-baking-002"]
    assert rows == rows_of(tmp_path / "b", "data.jsonl")
    assert all(row["harm"] == row["toxicity"] == harm(row["prompt"]) >= 0.7 for row in rows)
    stages = Counter(row["stage"] for row in rows_of(tmp_path / "b", "candidates.jsonl"))
    assert set(stages) == {"kept", "unreadable", "duplicate", "unscored", "not harmful", "below threshold"}
    for row in rows_of(tmp_path / "b", "candidates.jsonl"):
        if "harm" in row:
            expected = harm(row["question"])
            stage = "unscored" if expected is None else "not harmful" if expected < 0.5 else None
            assert row["stage"] == (stage or ("kept" if expected >= 0.7 else "below threshold"))  # type: ignore[operator]
    assert len(checker.asked) == len(set(checker.asked)), "nothing is checked twice"
    assert all(similarity(a, b) < 0.6 for a, b in combinations(checker.asked, 2)), "nor anything nearly the same"
    assert writer.seeds == [0, 1, 0], "each round of a policy has a seed of its own"
    assert "Nothing about bread." in writer.prompts[0] and "written already" not in writer.prompts[0]
    assert rows[0]["prompt"] in writer.prompts[1], "what is there is told, so that the next is different"


def test_it_is_a_suite(tmp_path: Path) -> None:
    rows = build(POLICIES, Writer(), Checker(), tmp_path / "b")
    suite = load_suite(tmp_path / "b" / "data.jsonl")
    assert [(item.id, item.prompt, item.kind) for item in suite.items] == [
        (row["id"], row["prompt"], row["category"]) for row in rows
    ]
    assert {item.label for item in suite.items} == {"harmful"}


def test_a_kill_at_any_round_changes_nothing(tmp_path: Path) -> None:
    whole = Writer()
    build(POLICIES, whole, Checker(), tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for at in range(len(whole.prompts)):
        out, first, second = tmp_path / f"killed{at}", Writer(dies_at=at), Writer()
        with pytest.raises(KeyboardInterrupt):
            build(POLICIES, first, Checker(), out)
        build(POLICIES, second, Checker(), out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
        assert first.prompts + second.prompts == whole.prompts, "no round is written twice"
    again = Writer()
    build(POLICIES, again, Checker(), tmp_path / "whole")
    assert not again.prompts, "a finished build is not made again"
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == expected


def test_other_settings_are_refused(tmp_path: Path) -> None:
    build(POLICIES, Writer(), Checker(), tmp_path / "b")
    for change, message in (
        ({"recipe": Recipe(harm=0.9)}, "another recipe"),
        ({"toxicity_name": "x"}, "another toxicity"),
        ({"unlike": ["a"]}, "another unlike"),
    ):
        with pytest.raises(UsageError, match=message):
            build(POLICIES, Writer(), Checker(), tmp_path / "b", **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="another writer"):
        build(POLICIES, Writer("other"), Checker(), tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="holds something else"):
        build(POLICIES, Writer(), Checker(), tmp_path / "full")


def test_a_scorer_of_ones_own_and_prompts_to_stay_away_from(tmp_path: Path) -> None:
    def tone(text: str) -> float | None:
        return (0.71, 0.69, None)[len(text) % 3]

    plain = build(POLICIES, Writer(), Checker(), tmp_path / "a")
    avoid = plain[0]["prompt"].replace(" ", "  ").upper() + "!"
    rows = build(
        POLICIES,
        Writer(),
        Checker(),
        tmp_path / "b",
        toxicity=lambda texts: [tone(text) for text in texts],
        toxicity_name="mine",
        unlike=[avoid],
    )
    assert {row["toxicity"] for row in rows} == {0.71}
    assert plain[0]["prompt"] not in [row["prompt"] for row in rows]
    checked = [row for row in rows_of(tmp_path / "b", "candidates.jsonl") if "harm" in row]
    assert {tone(row["question"]) for row in checked} == {0.71, 0.69, None}
    for row in checked:
        if tone(row["question"]) is None or harm(row["question"]) is None:
            assert row["stage"] == "unscored"
        elif harm(row["question"]) >= 0.5:  # type: ignore[operator]
            assert row["stage"] == ("kept" if tone(row["question"]) == 0.71 else "below threshold")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "the score is that of mine" in card and "one of 1 given prompts" in card


def test_categories_are_balanced_by_what_the_poorest_has(tmp_path: Path) -> None:
    policies = [Policy("Bread/Baking", "b", 40), Policy("Knots", "k", 20)]
    few = Recipe(rounds=2)
    balanced = Counter(row["category"] for row in build(policies, Writer(), Checker(), tmp_path / "a", recipe=few))
    loose = Counter(
        row["category"]
        for row in build(policies, Writer(), Checker(), tmp_path / "b", recipe=Recipe(rounds=2, balanced=False))
    )
    share = min(loose["Bread/Baking"] / 40, loose["Knots"] / 20)
    assert share < 1 and balanced == {"Bread/Baking": int(40 * share), "Knots": int(20 * share)}
    assert balanced.total() < loose.total()


def test_a_writer_that_declines_a_policy(tmp_path: Path) -> None:
    recipe = Recipe(rounds=3)
    with pytest.raises(PostalignError, match="no question of 'Knots' passed.*--unbalanced"):  # noqa: RUF043
        build(POLICIES, Writer(declines="Knots"), Checker(), tmp_path / "a", recipe=recipe)
    writer = Writer(declines="Knots")
    rows = build(POLICIES, writer, Checker(), tmp_path / "b", recipe=Recipe(rounds=3, balanced=False))
    assert {row["category"] for row in rows} == {"Bread/Baking"}
    nothing = [row for row in rows_of(tmp_path / "b", "candidates.jsonl") if row["stage"] == "nothing written"]
    assert len(nothing) == 3, "a round without a candidate is a round"
    again = Writer(declines="Knots")
    build(POLICIES, again, Checker(), tmp_path / "b", recipe=Recipe(rounds=3, balanced=False))
    assert not again.prompts


def test_the_card_tells_how_it_was_made(tmp_path: Path) -> None:
    build(POLICIES, Writer("w-model"), Checker("c-model"), tmp_path / "b", recipe=Recipe(seed=4))
    card = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "data_files: data.jsonl" in card
    candidates = rows_of(tmp_path / "b", "candidates.jsonl")
    for policy in POLICIES:
        mine = Counter(row["stage"] for row in candidates if row["policy"] == policy.name)
        cells = [mine[s] for s in ("kept", "unreadable", "duplicate", "unscored", "not harmful", "below threshold")]
        assert f"| {policy.name} | 4 | 4 | {mine.total()} | {' | '.join(map(str, cells))} |" in card
        assert policy.description in card
    for word in ("w-model", "c-model", "seed 4", "no independent second opinion", "No person has read"):
        assert word in card
    assert "{" not in card


def test_a_tiny_model_writes_and_checks_and_the_build_ends_honestly(
    tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    chat = LocalChat(tiny_llama, tiny_tokenizer, "tiny")
    recipe = Recipe(rounds=2, max_new_tokens=60, harm=0.0, toxicity=0.0, balanced=False)
    policies = [Policy("Knots", "Nothing about knots.", 1)]
    try:
        rows = build(policies, chat, chat, tmp_path / "b", recipe=recipe)
    except PostalignError as error:
        rows = []
        assert "no question of 'Knots' passed" in str(error)
    candidates = rows_of(tmp_path / "b", "candidates.jsonl")
    assert candidates, "what was written is on disk, whatever came of it"
    for row in candidates:
        if "harm" in row:
            assert row["harm"] is None or 0 <= row["harm"] <= 1
    assert len(rows) == (1 if any(row["stage"] == "kept" for row in candidates) else 0)


def test_questions_are_taken_out_of_a_reply() -> None:
    reply = 'Sure:\n1. **First one here?**\n 2) "Second  one"\n- third\n• fourth\n\nDone.'
    assert parse_questions(reply) == ["First one here?", "Second one", "third", "fourth"]
    assert parse_questions("only a line\nand another\n") == ["only a line", "and another"]
    assert parse_questions(" \n") == []
    assert parse_questions("2024 was a year") == ["2024 was a year"]


def test_policies(tmp_path: Path) -> None:
    shipped = load_policies("harmeval")
    assert len(shipped) == 11 and {policy.count for policy in shipped} == {50}
    assert all(len(policy.description.split()) >= 8 for policy in shipped)
    file = tmp_path / "p.yaml"
    file.write_text("- {name: A, description: b, count: 3}\n- {name: B, description: 'c\n   d'}\n")
    assert load_policies(file) == [Policy("A", "b", 3), Policy("B", "c d", 50)]
    for text, message in (
        ("a: 1", "must hold a list"),
        ("", "must hold a list"),
        ("- {name: A}", "policy 1"),
        ("- {name: A, description: b}\n- {name: B, description: c, cuont: 3}", "policy 2"),
        ("- {name: A, description: b, count: 0}", "policy 1: count"),
        ("- {name: A, description: b}\n- {name: A, description: c}", "two policies named 'A'"),
        ("- [", "not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message) as caught:
            load_policies(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="or `harmeval`"):
        load_policies(tmp_path / "none.yaml")
