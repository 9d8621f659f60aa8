"""Several tokens at a time with a guide that has its own weights: the same tokens in fewer passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postalign.alignment import Alignment
from postalign.decoding import generate_replies
from postalign.decoding.speculative import Speculation
from postalign.edits import CheckpointGuide, Guidance
from tests.decoding.test_sampling import assert_fits, warped
from tests.decoding.tools import ENDS
from tests.decoding.twin import PROMPTS, Twin, push, splitting_gate
from tests.tiny import tiny_model


def checkpoint(other: Any, lam: float) -> Guidance:
    guide = CheckpointGuide("other")
    guide.model = other
    return Guidance(guide, lam)


def passes(model: Any) -> list[tuple[int, ...]]:
    """The shape of the ids of every pass from now on."""
    sizes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda m, a, k: sizes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("lam", [0.3, 0.9])
def test_greedy_is_the_twin(kind: str, lam: float, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    alignment = Alignment("test", [push(), checkpoint(tiny_model(kind, seed=7), lam)])
    twin = Twin(model, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, 20, ENDS)[0] for prompt in PROMPTS]
    for size in (1, 2, 5):
        replies = generate_replies(
            model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=20, batch_size=size
        )
        assert [r.token_ids for r in replies] == expected


def test_the_guide_reads_several_tokens_in_one_pass(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    guide = tiny_model("llama", seed=7)
    sizes = passes(guide)
    alignment = Alignment("test", [checkpoint(guide, 0.05)])
    reply = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS[:1], alignment=alignment, max_new_tokens=30)[0]
    assert len(reply.token_ids) == 30
    assert len(sizes) - 1 < 15 and max(length for _, length in sizes[1:]) > 4


def test_a_guide_with_a_sliding_window_goes_one_by_one(tiny_tokenizer: Any) -> None:
    model, guide = tiny_model("gemma2"), tiny_model("gemma2", seed=7)
    sizes = passes(guide)
    alignment = Alignment("test", [checkpoint(guide, 0.5)])
    reply = generate_replies(model, tiny_tokenizer, PROMPTS[:1], alignment=alignment, max_new_tokens=6)[0]
    assert [length for _, length in sizes[1:]] == [1] * 5
    assert reply.token_ids == Twin(model, tiny_tokenizer, alignment).run(PROMPTS[0], 6, ENDS)[0]


def test_two_sampled_tokens_fit_the_joint_distribution(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(), checkpoint(tiny_model("llama", seed=7), 0.5)])
    twin, k = Twin(tiny_llama, tiny_tokenizer, alignment), 4
    replies = generate_replies(
        tiny_llama,
        tiny_tokenizer,
        ["Hi"] * 1200,
        alignment=alignment,
        max_new_tokens=3,  # of which the last two are drafted
        do_sample=True,
        top_k=k,
        seed=5,
        batch_size=400,
    )
    first = max({r.token_ids[0] for r in replies}, key=[r.token_ids[0] for r in replies].count)
    rest = [tuple(r.token_ids[1:]) for r in replies if r.token_ids[0] == first]
    joint: dict[tuple[int, ...], float] = {}
    second = warped(twin.next("Hi", [first]), 1.0, k, 1.0)
    for token in second.nonzero().flatten().tolist():
        third = warped(twin.next("Hi", [first, token]), 1.0, k, 1.0)
        joint |= {(token, then): float(second[token] * third[then]) for then in third.nonzero().flatten().tolist()}
    pairs = list(joint)
    assert len(rest) > 300
    counts = torch.bincount(torch.tensor([pairs.index(pair) for pair in rest]), minlength=len(pairs))
    assert_fits(counts, torch.tensor(list(joint.values())).double())


def test_sampled_replies_are_those_of_one_token_at_a_time(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = splitting_gate(tiny_llama, tiny_tokenizer, PROMPTS)
    alignment = Alignment("test", [push(), checkpoint(tiny_model("llama", seed=7), 0.7)], gate)
    settings: Any = {"alignment": alignment, "max_new_tokens": 16, "do_sample": True, "temperature": 1.3, "seed": 4}
    several = {
        size: generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, batch_size=size, **settings) for size in (1, 3, 5)
    }
    monkeypatch.setattr(Speculation, "possible", staticmethod(lambda stream: False))
    single = [r.token_ids for r in generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, **settings)]
    assert all([r.token_ids for r in replies] == single for replies in several.values())
    assert len(set(map(tuple, single))) == len(PROMPTS)
