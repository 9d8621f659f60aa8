"""The fast exact effects are those of one full forward pass per head; nothing of the model changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from postalign.alignment import Alignment
from postalign.edits import HiddenEdit
from postalign.errors import PostalignError
from postalign.methods.head_effects import (
    head_vector,
    indirect_effects,
    mean_head_outputs,
    split_half_correlation,
    top_heads,
)
from postalign.models.anatomy import anatomy
from tests.tiny import KINDS, inputs, tiny_model

WINDOW = {"sliding_window": 8}
SDPA = {"attn_implementation": "sdpa"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("mistral", WINDOW),
    ("mixtral", WINDOW),
    ("phi3", WINDOW),
    ("mistral", {**WINDOW, **SDPA}),
    ("llama_wide", SDPA),
    ("gemma3", SDPA),
    ("gpt2", SDPA),
]
NAMES = ["-".join([kind, *map(str, more)]) for kind, more in CASES]
TARGET = torch.tensor([7, 50, 51, 300])


def prompts(model: Any, *lengths: int) -> list[Tensor]:
    return [inputs(model, n, rows=1, seed=n)["input_ids"][0] for n in lengths or (40, 2, 17)]


def random_means(model: Any) -> Tensor:
    body = anatomy(model)
    size = (body.n_layers, body.n_heads, body.head_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def slow_means(model: Any, batch: list[Tensor]) -> Tensor:
    """One pass per prompt, one hook, one head at a time."""
    body = anatomy(model)
    means = torch.zeros(body.n_layers, body.n_heads, body.head_dim)
    for ids in batch:
        for layer, projection in enumerate(body.attention_out):
            seen: list[Tensor] = []
            handle = projection.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            model(input_ids=ids.unsqueeze(0), use_cache=False)
            handle.remove()
            for head in range(body.n_heads):
                columns = slice(head * body.head_dim, (head + 1) * body.head_dim)
                means[layer, head] += seen[0][0, -1, columns] / len(batch)
    return means


@torch.no_grad()
def naive_effects(model: Any, batch: list[Tensor], targets: list[Tensor], means: Tensor) -> Tensor:
    """One full forward pass per head, without a cache."""
    body = anatomy(model)

    def probability(ids: Tensor, target: Tensor) -> Tensor:
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, -1]
        return logits.float().softmax(-1)[target].sum()

    effects = torch.zeros(len(batch), body.n_layers, body.n_heads)
    for i, (ids, target) in enumerate(zip(batch, targets, strict=True)):
        clean = probability(ids, target)
        for layer, projection in enumerate(body.attention_out):
            for head in range(body.n_heads):

                def patch(module: nn.Module, args: tuple, layer: int = layer, head: int = head) -> tuple:
                    x = args[0].clone()
                    x[:, -1, head * body.head_dim : (head + 1) * body.head_dim] = means[layer, head]
                    return (x, *args[1:])

                handle = projection.register_forward_pre_hook(patch)
                effects[i, layer, head] = probability(ids, target) - clean
                handle.remove()
    return effects


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Weights, modes, hooks and instance attributes after the block are what they were before it."""
    anatomy(model)

    def facts() -> list[Any]:
        return [
            (name, module.training, dict(module.__dict__.get("_forward_hooks", {})),
             dict(module._forward_pre_hooks), module.__dict__.get("forward"))
            for name, module in model.named_modules()
        ]  # fmt: skip

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = facts()
    yield
    assert facts() == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(("kind", "more"), CASES, ids=NAMES)
def test_fast_effects_are_the_naive_ones(kind: str, more: dict[str, Any]) -> None:
    model = tiny_model(kind, **more)
    batch, means = prompts(model), random_means(model)
    targets = [TARGET, TARGET[:1], torch.arange(100, 140)]
    with unchanged(model):
        fast = indirect_effects(model, batch, targets, means)
    naive = naive_effects(model, batch, targets, means)
    assert fast.shape == (3, anatomy(model).n_layers, anatomy(model).n_heads)
    assert fast.dtype == torch.float32
    assert naive.abs().max() > 1e-4, "nothing to compare"
    torch.testing.assert_close(fast, naive, atol=1e-5, rtol=0)


def test_windows_are_shorter_than_the_prompt() -> None:
    """The cases above are about sliding windows only if the window hides something."""
    for kind, more in (("gemma2", {}), ("gemma3", {}), ("mistral", WINDOW), ("mixtral", WINDOW), ("phi3", WINDOW)):
        model = tiny_model(kind, **more)
        assert model.config.sliding_window < 40
        ids = prompts(model, 40)[0].unsqueeze(0)
        other = ids.clone()
        other[0, 0] = 9
        near = tiny_model(kind, **{**more, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]})
        with torch.no_grad():
            assert torch.equal(near(ids).logits[0, -1], near(other).logits[0, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_a_slow_loop(kind: str) -> None:
    model = tiny_model(kind)
    batch = prompts(model)
    with unchanged(model):
        means = mean_head_outputs(model, batch)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, slow_means(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_vector_is_the_sum_of_slices(kind: str) -> None:
    model = tiny_model(kind)
    body, means = anatomy(model), random_means(model)
    heads = [(2, 3), (0, 1), (2, 0)]
    expected = torch.zeros(body.hidden_size)
    for layer, head in heads:
        x = torch.zeros(1, 1, body.n_heads, body.head_dim)
        x[0, 0, head] = means[layer, head]
        with torch.no_grad():
            project = body.attention_out[layer]
            x = x.flatten(2)
            expected += (project(x) - project(torch.zeros_like(x)))[0, 0]  # less the bias
    with unchanged(model):
        vector = head_vector(model, means, heads)
    assert vector.dtype == torch.float32
    torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(head_vector(model, means, [*heads, (0, 1), (2, 3)]), vector), "a head counts once"


def test_only_the_last_token_from_the_patched_layer_upwards() -> None:
    """Per prompt, block i runs on the prompt once, on the last token once, and for the layers up to i only."""
    model = tiny_model()
    body, seen = anatomy(model), [[], [], []]
    for i, module in enumerate(body.mlp_out):
        module.register_forward_pre_hook(lambda module, args, i=i: seen[i].append(tuple(args[0].shape[:2])))
    indirect_effects(model, prompts(model, 30), [TARGET], random_means(model))
    read, clean, heads = (1, 29), (1, 1), (4, 1)
    assert seen == [[read, clean, *[heads] * (i + 1)] for i in range(3)]


def test_progress() -> None:
    model, told = tiny_model(), []
    batch = prompts(model, 5, 6)
    mean_head_outputs(model, batch, lambda *done: told.append(done))
    indirect_effects(model, batch, [TARGET] * 2, random_means(model), lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)] * 2


def test_left_as_it_was_after_an_error() -> None:
    model = tiny_model()
    calls = []

    def fail(module: nn.Module, args: tuple) -> None:
        calls.append(1)
        if len(calls) == 5:  # prefix, clean, layers 0 and 1, then in layer 2 with two blocks skipped
            assert all("forward" in block.__dict__ for block in anatomy(model).blocks[:2])
            raise ZeroDivisionError

    model.lm_head.register_forward_pre_hook(fail)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        indirect_effects(model, prompts(model, 9), [TARGET], random_means(model))
    assert not any("forward" in block.__dict__ for block in anatomy(model).blocks)


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("fails", [False, True])
def test_forwards_of_accelerate_stay(fails: bool) -> None:
    model = tiny_model()
    batch, means = prompts(model), random_means(model)
    expected = indirect_effects(model, batch, [TARGET] * 3, means)
    hooks = [Counting() for _ in anatomy(model).blocks]
    for block, hook in zip(anatomy(model).blocks, hooks, strict=True):
        add_hook_to_module(block, hook)
    with unchanged(model):
        if fails:
            with pytest.raises(IndexError):  # the means lack the last layer
                indirect_effects(model, batch, [TARGET] * 3, means[:2])
        else:
            assert torch.equal(indirect_effects(model, batch, [TARGET] * 3, means), expected)
            assert [hook.calls for hook in hooks] == [9, 12, 15]
    for block in anatomy(model).blocks:
        assert "forward" in block.__dict__
        remove_hook_from_module(block)


def test_live_edits_act_once() -> None:
    """An alignment that is applied already is part of the model, in skipped blocks too."""
    model = tiny_model()
    batch, means = prompts(model), random_means(model)
    plain = indirect_effects(model, batch, [TARGET] * 3, means)
    with Alignment("", [HiddenEdit(torch.ones(32), 0, 0.5, ("all",))]).applied(model):
        fast = indirect_effects(model, batch, [TARGET] * 3, means)
        torch.testing.assert_close(fast, naive_effects(model, batch, [TARGET] * 3, means), atol=1e-5, rtol=0)
    assert not torch.allclose(fast, plain, atol=1e-4)


def test_wrong_prompts(tiny_llama: Any) -> None:
    with pytest.raises(PostalignError, match="one token"):
        indirect_effects(tiny_llama, prompts(tiny_llama, 1), [TARGET], random_means(tiny_llama))
    with pytest.raises(ValueError, match="zip"):
        indirect_effects(tiny_llama, prompts(tiny_llama, 5), [TARGET] * 2, random_means(tiny_llama))


def test_a_model_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **_: plain(input_ids=input_ids, use_cache=False))
    with pytest.raises(PostalignError, match="does not fill a transformers cache"):
        indirect_effects(model, prompts(model, 5), [TARGET], random_means(model))


def test_top_heads_order() -> None:
    effects = torch.tensor([[[0.1, 0.5, 0.2], [0.5, 0.9, -1.0]], [[0.1, 0.5, 0.2], [0.5, 0.7, -1.0]]])
    assert top_heads(effects, 4) == [(1, 1), (0, 1), (1, 0), (0, 2)]  # of equals the lower layer first
    assert top_heads(effects[0], 1) == [(1, 1)]
    assert len(top_heads(effects, 6)) == 6
    for k in (0, 7):
        with pytest.raises(PostalignError, match=f"heads={k} is out of range: the model has 6 heads"):
            top_heads(effects, k)


def test_split_half_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(24, 6, 8, generator=generator)
    planted = torch.randn(6, 8, generator=generator) * 5
    high, low = split_half_correlation(planted + noise), split_half_correlation(noise)
    assert high is not None and high > 0.97
    assert low is not None and abs(low) < 0.3
    assert split_half_correlation(planted + noise) == high, "same seed, same splits"
    assert split_half_correlation(planted + noise[:3]) is not None, "an odd number of prompts"


def test_split_half_correlation_of_nothing() -> None:
    assert split_half_correlation(torch.ones(1, 3, 4)) is None
    assert split_half_correlation(torch.zeros(10, 3, 4)) is None, "equal effects are no ranking"
    opposite = torch.arange(12.0).reshape(1, 3, 4) * torch.tensor([1.0, -1.0]).reshape(2, 1, 1)
    assert split_half_correlation(opposite) == pytest.approx(-1)
