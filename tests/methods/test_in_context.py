"""In-context prompts hold what they should, and the corrupted ones hold no refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postalign.data.records import Prompt
from postalign.errors import UsageError
from postalign.methods import in_context
from postalign.methods.in_context import COMPLIANT_OPENINGS, in_context_prompts
from tests.methods.small import DATA, REFUSALS


def chats(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> list[list[dict[str, str]]]:
    """The chats that in_context_prompts encodes."""
    seen: list[list[dict[str, str]]] = []
    real = in_context.encode

    def encode(tokenizer: Any, prompts: Any, **rest: Any) -> Any:
        seen.extend(p for p in prompts if not isinstance(p, str))
        return real(tokenizer, prompts, **rest)

    monkeypatch.setattr(in_context, "encode", encode)
    in_context_prompts(*args, **kwargs)
    return seen


DEMOS = list(DATA.split("fit").harmful)


def test_prompts_hold_their_shots(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chats(monkeypatch, tiny_tokenizer, DEMOS, DEMOS, 8, 3, 0)
    assert len(found) == 8
    first_sentences = {"I cannot help with that.", "Sorry, I will not.", "No."}
    for chat in found:
        assert [turn["role"] for turn in chat] == ["user", "assistant"] * 3 + ["user"]
        questions = [turn["content"] for turn in chat if turn["role"] == "user"]
        assert len(set(questions)) == 4, "a question is no demonstration of itself"
        assert {turn["content"] for turn in chat if turn["role"] == "assistant"} <= first_sentences


def test_corruption_removes_the_refusals(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for chat in chats(monkeypatch, tiny_tokenizer, DEMOS, DEMOS, 5, 3, 0, "compliant"):
        assert {turn["content"] for turn in chat if turn["role"] == "assistant"} <= set(COMPLIANT_OPENINGS)


def test_mixed_corruption_removes_every_second_one(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for chat in chats(monkeypatch, tiny_tokenizer, DEMOS, DEMOS, 5, 3, 0, "mixed"):
        answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
        assert [answer in COMPLIANT_OPENINGS for answer in answers] == [True, False, True]


def test_targets_begin_refusals_and_no_compliance(tiny_tokenizer: Any) -> None:
    prompts = in_context_prompts(tiny_tokenizer, DEMOS, DEMOS, 3, 2, 0)
    ids, target = prompts[0]
    assert ids.dim() == 1
    assert int(ids[0]) == tiny_tokenizer.bos_token_id
    assert all(torch.equal(t, target) for _, t in prompts)
    refusing = {tiny_tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in REFUSALS}
    complying = {tiny_tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in COMPLIANT_OPENINGS}
    assert set(target.tolist()) == refusing - complying != set()


def test_prompts_depend_on_the_seed_only(tiny_tokenizer: Any) -> None:
    def ids(seed: int) -> list[list[int]]:
        return [p.tolist() for p, _ in in_context_prompts(tiny_tokenizer, DEMOS, DEMOS, 4, 2, seed)]

    assert ids(0) == ids(0) != ids(1)


def test_too_few_demonstrations(tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"4 shots need 5 different .* which has 4: add pairs or set shots=3"):
        in_context_prompts(tiny_tokenizer, DEMOS, DEMOS, 1, 4, 0)
    with pytest.raises(UsageError, match="has 1: add pairs"):
        in_context_prompts(tiny_tokenizer, DEMOS[:1] * 5, DEMOS, 1, 2, 0)  # the same one five times
    with pytest.raises(UsageError, match="has 0: add pairs"):
        in_context_prompts(tiny_tokenizer, [], DEMOS, 1, 2, 0)


def test_refusals_that_begin_like_compliance(tiny_tokenizer: Any) -> None:
    sure = [Prompt(row.prompt, "harmful", response="Sure, but no.") for row in DEMOS]
    with pytest.raises(UsageError, match="begins like a compliant answer"):
        in_context_prompts(tiny_tokenizer, sure, DEMOS, 1, 2, 0)
