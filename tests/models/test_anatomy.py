"""The parts are the right ones: shown by what happens to the block's output when they are interfered with."""

from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from postalign.errors import PostalignError
from postalign.models.anatomy import anatomy, block_output, with_block_output
from postalign.models.capture import captured
from tests.tiny import KINDS, inputs, tiny_model

HEAD_DIM = {"llama_wide": 16, "qwen3": 16, "gemma2": 16, "gemma3": 16}
POST_NORM = {"gemma2", "gemma3"}  # a norm stands between the projection and the residual stream
MOE = {"mixtral", "qwen2_moe"}


def run(model: Any, modules: list[nn.Module], *, inputs_of: bool = False) -> list[torch.Tensor]:
    with torch.no_grad(), captured(modules, inputs=inputs_of) as taken:
        model(**inputs(model))
    return list(taken)


def replacing(module: nn.Module, columns: slice, new: torch.Tensor) -> Any:
    """A hook that puts `new` `[batch, width]` into these columns of the module's last-position input."""

    def hook(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[:, -1, columns] = new
        return (x, *args[1:])

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str) -> None:
    model = tiny_model(kind)
    body = anatomy(model)
    assert (body.n_layers, body.n_heads, body.hidden_size) == (3, 4, 32)
    assert body.head_dim == HEAD_DIM.get(kind, 8)
    assert body.lm_head is model.get_output_embeddings()
    assert [model.get_submodule(name) for name in body.block_names] == list(body.blocks)
    assert len(set(map(id, body.blocks))) == len(set(map(id, body.attention_out))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_final_norm_is_what_the_head_reads(kind: str) -> None:
    model = tiny_model(kind)
    body = anatomy(model)
    (read,) = run(model, [body.lm_head], inputs_of=True)
    (last,) = run(model, [body.blocks[-1]])
    torch.testing.assert_close(body.final_norm(last), read)


def test_blocks_that_add_the_residual_inside_and_two_norms_beside_them() -> None:
    config = tf.BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4)
    model = tf.BloomForCausalLM(config).eval()
    body = anatomy(model)
    assert body.final_norm is model.transformer.ln_f  # and not the one after the embedding
    assert body.mlp_out_names[1] == "transformer.h.1.mlp.dense_4h_to_h"
    assert body.attention_out_names[1] == "transformer.h.1.self_attention.dense"


@pytest.mark.parametrize("kind", KINDS)
def test_head_weight_is_the_heads_whole_effect(kind: str) -> None:
    """Replacing a head's output changes the projection's by head_weight @ (new - old), bias or not."""
    model = tiny_model(kind)
    body = anatomy(model)
    generator = torch.Generator().manual_seed(1)
    for layer in range(body.n_layers):
        projection = body.attention_out[layer]
        (old,) = run(model, [projection], inputs_of=True)
        (before,) = run(model, [projection])
        for head in range(body.n_heads):
            columns = slice(head * body.head_dim, (head + 1) * body.head_dim)
            new = torch.randn(2, body.head_dim, generator=generator)
            handle = replacing(projection, columns, new)
            (after,) = run(model, [projection])
            handle.remove()
            weight = body.head_weight(layer, head)
            assert weight.shape == (32, body.head_dim)
            assert weight.dtype == torch.float32
            torch.testing.assert_close(after - before, (new - old[:, columns]) @ weight.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in POST_NORM])
def test_attention_and_feed_forward_add_up_to_the_block(kind: str) -> None:
    """With the feed-forward silenced at mlp_out, a head reaches the block's output by head_weight alone."""
    model = tiny_model(kind)
    body = anatomy(model)
    layer, head = 1, 2
    columns = slice(head * body.head_dim, (head + 1) * body.head_dim)

    def silence(module: nn.Module, args: tuple, output: Any) -> Any:
        return with_block_output(output, torch.zeros_like(block_output(output)))

    silent = body.mlp_out[layer].register_forward_hook(silence)
    (old,) = run(model, [body.attention_out[layer]], inputs_of=True)
    before, out = run(model, [body.blocks[layer], body.attention_out[layer]])
    (stream,) = run(model, [body.blocks[layer - 1]])
    bias = before - stream - out
    new = torch.randn(2, body.head_dim, generator=torch.Generator().manual_seed(2))
    handle = replacing(body.attention_out[layer], columns, new)
    (after,) = run(model, [body.blocks[layer]])
    handle.remove()
    silent.remove()
    torch.testing.assert_close(
        after - before, (new - old[:, columns]) @ body.head_weight(layer, head).T, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(bias, torch.zeros_like(bias), atol=1e-5, rtol=0)  # nothing else is added


@pytest.mark.parametrize("kind", KINDS)
def test_feed_forward_end(kind: str) -> None:
    body = anatomy(tiny_model(kind))
    leaf = all(not list(module.children()) for module in body.mlp_out)
    assert leaf == (kind not in MOE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama_wide", "gpt2", "gpt_neox", "mixtral"])
def test_half_precision_finds_the_same(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind)
    names = anatomy(model).attention_out_names
    assert anatomy(tiny_model(kind).to(dtype)).attention_out_names == names


def test_looking_changes_nothing() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    before = torch.get_rng_state()
    anatomy(model).head_weight(0, 0)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_cached_until_a_part_is_replaced() -> None:
    model = tiny_model()
    first = anatomy(model)
    assert anatomy(model) is first
    model.model.layers[1].self_attn.o_proj = nn.Linear(32, 32)
    assert anatomy(model) is not first
    assert anatomy(model).attention_out[1] is model.model.layers[1].self_attn.o_proj


def test_cache_lets_go_of_the_model() -> None:
    model = tiny_model()
    anatomy(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_adapted_projection() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama_bias")
    bare = anatomy(model).head_weight(0, 1)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["o_proj"])
    adapted = peft.get_peft_model(model, config).train()
    layer: Any = anatomy(adapted).attention_out[0]
    assert layer is adapted.base_model.model.model.layers[0].self_attn.o_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    weight = anatomy(adapted).head_weight(0, 1)
    delta = layer.get_delta_weight("default")[:, 8:16]
    torch.testing.assert_close(weight, bare + delta, atol=1e-5, rtol=1e-4)
    assert anatomy(model).attention_out[0] is layer  # the inner model is looked at afresh too


def test_quantised_projection() -> None:
    """Any module that tells its features will do; its weight may be kept in any form."""

    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.scale = nn.Parameter(torch.tensor(0.01))
            self.register_buffer("packed", (linear.weight / 0.01).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            packed: Any = self.packed
            return x @ (packed.float() * self.scale).T + 1.0

    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.o_proj = Packed(block.self_attn.o_proj)
    packed: Any = model.model.layers[2].self_attn.o_proj
    expected = (packed.packed.float() * packed.scale)[:, 24:]
    torch.testing.assert_close(anatomy(model).head_weight(2, 3), expected, atol=1e-5, rtol=1e-4)


def test_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama_bias")
    expected = anatomy(model).head_weight(1, 3)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    body = anatomy(tiny_model("llama_bias"))
    assert all(p.is_meta for p in model.parameters())
    torch.testing.assert_close(anatomy(model).head_weight(1, 3), expected)
    assert anatomy(model).attention_out_names == body.attention_out_names


def test_text_part_of_a_composite_model() -> None:
    text = tf.Gemma3TextConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16,
    )  # fmt: skip
    vision = tf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    body = anatomy(tf.Gemma3ForConditionalGeneration(config).eval())
    assert (body.n_layers, body.n_heads, body.head_dim, body.hidden_size) == (2, 4, 16, 32)
    assert all("language_model" in name for name in body.attention_out_names)


class Rows(namedtuple("Rows", ["hidden", "rest"])):
    pass


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: (x, "cache"), lambda x: [x, 1], lambda x: Rows(x, 2)]
)
def test_block_outputs_of_any_form(wrap: Any) -> None:
    old, new = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    output = wrap(old)
    assert block_output(output) is old
    changed = with_block_output(output, new)
    assert type(changed) is type(output)
    assert block_output(changed) is new
    if not isinstance(output, torch.Tensor):
        assert list(changed[1:]) == list(output[1:])


def test_head_out_of_range() -> None:
    with pytest.raises(PostalignError, match="choose a layer from 0-2 and a head from 0-3"):
        anatomy(tiny_model()).head_weight(3, 0)


SMALL: dict[str, Any] = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 4}


class Fused(tf.LlamaForCausalLM):
    """Attention and feed-forward leave through one projection."""

    def __init__(self, config: Any):
        super().__init__(config)
        block: Any
        for block in self.model.layers:
            block.self_attn.o_proj = _FusedOut()
            block.mlp = nn.Identity()


class _FusedOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Linear(32 + 48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.joined(torch.cat([x, x.new_ones(*x.shape[:-1], 48)], dim=-1))


def llama(make: Any) -> Any:
    return make(tf.LlamaConfig(**SMALL, intermediate_size=48, num_attention_heads=4))


def t5() -> Any:
    config = tf.T5Config(vocab_size=384, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    return tf.T5ForConditionalGeneration(config)


def hybrid() -> Any:
    more: dict[str, Any] = {
        "intermediate_size": 96,
        "lru_width": 32,
        "head_dim": 8,
        "attention_window_size": 8,
    }
    return tf.RecurrentGemmaForCausalLM(tf.RecurrentGemmaConfig(**SMALL, num_attention_heads=4, **more))


def weightless() -> Any:
    with torch.device("meta"):
        return llama(tf.LlamaForCausalLM)


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (t5, "T5ForConditionalGeneration.*encoder-decoder"),
    "no attention": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(**SMALL)),
        "num_attention_heads was not found",
    ),
    "no head": (lambda: llama(tf.LlamaModel), "no language-model head"),
    "fused": (lambda: llama(Fused), "no attention output projection was found.*80 -> 32"),
    "hybrid": (hybrid, "block 2 has no attention output projection"),
    "not transformers": (lambda: nn.Linear(2, 2), "not a transformers model"),
    "meta": (weightless, "no weights in memory"),
}


@pytest.mark.parametrize("case", list(UNSUPPORTED))
def test_unsupported_models_are_told_what_was_not_found(case: str) -> None:
    make, message = UNSUPPORTED[case]
    with pytest.raises(PostalignError, match=message) as caught:
        anatomy(make().eval())
    assert "\n" not in str(caught.value)
