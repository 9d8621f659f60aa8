"""The engine against a slow twin: every row of a batch, every guide, gates, scopes, architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postalign.alignment import Alignment
from postalign.decoding import generate_replies
from postalign.models.chat import encode
from tests.decoding.tools import ENDS, GUIDES, STEPS, close, forced_steps, hooks, parts
from tests.decoding.twin import (
    PROMPTS,
    Twin,
    guidance_of,
    one_probe,
    patch_for,
    prompt_ids,
    push,
    splitting_gate,
    vector,
)
from tests.tiny import KINDS, tiny_model

NAMES = ["amplification", *GUIDES, *(f"amplification+{g}+gate" for g in GUIDES), "amplification+patch", "patch+gate"]


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_single_runs_equals_twin(name: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(name, tiny_llama, tiny_tokenizer)
    twin = Twin(tiny_llama, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, STEPS, ENDS) for prompt in PROMPTS]

    together = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=STEPS)
    assert [reply.token_ids for reply in together] == [ids for ids, _ in expected]
    for prompt, reply in zip(PROMPTS, together, strict=True):
        alone = generate_replies(tiny_llama, tiny_tokenizer, [prompt], alignment=alignment, max_new_tokens=STEPS)
        assert alone[0].token_ids == reply.token_ids
        assert alone[0].gate == reply.gate == twin.strength(prompt_ids(tiny_tokenizer, prompt))

    ids = [reply.token_ids for reply in together]
    steps, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, ids)
    for row, (_, slow) in enumerate(expected):
        close(steps[row], slow)
        single, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, [PROMPTS[row]], [ids[row]])
        close(steps[row], single[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_alignment_acts(name: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(name, tiny_llama, tiny_tokenizer)
    ids = [[9] * 3] * len(PROMPTS)
    base, _ = forced_steps(tiny_llama, tiny_tokenizer, Alignment("base", []), PROMPTS, ids)
    steps, strength = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, ids)
    acted = (steps - base).abs().amax(dim=-1) > 1e-3
    assert torch.equal(acted, strength.bool().unsqueeze(1).expand_as(acted))


@pytest.mark.parametrize("lam", [0.5, 0.99])
def test_published_lambda(lam: float, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(), guidance_of("adapter", tiny_llama, lam)])
    for prompt in PROMPTS[:2]:
        ids, slow = Twin(tiny_llama, tiny_tokenizer, alignment).run(prompt, STEPS)
        steps, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, [prompt], [ids])
        close(steps[0], slow)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_strength_zero_is_bit_equal_to_the_base(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    batch = encode(tiny_tokenizer, PROMPTS)
    nothing = Alignment("test", [push(strength=0.0), guidance_of("vector", model, lam=0.0)])
    shut = Alignment("test", [push(strength=3.0)], one_probe(vector(), 0.0, 1, 1e9))
    ids = [[8, 9, 10]] * len(PROMPTS)
    base, _ = forced_steps(model, tiny_tokenizer, Alignment("none", []), PROMPTS, ids)
    with torch.no_grad():
        plain = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
    assert torch.equal(base[:, 0], torch.log_softmax(plain[:, -1].float(), -1))
    for alignment in (nothing, shut):
        steps, _ = forced_steps(model, tiny_tokenizer, alignment, PROMPTS, ids)
        assert torch.equal(steps, base)
        replies = generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=STEPS)
        unaligned = generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=STEPS)
        assert [r.token_ids for r in replies] == [r.token_ids for r in unaligned]


def test_without_alignment_it_is_transformers_generate(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    batch = encode(tiny_tokenizer, PROMPTS)
    theirs = tiny_llama.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=3,
    )
    ours = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=STEPS)
    assert [r.token_ids for r in ours] == theirs[:, batch.input_ids.shape[1] :].tolist()
    assert all(r.gate is None for r in ours)


@pytest.mark.parametrize("guide", GUIDES)
def test_closed_rows_are_the_base(guide: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(f"amplification+{guide}+gate", tiny_llama, tiny_tokenizer)
    ids = [[9, 8, 7, 6]] * len(PROMPTS)
    base, _ = forced_steps(tiny_llama, tiny_tokenizer, Alignment("base", []), PROMPTS, ids)
    steps, strength = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, ids)
    closed = strength == 0
    assert 0 < int(closed.sum()) < len(PROMPTS)
    # passes that hold more rows may round the last bit otherwise; the prompts' own pass holds the same
    assert torch.equal(steps[closed, 0], base[closed, 0])
    torch.testing.assert_close(steps[closed], base[closed], rtol=0, atol=1e-5)
    assert not torch.isclose(steps[~closed], base[~closed]).all(-1).any()


def test_the_guide_runs_on_open_rows_only(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    other, sizes = tiny_model("llama", seed=7), []
    other.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    gate = splitting_gate(tiny_llama, tiny_tokenizer, PROMPTS)
    alignment = Alignment("test", [guidance_of("checkpoint", tiny_llama, other=other)], gate)
    _, strength = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, [[9, 8, 7]] * len(PROMPTS))
    opened = int(strength.sum())
    assert 0 < opened < len(PROMPTS)
    assert [rows for rows, _ in sizes] == [opened] * 3 and [length for _, length in sizes[1:]] == [1, 1]
    shut = Alignment("test", alignment.edits, one_probe(vector(), 0.0, 1, 1e9))
    forced_steps(tiny_llama, tiny_tokenizer, shut, PROMPTS, [[9, 8]] * len(PROMPTS))
    assert len(sizes) == 3  # closed for all: no pass of the guide at all


def test_a_gate_open_for_all_rows_equals_no_gate(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("amplification+vector", tiny_llama, tiny_tokenizer)
    gated = Alignment("test", alignment.edits, one_probe(vector(), 0.0, 2, -1e9))
    ids = [[9, 8, 7]] * len(PROMPTS)
    free, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, ids)
    steps, strength = forced_steps(tiny_llama, tiny_tokenizer, gated, PROMPTS, ids)
    assert torch.equal(steps, free) and bool((strength == 1).all())


@pytest.mark.parametrize(
    "scope", [("prompt",), ("last",), ("generation",), ("all",), ("last", "generation"), ("prompt", "generation")]
)
def test_token_scopes(scope: tuple[str, ...], tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(scope=scope)])
    twin = Twin(tiny_llama, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, 4) for prompt in PROMPTS[:3]]
    ids = [reply for reply, _ in expected]
    steps, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS[:3], ids)
    for row, (_, slow) in enumerate(expected):
        close(steps[row], slow)


@pytest.mark.parametrize("kind", KINDS)
def test_architectures(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    gate = splitting_gate(model, tiny_tokenizer, PROMPTS)
    alignment = Alignment("test", [push(), patch_for(model), guidance_of("adapter", model)], gate)
    twin = Twin(model, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, 4, ENDS) for prompt in PROMPTS]
    replies = generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=4)
    assert [r.token_ids for r in replies] == [ids for ids, _ in expected]
    shortest = min(len(ids) for ids, _ in expected)
    steps, strength = forced_steps(model, tiny_tokenizer, alignment, PROMPTS, [ids[:shortest] for ids, _ in expected])
    close(steps, torch.stack([slow[:shortest] for _, slow in expected]))
    assert set(strength.tolist()) == {0.0, 1.0}
    assert hooks(model) == 0


def test_a_guide_with_padded_embeddings(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    wide = tiny_model("llama", vocab_size=400, seed=7)
    narrow = tiny_model("llama", seed=7)
    narrow.load_state_dict({k: v[:384] if v.shape[0] == 400 else v for k, v in wide.state_dict().items()}, strict=True)
    guides = []
    for other in (wide, narrow):
        alignment = Alignment("test", [guidance_of("checkpoint", tiny_llama, other=other)])
        guides.append(forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, [[9, 8]] * 5)[0])
    assert guides[0].shape[-1] == guides[1].shape[-1] == 384
    close(guides[0], guides[1])
