"""Products for few rows: the same numbers, only while they stand, only where they fit."""

import threading

import pytest
import torch
from torch import nn

from postalign.decoding import branches
from postalign.decoding.engine import Engine
from postalign.models import products
from postalign.models.products import QuickProducts, quick_linear
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch was built without oneDNN",
)


@pytest.mark.parametrize("shape", [(1,), (2,), (4,), (5,), (1, 1), (2, 1), (1, 7), (4, 9), (0,), (2, 0)])
@pytest.mark.parametrize("width", [33, products.SHORT + 8])
@pytest.mark.parametrize("biased", [True, False])
def test_quick_linear_is_the_product(shape, width, biased):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, width), torch.randn(17, width), torch.randn(17) if biased else None
    kept = x.clone(), weight.clone()
    got = quick_linear(x, weight, bias)
    torch.testing.assert_close(got, nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
    assert got.is_contiguous() and torch.equal(x, kept[0]) and torch.equal(weight, kept[1])


def test_rows_that_lie_apart():
    x, weight = torch.randn(6, 10, 33)[::2, ::3], torch.randn(17, 33)
    torch.testing.assert_close(quick_linear(x, weight), nn.functional.linear(x, weight), atol=1e-5, rtol=1e-5)


def layers(model):
    return [module for module in model.modules() if type(module) is nn.Linear]


def test_layers_get_their_own_forward_back_when_the_last_user_leaves():
    model = tiny_model("llama")
    first, second = QuickProducts(model), QuickProducts(model)
    assert all("forward" in vars(layer) for layer in layers(model))
    first.remove()
    first.remove()  # a second time does nothing
    assert all("forward" in vars(layer) for layer in layers(model))
    second.remove()
    assert not any("forward" in vars(layer) for layer in layers(model))


def test_a_forward_that_somebody_else_put_there_stays():
    layer = nn.Linear(3, 2)
    other = layer.forward = lambda x: x
    QuickProducts(nn.Sequential(layer)).remove()
    assert layer.forward is other


def test_they_take_part_and_training_does_not_notice(monkeypatch):
    layer, calls = nn.Linear(5, 3), []
    monkeypatch.setattr(products, "quick_linear", lambda *a: calls.append(a) or quick_linear(*a))
    standing, x = QuickProducts(layer), torch.randn(2, 5)
    with torch.no_grad():
        layer(x)
        assert len(calls) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    layer(x).sum().backward()
    assert layer.weight.grad is not None and len(calls) == 1
    standing.remove()
    layer.bfloat16()
    QuickProducts(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_engine_says_the_same_and_leaves_the_model_as_it_was(kind, monkeypatch):
    tokenizer, prompts = tiny_tokenizer(), ["How do I bake bread?", "The moon", "a b c"]

    def said(quick):
        monkeypatch.setattr(branches, "slow_products", lambda: quick)
        model = tiny_model(kind)
        with Engine(model, tokenizer, None, batch_size=3) as engine:
            requests = [engine.submit(prompt, max_new_tokens=8) for prompt in prompts]
            assert any("forward" in vars(layer) for layer in layers(model)) == (quick and bool(layers(model)))
            while engine.step():
                pass
        assert not any("forward" in vars(layer) for layer in layers(model))
        return [request.token_ids for request in requests]

    assert said(True) == said(False)


def test_threads_come_and_go():
    model = tiny_model("llama")
    x = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(x).logits
    wrong = []

    def work():
        for _ in range(20):
            standing = QuickProducts(model)
            with torch.no_grad():
                if not torch.allclose(model(x).logits, expected, atol=1e-4):
                    wrong.append(1)
            standing.remove()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not any("forward" in vars(layer) for layer in layers(model))


def test_the_trial_of_a_model_leaves_it_as_it_was(monkeypatch):
    monkeypatch.setattr(branches, "slow_products", lambda: True)
    model = tiny_model("llama")
    assert branches.shape_of(model).forks
    assert not any("forward" in vars(layer) for layer in layers(model))
