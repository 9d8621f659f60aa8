"""Sampling fits the exact distribution, keeps to its seed, and does not depend on the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from postalign.alignment import Alignment
from postalign.decoding import generate_replies
from postalign.decoding.sampling import Sampler, StopText
from postalign.errors import UsageError
from tests.decoding.twin import PROMPTS, Twin, guidance_of, push, splitting_gate
from tests.tiny import tiny_model


def warped(scores: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities `[vocab]` after temperature, then top-k, then top-p, by hand in float64."""
    p = torch.softmax(scores.double() / temperature, -1)
    ranked = p.argsort(descending=True).tolist()
    kept = ranked[: top_k or len(ranked)]
    p = torch.where(torch.isin(torch.arange(len(p)), torch.tensor(kept)), p, 0.0)
    p = p / p.sum()
    before, nucleus = 0.0, []
    for token in kept:
        if before >= top_p:
            break
        nucleus.append(token)
        before += float(p[token])
    p = torch.where(torch.isin(torch.arange(len(p)), torch.tensor(nucleus)), p, 0.0)
    return p / p.sum()


def assert_fits(counts: Tensor, p: Tensor) -> None:
    """Pearson's chi-square on cells of at least five expected draws, the rest pooled; 4.5 sigma."""
    n = int(counts.sum())
    assert not bool(counts[p == 0].any()), "a token was drawn that has no probability"
    large = n * p >= 5
    observed = torch.cat([counts[large].double(), counts[~large].sum().double().reshape(1)])
    expected = torch.cat([n * p[large], (n * p[~large]).sum().reshape(1)])
    if float(expected[-1]) < 5:
        observed, expected = observed[:-1], expected[:-1]
    freedom = max(1, len(observed) - 1)
    chi = float(((observed - expected) ** 2 / expected).sum())
    # Wilson and Hilferty's normal approximation
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.5, f"chi-square {chi:.1f} for {freedom} degrees of freedom"


SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.6, 20, 1.0), (1.0, 0, 0.6), (1.3, 50, 0.8)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_the_sampler_fits(temperature: float, top_k: int, top_p: float) -> None:
    scores = torch.log_softmax(2 * torch.randn(97, generator=torch.Generator().manual_seed(3)), -1)
    n = 6000
    sampler = Sampler(True, temperature, top_p, top_k, seed=11).for_rows(range(n))
    drawn = sampler(scores.expand(n, -1), torch.arange(n))
    assert_fits(torch.bincount(drawn, minlength=97), warped(scores, temperature, top_k, top_p))


def test_one_row_drawn_again_and_again_fits() -> None:
    scores = torch.log_softmax(torch.randn(31, generator=torch.Generator().manual_seed(4)), -1)
    sampler = Sampler(True, 1.0, 1.0, 0, seed=0).for_rows([5])
    drawn = torch.cat([sampler(scores.unsqueeze(0), torch.tensor([0])) for _ in range(3000)])
    assert_fits(torch.bincount(drawn, minlength=31), torch.softmax(scores.double(), -1))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.2, 12, 0.9)])
def test_the_engine_samples_the_mixed_distribution(
    temperature: float, top_k: int, top_p: float, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    alignment = Alignment("test", [push(), guidance_of("vector", tiny_llama, 0.5)])
    n = 1500
    settings = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 2}
    replies = generate_replies(
        tiny_llama, tiny_tokenizer, ["Hi"] * n, alignment=alignment, max_new_tokens=1, batch_size=500, **settings
    )
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in replies]), minlength=384)
    exact = Twin(tiny_llama, tiny_tokenizer, alignment).next("Hi", [])
    assert_fits(counts, warped(exact, temperature, top_k, top_p))


def test_two_sampled_steps_fit_the_joint_distribution(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(), guidance_of("adapter", tiny_llama, 0.5)])
    twin = Twin(tiny_llama, tiny_tokenizer, alignment)
    n, k = 1200, 4
    replies = generate_replies(
        tiny_llama,
        tiny_tokenizer,
        ["Hi"] * n,
        alignment=alignment,
        max_new_tokens=2,
        do_sample=True,
        top_k=k,
        seed=5,
        batch_size=400,
    )
    joint: dict[tuple[int, ...], float] = {}
    first = warped(twin.next("Hi", []), 1.0, k, 1.0)
    for token in first.nonzero().flatten().tolist():
        second = warped(twin.next("Hi", [token]), 1.0, k, 1.0)
        joint |= {(token, then): float(first[token] * second[then]) for then in second.nonzero().flatten().tolist()}
    pairs = list(joint)
    drawn = [pairs.index(tuple(r.token_ids)) for r in replies]
    assert_fits(torch.bincount(torch.tensor(drawn), minlength=len(pairs)), torch.tensor(list(joint.values())).double())


def test_a_ruled_out_token_is_never_drawn() -> None:
    scores = torch.full((200, 8), -math.inf)
    scores[:, [2, 5]] = math.log(0.5)
    drawn = Sampler(True, 1.3, 1.0, 0, seed=0).for_rows(range(200))(scores, range(200))
    assert set(drawn.tolist()) == {2, 5}


def sampled(model: Any, tokenizer: Any, prompts: list[str], **settings: Any) -> list[list[int]]:
    gate = splitting_gate(model, tokenizer, PROMPTS)
    alignment = Alignment("test", [push(), guidance_of("adapter", model)], gate)
    more = {"do_sample": True, "temperature": 1.2, "max_new_tokens": 8, **settings}
    return [r.token_ids for r in generate_replies(model, tokenizer, prompts, alignment=alignment, **more)]


def test_the_seed_decides(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sampled(tiny_llama, tiny_tokenizer, PROMPTS, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was touched"
    torch.manual_seed(99)
    assert sampled(tiny_llama, tiny_tokenizer, PROMPTS, seed=3) == first
    other = sampled(tiny_llama, tiny_tokenizer, PROMPTS, seed=4)
    assert all(a != b for a, b in zip(first, other, strict=True))
    same = sampled(tiny_llama, tiny_tokenizer, ["Hi"] * 4, seed=3)
    assert len(set(map(tuple, same))) == 4, "rows share their random numbers"


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_sampled_rows_do_not_depend_on_the_batch(size: int, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    whole = sampled(tiny_llama, tiny_tokenizer, PROMPTS, batch_size=5)
    assert sampled(tiny_llama, tiny_tokenizer, PROMPTS, batch_size=size) == whole
    # only its own index counts: what stands beside it may change
    changed = [PROMPTS[0], "something else", *PROMPTS[2:], "and more"]
    again = sampled(tiny_llama, tiny_tokenizer, changed, batch_size=size)
    assert [again[i] for i in (0, 2, 3, 4)] == [whole[i] for i in (0, 2, 3, 4)]


def test_a_part_of_the_prompts_samples_as_the_whole(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    whole = sampled(tiny_llama, tiny_tokenizer, PROMPTS)
    assert sampled(tiny_llama, tiny_tokenizer, PROMPTS[2:], first_row=2) == whole[2:]
    assert sampled(tiny_llama, tiny_tokenizer, PROMPTS[2:]) != whole[2:]


def test_sampled_rows_do_not_depend_on_when_others_end(tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    free = sampled(model, tiny_tokenizer, PROMPTS)
    eos = {free[1][1], free[3][3], free[0][5]}
    model.generation_config.eos_token_id = sorted(eos)
    cut = sampled(model, tiny_tokenizer, PROMPTS)
    for before, after in zip(free, cut, strict=True):
        ends = [i for i, token in enumerate(before) if token in eos]
        assert after == (before[: ends[0] + 1] if ends else before)
    assert len({len(ids) for ids in cut}) > 1


def test_top_k_one_is_greedy(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    greedy = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    ids = [
        r.token_ids
        for r in generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=6, do_sample=True, top_k=1)
    ]
    assert ids == [r.token_ids for r in greedy]


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_settings_out_of_range(bad: dict[str, float]) -> None:
    settings: Any = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, **bad}
    with pytest.raises(UsageError, match="sampling needs"):
        Sampler(**settings)
    Sampler(**{**settings, "do_sample": False})  # greedy decoding does not look at them


@pytest.mark.parametrize("word", ["dog", "lazy", " the", "é", "日本"])
def test_stop_text_finds_a_word_when_it_ends(word: str, tiny_tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog while the é cat 日本 sleeps."
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    stop = StopText(tiny_tokenizer, [word])
    for n in range(1, len(ids) + 1):
        now, before = (tiny_tokenizer.decode(ids[:m]) for m in (n, n - 1))
        if word in now and word not in before:
            assert stop(ids[:n])
        if word not in now:
            assert not stop(ids[:n])
