"""Low-rank patches: beside the weights as in the weights, per row, undone exactly, and PEFT's own format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from postalign.edits import Control, LowRankPatch, edit_from_state
from postalign.edits.weights import ADAPTER_FILES, block_linears, linear_shape
from postalign.errors import PostalignError
from postalign.models.anatomy import anatomy
from tests.decoding.tools import hooks
from tests.decoding.twin import merged, patch_for
from tests.tiny import KINDS, inputs, tiny_model


def logits(model: Any, patch: LowRankPatch | None = None, strength: Tensor | None = None) -> Tensor:
    """`[2, 9, vocab]` of fixed inputs with the patch live."""
    handles = patch.attach(model, Control(strength)) if patch else []
    with torch.no_grad():
        found = model(**inputs(model), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_merged_weights(kind: str) -> None:
    model = tiny_model(kind)
    patch = patch_for(model)
    patched = logits(model, patch, torch.ones(2))
    close(patched, logits(merged(model, patch)))
    assert float((patched - logits(model)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
def test_each_row_has_its_own_strength(kind: str) -> None:
    """Also where a module sees all rows' tokens in one list, as in a mixture of experts."""
    model = tiny_model(kind)
    patch = patch_for(model)
    found = logits(model, patch, torch.tensor([0.0, 0.5]))
    if kind != "qwen2_moe":  # there the other row's tokens share experts, so the sums round otherwise
        assert torch.equal(found[0], logits(model)[0])
    close(found[0], logits(model)[0])
    close(found[1], logits(merged(model, patch, 0.5))[1])
    swapped = logits(model, patch, torch.tensor([-1.0, 1.0]))
    close(swapped[0], logits(merged(model, patch, -1.0))[0])
    close(swapped[1], logits(merged(model, patch))[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_switched_off_and_removed_are_bit_exact(kind: str) -> None:
    model = tiny_model(kind)
    patch = patch_for(model)
    plain, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(logits(model, patch, None), plain)
    logits(model, patch, torch.ones(2))
    assert torch.equal(logits(model), plain) and hooks(model) == 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_fresh_patch_is_the_identity_and_is_drawn_as_told(tiny_llama: Any) -> None:
    names = block_linears(tiny_llama, anatomy(tiny_llama).block_names)
    patch = LowRankPatch.fresh(tiny_llama, names, rank=4, alpha=8.0, seed=1)
    assert torch.equal(logits(tiny_llama, patch, torch.ones(2)), logits(tiny_llama))
    assert patch.rank == 4 and patch.scale == 2.0 and all(p.requires_grad for p in patch.parameters())
    again, other = (LowRankPatch.fresh(tiny_llama, names, 4, 8.0, seed=s) for s in (1, 2))
    for name, (a, b) in patch.factors.items():
        assert torch.equal(a, again.factors[name][0]) and not torch.equal(a, other.factors[name][0])
        assert float(a.detach().abs().max()) <= 1 / math.sqrt(a.shape[1]) and not bool(b.any())


def test_frozen_is_half_precision_and_plain(tiny_llama: Any) -> None:
    patch = LowRankPatch.fresh(tiny_llama, ["model.layers.0.mlp.up_proj"], 2, 4.0, 0)
    frozen = patch.frozen()
    a, b = frozen.factors["model.layers.0.mlp.up_proj"]
    assert a.dtype == b.dtype == torch.float16 and not a.requires_grad
    close(logits(tiny_llama, frozen, torch.ones(2)), logits(tiny_llama, patch, torch.ones(2)))


def test_state_and_back(tiny_llama: Any) -> None:
    patch = patch_for(tiny_llama)
    again = edit_from_state(*patch.state())
    assert isinstance(again, LowRankPatch) and again.scale == patch.scale and list(again.factors) == list(patch.factors)
    assert torch.equal(logits(tiny_llama, again, torch.ones(2)), logits(tiny_llama, patch, torch.ones(2)))


def test_modules_that_are_patched() -> None:
    model = tiny_model("llama")
    names = block_linears(model, anatomy(model).block_names)
    assert len(names) == 3 * 7 and names[0] == "model.layers.0.self_attn.q_proj" and "lm_head" not in names
    gpt2 = tiny_model("gpt2")
    assert {n.rsplit(".", 2)[-1] for n in block_linears(gpt2, ("transformer.h.0",))} == {"c_attn", "c_proj", "c_fc"}
    assert linear_shape(gpt2.transformer.h[0].attn.c_attn) == (32, 96)
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    with pytest.raises(PostalignError, match="Embedding is not a linear"):
        linear_shape(nn.Embedding(3, 5))


def test_a_patch_for_another_model(tiny_llama: Any) -> None:
    patch = patch_for(tiny_llama)
    with pytest.raises(PostalignError, match=r"lacks.*another model"):
        patch.attach(tiny_model("gpt2"), Control())
    wide = tiny_model("llama", hidden_size=64)
    with pytest.raises(PostalignError, match=r"fit its shape.*another model"):
        patch.attach(wide, Control())
    assert hooks(wide) == 0


# PEFT folders


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen2_moe"])
def test_peft_reads_what_we_write(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(kind)
    patch = patch_for(model)
    patch.save_peft(tmp_path, base_model="tiny/llama")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(ADAPTER_FILES)
    ours = logits(model, patch, torch.ones(2))
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    assert len([n for n, _ in theirs.named_modules() if n.endswith("lora_A")]) == len(patch.factors)
    torch.testing.assert_close(logits(theirs), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_what_peft_writes(rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(tiny_model("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    patch = LowRankPatch.from_peft(tmp_path)
    assert patch.rank == 4 and len(patch.factors) == 9
    model = tiny_model("llama")
    patched = logits(model, patch, torch.ones(2))
    torch.testing.assert_close(patched, logits(theirs), rtol=1e-5, atol=1e-5)
    assert float((patched - logits(model)).abs().max()) > 0.01


def test_our_folder_and_back(tmp_path: Path, tiny_llama: Any) -> None:
    patch = patch_for(tiny_llama, rank=3).frozen()
    patch.save_peft(tmp_path, base_model="org/name")
    again = LowRankPatch.from_peft(tmp_path)
    assert again.base_model == "org/name" and again.scale == pytest.approx(patch.scale)
    assert again.factors.keys() == patch.factors.keys()
    for name, (a, b) in patch.factors.items():
        assert torch.equal(a, again.factors[name][0]) and torch.equal(b, again.factors[name][1])
        assert again.factors[name][0].dtype == torch.float16


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / ADAPTER_FILES[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"x": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "LORA"),
    ],
)
def test_other_adapters_are_refused(keys: dict[str, Any], word: str, tmp_path: Path, tiny_llama: Any) -> None:
    patch_for(tiny_llama).save_peft(tmp_path)
    change_config(tmp_path, **keys)
    with pytest.raises(PostalignError, match=f"not plain LoRA .*{word}.*merge it") as caught:
        LowRankPatch.from_peft(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("extra", ["lora_B.bias", "lora_embedding_A", "lora_magnitude_vector"])
def test_tensors_that_would_be_overlooked_are_refused(extra: str, tmp_path: Path, tiny_llama: Any) -> None:
    patch_for(tiny_llama).save_peft(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILES[1])
    save_file(
        {**tensors, f"base_model.model.model.layers.0.mlp.up_proj.{extra}": torch.ones(2)}, tmp_path / ADAPTER_FILES[1]
    )
    with pytest.raises(PostalignError, match="not plain LoRA"):
        LowRankPatch.from_peft(tmp_path)


def test_an_adapter_without_tensors(tmp_path: Path, tiny_llama: Any) -> None:
    patch_for(tiny_llama).save_peft(tmp_path)
    save_file({}, tmp_path / ADAPTER_FILES[1])
    with pytest.raises(PostalignError, match="not plain LoRA"):
        LowRankPatch.from_peft(tmp_path)


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_missing_and_damaged_folders(name: str, tmp_path: Path, tiny_llama: Any) -> None:
    with pytest.raises(PostalignError, match=r"not a PEFT adapter: it lacks adapter_config.json"):
        LowRankPatch.from_peft(tmp_path / "nowhere")
    patch_for(tiny_llama).save_peft(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(PostalignError, match="cannot be read") as caught:
        LowRankPatch.from_peft(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / name).unlink()
    with pytest.raises(PostalignError, match=f"lacks {name}"):
        LowRankPatch.from_peft(tmp_path)
