"""A trace says what decoding says: its tokens are the engine's, its numbers the slow twin's."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import postalign as pa
from postalign.alignment import Alignment
from postalign.decoding import generate_replies
from postalign.edits import CheckpointGuide, SparsePatch
from postalign.errors import UsageError
from postalign.evaluation.trace import Candidate, Trace, token_text, trace, write_trace
from tests.decoding.tools import GUIDES, parts
from tests.decoding.twin import PROMPTS, Twin, guidance_of, prompt_ids, push
from tests.edits.test_sparse import sparse_for
from tests.tiny import tiny_model, tiny_tokenizer

STEPS = 6
NAMES = ["amplification", "patch", *GUIDES, *(f"amplification+{kind}+gate" for kind in GUIDES), "gate"]


def agrees(found: Trace, twin: Twin, prompt: str) -> None:
    base = Twin(twin.model, twin.tokenizer, None)
    strength = twin.strength(prompt_ids(twin.tokenizer, prompt))
    assert found.gate == strength
    reply = [step.token.id for step in found.steps]
    for place, step in enumerate(found.steps):
        mixed, before = twin.next(prompt, reply[:place]), base.next(prompt, reply[:place])
        assert step.log_prob == pytest.approx(float(mixed[step.token.id]), abs=1e-4)
        for one in (step.token, step.base_token, *step.top, *step.promoted, *step.suppressed):
            assert math.log(one.mixed) == pytest.approx(float(mixed[one.id]), abs=1e-4)
            assert math.log(one.base) == pytest.approx(float(before[one.id]), abs=1e-4)
        assert step.base_token.id == int(before.argmax())
        assert step.changed == (step.base_token.id != step.token.id)
        expected = float((before.double().exp() * (before.double() - mixed.double())).sum())
        assert step.divergence == pytest.approx(expected, abs=1e-3)
        change = mixed.exp() - before.exp()
        if float(change.abs().max()) > 1e-3:
            assert step.promoted[0].id == int(change.argmax()) and step.suppressed[0].id == int(change.argmin())


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_engines_and_numbers_the_twins(name: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(name, tiny_llama, tiny_tokenizer)
    replies = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=STEPS)
    twin = Twin(tiny_llama, tiny_tokenizer, alignment)
    changed = 0
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        found = trace(tiny_llama, tiny_tokenizer, prompt, alignment, max_new_tokens=STEPS)
        assert [step.token.id for step in found.steps] == reply.token_ids
        assert (
            found.reply
            == pa.generate(tiny_llama, tiny_tokenizer, [prompt], alignment=alignment, max_new_tokens=STEPS)[0]
        )
        agrees(found, twin, prompt)
        changed += any(step.divergence > 1e-3 for step in found.steps)
        guided = alignment.guidance is not None and found.gate > 0
        assert all(step.guided == guided and (step.token.guide is not None) == guided for step in found.steps)
        assert (found.gate_score is None) == ("gate" not in name)
        if found.gate_score is not None and found.gate_threshold is not None:
            assert (found.gate_score >= found.gate_threshold) == bool(found.gate)
    assert (changed > 0) == (name != "gate")


def test_a_patch_of_the_weights(tiny_tokenizer: Any) -> None:
    model, patched = tiny_model(), tiny_model()
    patch = sparse_for(model, share=0.3)
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            parameter.copy_(patch.merge(name, parameter))
    found = trace(model, tiny_tokenizer, PROMPTS[0], Alignment("test", [patch]), max_new_tokens=STEPS)
    reply = [step.token.id for step in found.steps]
    assert reply == Twin(patched, tiny_tokenizer, None).run(PROMPTS[0], STEPS, {2, 5})[0]
    for place, step in enumerate(found.steps):
        after = Twin(patched, tiny_tokenizer, None).next(PROMPTS[0], reply[:place])
        before = Twin(model, tiny_tokenizer, None).next(PROMPTS[0], reply[:place])
        assert step.log_prob == pytest.approx(float(after[step.token.id]), abs=1e-4)
        assert step.token.steered == pytest.approx(step.token.mixed, rel=1e-6)
        assert math.log(step.token.base) == pytest.approx(float(before[step.token.id]), abs=1e-4)
    assert found.first_changed is not None


def test_guidance_of_the_first_tokens_only(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [replace(guidance_of("adapter", tiny_llama), tokens=2)])
    found = trace(tiny_llama, tiny_tokenizer, PROMPTS[0], alignment, max_new_tokens=STEPS)
    assert [step.guided for step in found.steps] == [True] * 2 + [False] * (STEPS - 2)
    assert all(step.token.guide is not None for step in found.steps)  # what the guide would say is shown all along
    agrees(found, Twin(tiny_llama, tiny_tokenizer, alignment), PROMPTS[0])


def test_without_an_alignment_nothing_is_changed(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    for nothing in (None, Alignment("test", [])):
        found = trace(tiny_llama, tiny_tokenizer, PROMPTS[0], nothing, max_new_tokens=4)
        assert found.first_changed is None and all(step.divergence == 0 for step in found.steps)
        assert not any(step.promoted or step.suppressed for step in found.steps)


def test_the_first_changed_token_is_where_the_replies_part(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(strength=0.5)])
    seen = set()
    for prompt in PROMPTS:
        both = [
            generate_replies(tiny_llama, tiny_tokenizer, [prompt], alignment=one, max_new_tokens=STEPS)[0].token_ids
            for one in (None, alignment)
        ]
        parted = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), None)
        found = trace(tiny_llama, tiny_tokenizer, prompt, alignment, max_new_tokens=STEPS)
        assert found.first_changed == parted
        seen.add(parted)
    assert len(seen) > 1


def test_a_given_reply_and_messages(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push()])
    by_text = trace(tiny_llama, tiny_tokenizer, PROMPTS[1], alignment, reply=" first warm", system="You are a cat.")
    chat = [{"role": "system", "content": "You are a cat."}, {"role": "user", "content": PROMPTS[1]}]
    ids = tiny_tokenizer(" first warm", add_special_tokens=False)["input_ids"]
    by_ids = trace(tiny_llama, tiny_tokenizer, chat, alignment, reply=ids)
    assert by_text.to_dict() == by_ids.to_dict() and by_text.finish == "given"
    assert [step.token.id for step in by_text.steps] == ids
    other = trace(tiny_llama, tiny_tokenizer, PROMPTS[1], alignment, reply=ids)
    assert other.steps[0].log_prob != by_ids.steps[0].log_prob  # the system message was read


def test_wrong_use(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="ask for 1 token or more"):
        trace(tiny_llama, tiny_tokenizer, "Hi", reply=[])
    with pytest.raises(UsageError, match="choose 1 or more"):
        trace(tiny_llama, tiny_tokenizer, "Hi", top=0)
    stranger = Alignment("test", [replace(push(), layer=9)])
    with pytest.raises(UsageError, match="out of range"):
        trace(tiny_llama, tiny_tokenizer, "Hi", stranger, reply=[7])


def test_spaces_before_words_are_kept() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(" first warm the oven", add_special_tokens=False)["input_ids"]
    assert "".join(token_text(tokenizer, i) for i in ids) == " first warm the oven"


def test_json_and_page(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("amplification+adapter", tiny_llama, tiny_tokenizer)
    prompt = "<script>alert(1)</script> bread"
    found = trace(tiny_llama, tiny_tokenizer, prompt, alignment, max_new_tokens=STEPS)
    assert (
        json.loads(json.dumps(found.to_dict(), allow_nan=False))["steps"][0]["token"]["id"] == found.steps[0].token.id
    )
    step = replace(found.steps[0], token=Candidate(9, "REPLY<b>", 0.25, 0.5, None, 0.75), changed=True)
    found = replace(found, steps=[step, *found.steps[1:]], first_changed=0)
    text = write_trace(found, tmp_path / "trace.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"""(?:src|href|url)\s*[=(]""", text)  # nothing is fetched
    before, folded = text.split("<details>", 1)
    assert "REPLY" not in before and "REPLY&lt;b&gt;" in folded  # the reply is folded, the prompt is not
    assert "prefers-color-scheme: dark" in text and 'class="changed first"' in text
    assert text.count("<details>") == text.count("</details>") == 1 + STEPS


def test_a_checkpoint_of_another_width(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """A guide whose embedding is padded differently: the tokens that both know are compared."""
    guide = CheckpointGuide("other")
    guide.model = tiny_model(seed=7, vocab_size=400)
    alignment = Alignment("test", [replace(guidance_of("adapter", tiny_llama), guide=guide)])
    found = trace(tiny_llama, tiny_tokenizer, PROMPTS[0], alignment, max_new_tokens=3)
    assert all(one.id < 384 for step in found.steps for one in step.top)


def test_sparse_patches_come_off(tiny_tokenizer: Any) -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    patch: SparsePatch = sparse_for(model)
    trace(model, tiny_tokenizer, "Hi", Alignment("test", [patch]), max_new_tokens=2)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
