"""Teacher-forced distributions are those of decoding, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from postalign.alignment import Alignment
from postalign.decoding import forced, forced_reply, generate_replies, next_token_log_probs
from postalign.decoding.engine import Stream
from postalign.decoding.forced import RAW_PROMPT_TOKENS
from postalign.decoding.guides import guide_inputs
from postalign.edits import PromptGuide
from postalign.errors import PostalignError
from postalign.models.chat import encode
from tests.decoding.tools import GUIDES, hooks
from tests.decoding.twin import (
    PROMPTS,
    Twin,
    guidance_of,
    last_state,
    one_probe,
    patch_for,
    push,
    splitting_gate,
    union64,
    vector,
)
from tests.tiny import SENTENCES, tiny_model, tiny_tokenizer


def steps_of(model: Any, tokenizer: Any, alignment: Alignment, prompt: str, reply: list[int]) -> torch.Tensor:
    """What the engine's stream says along `reply`, `[tokens, vocab]`."""
    guide = alignment.guidance.guide if alignment.guidance else None
    other = None
    if isinstance(guide, PromptGuide):
        other = guide_inputs(guide, tokenizer, [prompt], torch.device("cpu"))
    with torch.no_grad(), Stream(model, alignment, getattr(guide, "model", None)) as stream:
        found = [stream.first(encode(tokenizer, [prompt]), other)]
        found += [stream.next(torch.tensor([token])) for token in reply[:-1]]
    return torch.cat(found)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(("gated", "tokens"), [(False, None), (True, None), (True, 2), (False, 6)])
def test_equals_the_engine_along_the_greedy_path(
    guide: str, gated: bool, tokens: int | None, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    gate = splitting_gate(tiny_llama, tiny_tokenizer, PROMPTS) if gated else None
    guidance = replace(guidance_of(guide, tiny_llama, other=tiny_model("llama", seed=7)), tokens=tokens)
    alignment = Alignment("test", [push(), guidance], gate)
    replies = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=6)
    ids = [reply.token_ids for reply in replies]
    found = next_token_log_probs(tiny_llama, tiny_tokenizer, PROMPTS, ids, alignment)
    twin = Twin(tiny_llama, tiny_tokenizer, alignment)
    for prompt, reply, (scores, scored) in zip(PROMPTS, ids, found, strict=True):
        assert scored.tolist() == reply == scores.argmax(-1).tolist()
        assert scores.dtype == torch.float32
        engine = steps_of(tiny_llama, tiny_tokenizer, alignment, prompt, reply)
        torch.testing.assert_close(scores, engine, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores[-1], twin.next(prompt, reply[:-1]), rtol=1e-4, atol=1e-4)
    assert hooks(tiny_llama) == 0


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen2_moe"])
def test_other_architectures(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    gate = splitting_gate(model, tiny_tokenizer, PROMPTS)
    alignment = Alignment("test", [push(), patch_for(model), guidance_of("adapter", model)], gate)
    reply = [30, 40, 50, 60]
    for prompt, (scores, _) in zip(
        PROMPTS,
        next_token_log_probs(model, tiny_tokenizer, PROMPTS, [reply] * len(PROMPTS), alignment),
        strict=True,
    ):
        engine = steps_of(model, tiny_tokenizer, alignment, prompt, reply)
        torch.testing.assert_close(scores, engine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("guide", GUIDES)
def test_a_batch_equals_single_rows(guide: str, kind: str, tiny_tokenizer: Any) -> None:
    """Prompts and answers of several lengths, padded on the left; the gate opens for some."""
    model = tiny_model(kind)
    other = tiny_model(kind, seed=7)
    guidance = replace(guidance_of(guide, model, other=other), tokens=3)
    alignment = Alignment("test", [push(), guidance], splitting_gate(model, tiny_tokenizer, PROMPTS))
    answers = [[30 + i, 40, 50, 60, 70][: 1 + i] for i in range(len(PROMPTS))]
    single = [forced_reply(model, tiny_tokenizer, p, a, alignment) for p, a in zip(PROMPTS, answers, strict=True)]
    heads = [encode(tiny_tokenizer, [prompt]).input_ids[0] for prompt in PROMPTS]
    views = None
    if isinstance(guidance.guide, PromptGuide):
        views = [guide_inputs(guidance.guide, tiny_tokenizer, [p], torch.device("cpu")).input_ids[0] for p in PROMPTS]
    tails = [torch.tensor(answer) for answer in answers]
    batch = forced(model, heads, tails, alignment, guide=getattr(guidance.guide, "model", None), guide_heads=views)
    assert {one.strength for one in single} == {0.0, 1.0}
    for one, row, answer in zip(single, batch, answers, strict=True):
        assert (row.strength, row.guided, row.ids.tolist()) == (one.strength, one.guided, answer)
        assert one.guided == (min(3, len(answer)) if one.strength else 0)
        assert row.score == pytest.approx(one.score, abs=1e-4)
        torch.testing.assert_close(row.own, one.own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row.mixed, one.mixed, rtol=1e-4, atol=1e-4)
        assert (row.guide is None) == (one.guide is None) == (one.strength == 0)
        if row.guide is not None and one.guide is not None:
            torch.testing.assert_close(row.guide, one.guide, rtol=1e-4, atol=1e-4)
    assert hooks(model) == 0


def perplexity(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    losses = [-scores.gather(1, ids.unsqueeze(1)).squeeze(1) for scores, ids in pairs]
    return float(torch.cat(losses).mean().exp())


def test_strength_zero_leaves_perplexity_alone(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    nothing = Alignment("test", [push(strength=0.0), guidance_of("adapter", tiny_llama, 0.0)])
    texts, prompts = SENTENCES, [None] * len(SENTENCES)
    base = next_token_log_probs(tiny_llama, tiny_tokenizer, prompts, texts)
    same = next_token_log_probs(tiny_llama, tiny_tokenizer, prompts, texts, nothing)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(base, same, strict=True))
    assert perplexity(base) == perplexity(same) > 1
    pushed = next_token_log_probs(tiny_llama, tiny_tokenizer, prompts, texts, nothing.with_strength(2.0))
    assert perplexity(pushed) != perplexity(base)


def test_perplexity_is_that_of_the_models_own_loss(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    scored = next_token_log_probs(tiny_llama, tiny_tokenizer, [None], SENTENCES[:1])
    ids = torch.tensor([tiny_tokenizer(SENTENCES[0])["input_ids"]])
    labels = ids.clone()
    labels[:, :RAW_PROMPT_TOKENS] = -100
    with torch.no_grad():
        loss = tiny_llama(input_ids=ids, labels=labels).loss
    assert perplexity(scored) == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize("add_bos", [True, False])
def test_raw_text_begins_as_the_tokenizer_begins_it(add_bos: bool, tiny_llama: Any) -> None:
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    text = SENTENCES[1]
    expected = tokenizer(text)["input_ids"]
    assert (expected[0] == tokenizer.bos_token_id) == add_bos
    for given in (text, f"<s>{text}") if add_bos else (text,):  # one BOS, even if the text has it
        scores, tail = next_token_log_probs(tiny_llama, tokenizer, [None], [given])[0]
        assert tail.tolist() == expected[RAW_PROMPT_TOKENS:]
        with torch.no_grad():
            logits = tiny_llama(input_ids=torch.tensor([expected])).logits[0, RAW_PROMPT_TOKENS - 1 : -1]
        torch.testing.assert_close(scores, torch.log_softmax(logits, -1))


def test_an_answer_to_a_prompt_gets_no_second_beginning(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    _, ids = next_token_log_probs(tiny_llama, tiny_tokenizer, ["Hi"], ["Sure, here"])[0]
    assert ids.tolist() == tiny_tokenizer("Sure, here", add_special_tokens=False)["input_ids"]


def test_the_gate_of_raw_text_reads_its_sixteenth_token(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer(SENTENCES[0])["input_ids"]
    score = float(last_state(tiny_llama, ids[:RAW_PROMPT_TOKENS], layer=1) @ vector(9))
    base, _ = next_token_log_probs(tiny_llama, tiny_tokenizer, [None], [SENTENCES[0]])[0]
    for threshold, opens in ((score - 1e-3, True), (score + 1e-3, False)):
        alignment = Alignment("test", [push()], one_probe(vector(9), 0.0, 1, threshold))
        found, _ = next_token_log_probs(tiny_llama, tiny_tokenizer, [None], [SENTENCES[0]], alignment)[0]
        assert torch.equal(found, base) != opens


def test_short_text_has_nothing_to_score(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    scores, ids = next_token_log_probs(tiny_llama, tiny_tokenizer, [None], ["Hi"])[0]
    assert scores.shape == (0, 384) and ids.shape == (0,)
    scores, ids = next_token_log_probs(tiny_llama, tiny_tokenizer, ["Hi"], [[]])[0]
    assert scores.shape == (0, 384) and ids.shape == (0,)


def test_mixing_is_the_union_at_every_position(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    guidance = guidance_of("vector", tiny_llama, 0.9)
    text = [SENTENCES[2]]
    a, _ = next_token_log_probs(tiny_llama, tiny_tokenizer, [None], text)[0]
    b, _ = next_token_log_probs(tiny_llama, tiny_tokenizer, [None], text, Alignment("t", list(guidance.guide.edits())))[
        0
    ]
    mixed, _ = next_token_log_probs(tiny_llama, tiny_tokenizer, [None], text, Alignment("t", [guidance]))[0]
    torch.testing.assert_close(mixed, union64(a, b, 0.9), rtol=1e-4, atol=1e-4)


def test_hooks_are_gone_after_an_error(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(PostalignError):
        next_token_log_probs(tiny_llama, tiny_tokenizer, ["Hi"], [[7, 8]], Alignment("t", [push(), push(layer=7)]))
    assert hooks(tiny_llama) == 0
