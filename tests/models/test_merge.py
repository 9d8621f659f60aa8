"""Merging a LoRA adapter: the exact sum, peft's own answer, and adapters that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from postalign.errors import PostalignError
from postalign.models import merge
from tests.tiny import tiny_model


def write_adapter(folder: Path, model: Any, rank: int = 2, **settings: Any) -> dict[str, torch.Tensor]:
    """A random LoRA adapter on every q_proj and down_proj in PEFT's format; the change of each weight, in float64."""
    generator = torch.Generator().manual_seed(1)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, **settings}
    scale = 8 / (rank**0.5 if settings.get("use_rslora") else rank)
    tensors, changes = {}, {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            changes[f"{name}.weight"] = scale * up.double() @ down.double()
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return changes


@pytest.mark.parametrize("rslora", [False, True])
def test_merging_adds_the_scaled_product_and_nothing_else(tmp_path: Path, rslora: bool) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = write_adapter(tmp_path / "adapter", model, use_rslora=rslora)
    merge.merge_adapter(model, tmp_path / "adapter")
    for name, tensor in model.state_dict().items():
        expected = (before[name].double() + changes[name]).float() if name in changes else before[name]
        assert torch.allclose(tensor, expected, atol=1e-6)
        assert name in changes or torch.equal(tensor, before[name])


def test_merging_agrees_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").merge_and_unload()
    ours = tiny_model()
    merge.merge_adapter(ours, tmp_path / "adapter")
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_an_adapter_that_is_missing_or_for_another_model(tmp_path: Path) -> None:
    with pytest.raises(PostalignError, match="missing or broken"):
        merge.merge_adapter(tiny_model(), tmp_path / "absent")
    write_adapter(tmp_path / "adapter", tiny_model(num_hidden_layers=3))
    with pytest.raises(PostalignError, match=r"another model.*layers\.1"):
        merge.merge_adapter(tiny_model(num_hidden_layers=1), tmp_path / "adapter")
    save_file({"base_model.model.lm_head.weight": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(PostalignError, match="more than LoRA"):
        merge.merge_adapter(tiny_model(), tmp_path / "adapter")
