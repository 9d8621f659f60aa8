"""Replies as they end, and replies whose beginning is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postalign.decoding import as_completed, check_prompts, generate_replies
from postalign.decoding.engine import Engine
from postalign.decoding.replies import reply_of
from postalign.edits import PromptGuide
from postalign.errors import UsageError
from tests.decoding.tools import hooks, parts
from tests.decoding.twin import PROMPTS, prompt_ids

MORE = [*PROMPTS, "The quick brown fox", "a b c", "moon " * 20]
START = "Sure, here is"


def test_they_are_those_of_generate_and_come_as_they_end(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    expected = generate_replies(tiny_llama, tiny_tokenizer, MORE, max_new_tokens=9, batch_size=3)
    seen: list[int] = []
    steps = []
    found = {}
    for index, reply in as_completed(
        tiny_llama, tiny_tokenizer, MORE, max_new_tokens=9, batch_size=3, on_step=lambda: steps.append(len(seen))
    ):
        seen.append(index)
        found[index] = reply
    assert sorted(seen) == list(range(len(MORE)))
    assert [found[i].token_ids for i in range(len(MORE))] == [r.token_ids for r in expected]
    assert [found[i].text for i in range(len(MORE))] == [r.text for r in expected]
    assert len(set(steps)) > 2, "all replies came at the end"
    assert hooks(tiny_llama) == 0


def test_a_reader_who_stops_leaves_the_model_as_it_was(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("amplification", tiny_llama, tiny_tokenizer)
    replies = as_completed(tiny_llama, tiny_tokenizer, MORE, alignment=alignment, max_new_tokens=4, batch_size=2)
    next(replies)
    assert hooks(tiny_llama) > 0
    replies.close()  # type: ignore[attr-defined]
    assert hooks(tiny_llama) == 0


def test_a_number_is_a_random_stream(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    whole = generate_replies(tiny_llama, tiny_tokenizer, MORE, max_new_tokens=6, do_sample=True, seed=4)
    some = as_completed(
        tiny_llama, tiny_tokenizer, [MORE[5], MORE[2]], numbers=[5, 2], max_new_tokens=6, do_sample=True, seed=4
    )
    found = dict(some)
    assert found[0].token_ids == whole[5].token_ids and found[1].token_ids == whole[2].token_ids


def test_a_prefilled_reply_goes_on_from_its_beginning(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Against plain argmax over the whole prefix, one prompt at a time; other rows begin freely."""
    starts = [START, "", " " + START, "", START]
    found = dict(as_completed(tiny_llama, tiny_tokenizer, PROMPTS, prefills=starts, max_new_tokens=7, batch_size=2))
    for i, (prompt, start) in enumerate(zip(PROMPTS, starts, strict=True)):
        ids = prompt_ids(tiny_tokenizer, prompt)
        # the template ends in a line break, after which its own answers have no leading space to merge with
        ids += tiny_tokenizer(start, add_special_tokens=False)["input_ids"]
        expected: list[int] = []
        for _ in range(7):
            logits = tiny_llama(input_ids=torch.tensor([ids + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
            if expected[-1] in (2, 5):
                break
        assert found[i].token_ids == expected
        assert found[i].text.startswith(start)
        assert found[i].text != start


def test_a_guide_with_its_own_prompt_reads_the_beginning_too(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("prompt", tiny_llama, tiny_tokenizer)
    assert alignment.guidance is not None and isinstance(alignment.guidance.guide, PromptGuide)
    with Engine(tiny_llama, tiny_tokenizer, alignment) as engine:
        request = engine.submit(PROMPTS[0], prefill=START, max_new_tokens=3)
        count = len(request.prefill_ids)
        assert count > 0
        assert request.guide_ids is not None
        assert request.guide_ids[-count:] == request.ids[-count:] == request.prefill_ids
        while engine.step():
            pass
        assert reply_of(tiny_tokenizer, request, engine.eos).text.startswith(START)


def test_a_prompt_that_does_not_fit_is_told_by_name(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    check_prompts(tiny_llama, tiny_tokenizer, MORE, max_new_tokens=20)
    with pytest.raises(UsageError, match="prompt b of mine has"):
        check_prompts(tiny_llama, tiny_tokenizer, ["Hi", "moon " * 900], names=["a of mine", "b of mine"])
    with pytest.raises(UsageError, match="prompt 1 has"):
        check_prompts(tiny_llama, tiny_tokenizer, ["Hi"], prefills=["moon " * 900])
