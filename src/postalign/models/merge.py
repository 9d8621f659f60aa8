"""A low-rank adapter added to the weights of a model, without peft.

Knows PEFT's LoRA files and the adapter that ships in `fragile/`; knows nothing of training or of where models
come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import PostalignError

FRAGILE = Path(__file__).parent / "fragile"


def merge_adapter(model: Any, folder: Path = FRAGILE) -> None:
    """Add a PEFT LoRA adapter to the weights of `model` in place: W += scale * B A for every module it names.

    folder: `adapter_config.json` (`r`, `lora_alpha`, `use_rslora`) and `adapter_model.safetensors` with
    `lora_A` [rank, in] and `lora_B` [out, rank]. The product is taken in float64, so that it does not depend
    on the machine. Raises PostalignError when the files are missing or name modules that the model lacks.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PostalignError(f"the adapter in {folder} is missing or broken: install postalign again.") from error
    others = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise PostalignError(f"the adapter in {folder} holds more than LoRA factors ({others[0]}): merge it with peft.")
    with torch.no_grad():
        for key, down in tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            name = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
            up = tensors[key.replace("lora_A", "lora_B")]
            try:
                weight = model.get_submodule(name).weight
            except AttributeError as error:
                raise PostalignError(f"the adapter in {folder} is for another model: it names {name}.") from error
            delta = (scale * (up.double() @ down.double())).to(weight.device, torch.float32)
            weight.copy_(weight.float() + delta)
