"""Edits of weights. Here: a low-rank patch, run beside the weights by hooks, kept as a standard PEFT folder.

The model's own tensors are never written: a patch that runs by hooks can act on some rows of a batch and not on
others, and removing it is exact. Read and written is plain LoRA (no DoRA, no biases, one rank for all modules).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PostalignError
from ..files import write_whole
from .edit import Control, State, edit_kind

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@edit_kind("low_rank")
@dataclass(frozen=True, eq=False)
class LowRankPatch:
    """`y <- y + row strength * scale * B A x` at each named linear module (LoRA, arXiv 2106.09685).

    factors: module name -> (A `[rank, in]`, B `[out, rank]`). scale: alpha / rank. A module that is given all rows'
    tokens in one list (as in a mixture of experts) is told each token's row from its place; one that is given some
    tokens only must have the same strength for all rows.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float
    base_model: str = ""
    kind: str = "low_rank"

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values()))[0].shape[0]

    @classmethod
    def fresh(cls, model: nn.Module, targets: list[str], rank: int, alpha: float, seed: int) -> LowRankPatch:
        """An identity patch to be trained: A random (as PEFT draws it), B zero, float32 on the weights' device."""
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name in targets:
            module = model.get_submodule(name)
            n_in, n_out = linear_shape(module)
            bound = 1 / math.sqrt(n_in)
            a = (torch.rand(rank, n_in, generator=generator) * 2 - 1) * bound
            device = next(module.parameters()).device
            factors[name] = (
                a.to(device).requires_grad_(),
                torch.zeros(n_out, rank, device=device, requires_grad=True),
            )
        return cls(factors, alpha / rank)

    def parameters(self) -> list[Tensor]:
        return [tensor for pair in self.factors.values() for tensor in pair]

    def frozen(self, dtype: torch.dtype = torch.float16) -> LowRankPatch:
        """The trained patch as plain tensors in `dtype` on the CPU."""
        factors = {n: (a.detach().to("cpu", dtype), b.detach().to("cpu", dtype)) for n, (a, b) in self.factors.items()}
        return LowRankPatch(factors, self.scale, self.base_model)

    def check(self, model: nn.Module) -> None:
        for name, (a, b) in self.factors.items():
            try:
                shape = linear_shape(model.get_submodule(name))
            except AttributeError as error:
                raise PostalignError(
                    f"the adapter patches {name}, which this model lacks: it was made for another model."
                ) from error
            if shape != (a.shape[1], b.shape[0]):
                raise PostalignError(
                    f"the adapter's factors for {name} do not fit its shape {shape}: it was made for another model."
                )

    def attach(self, model: nn.Module, control: Control) -> list[RemovableHandle]:
        self.check(model)
        return [self._attach_one(model.get_submodule(name), a, b, control) for name, (a, b) in self.factors.items()]

    def _attach_one(self, module: nn.Module, a: Tensor, b: Tensor, control: Control) -> RemovableHandle:
        live: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

        def patch(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            strength = control.acting
            if strength is None:
                return output
            x = args[0]
            key = (x.device, x.dtype)
            if a.requires_grad:
                change = self.scale * nn.functional.linear(nn.functional.linear(x, a.to(*key)), b.to(*key))
                return output + _per_row(change, strength)
            if key not in live:
                live[key] = (a.to(*key).T.contiguous(), (b.to(*key) * self.scale).T.contiguous())
            down, up = live[key]
            where = control.rows
            if output.dim() == 2 and where != slice(None):  # [rows * length, out]
                each = len(output) // len(strength)
                begin, end, _ = where.indices(len(strength))
                where = slice(begin * each, end * each)
            # the rows that have a part in it, and in place: nobody else holds a linear module's output yet
            inner = x[where] @ down
            if not control.whole:
                inner = _per_row(inner, strength[control.rows])
            output[where].view(-1, output.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), up)
            return output

        return module.register_forward_hook(patch)

    def state(self) -> State:
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"{name}.A"], tensors[f"{name}.B"] = a, b
        return {"kind": "low_rank", "scale": self.scale, "modules": list(self.factors)}, tensors

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LowRankPatch:
        return cls({n: (tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in settings["modules"]}, settings["scale"])

    def save_peft(self, folder: str | Path, *, base_model: str = "") -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT reads them."""
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model or self.base_model,
            "r": self.rank,
            "lora_alpha": self.scale * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted(self.factors),
        }
        write_whole(Path(folder) / ADAPTER_FILES[0], json.dumps(config, indent=2) + "\n")
        write_whole(Path(folder) / ADAPTER_FILES[1], save(tensors))

    @classmethod
    def from_peft(cls, folder: str | Path) -> LowRankPatch:
        """Read a PEFT LoRA folder. Raises PostalignError when it is missing, damaged or not plain LoRA."""
        config_path, tensors_path = (Path(folder) / name for name in ADAPTER_FILES)
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            tensors = load(tensors_path.read_bytes())
        except FileNotFoundError as error:
            raise PostalignError(
                f"{folder} is not a PEFT adapter: it lacks {Path(error.filename or ADAPTER_FILES[0]).name}."
            ) from error
        except Exception as error:
            raise PostalignError(f"the adapter in {folder} cannot be read ({error}): make it again.") from error
        odd = [k for k in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(k)]
        names = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
        if not names or set(tensors) != {f"{name}.lora_{part}.weight" for name in names for part in "AB"}:
            odd.append("tensors other than lora_A and lora_B")
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
            raise PostalignError(
                f"the adapter in {folder} is not plain LoRA ({', '.join(odd) or config.get('peft_type')}): "
                "merge it into a checkpoint with PEFT and use that instead."
            )
        factors = {}
        for name in names:
            key = f"{name}.lora_%s.weight"
            factors[name.removeprefix("base_model.model.")] = (tensors[key % "A"], tensors[key % "B"])
        rank = next(iter(factors.values()))[0].shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return cls(factors, scale, config.get("base_model_name_or_path") or "")


def _per_row(change: Tensor, strength: Tensor) -> Tensor:
    """`change` `[rows, length, out]` or `[rows * length, out]`, times each row's strength."""
    strength = strength.to(change.device, change.dtype)
    if change.dim() == 2:
        if bool((strength == 1).all()):  # then the tokens may be some of them only
            return change
        strength = strength.repeat_interleave(len(change) // len(strength))
    return change * strength.reshape(-1, *([1] * (change.dim() - 1)))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module: nn.Linear and quantised kin, or the Conv1D of GPT-2."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    raise PostalignError(f"{type(module).__name__} is not a linear module: a low-rank patch cannot act on it.")


def block_linears(model: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    """Names of all linear modules inside the named decoder blocks: the usual targets of an adapter."""
    names = []
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules():
            if (hasattr(module, "in_features") and hasattr(module, "out_features")) or hasattr(module, "nf"):
                names.append(f"{block}.{name}")
    return names
