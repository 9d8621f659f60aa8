"""What is trained: a float32 copy of some of a model's weights, or an adapter beside it; the model stays as it is.

Knows models and parameter names; knows nothing of losses and steps.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..edits import SparsePatch
from ..edits.weights import block_linears
from ..errors import PostalignError, UsageError, nearest
from ..models.anatomy import anatomy
from ..models.shards import own_parameters
from ..models.tracing import evaluating
from .adapters import Adapted, beside_model
from .processes import Processes, whole
from .settings import TrainSettings

Deltas = Iterator[tuple[str, Tensor]]


@dataclass
class Trainee:
    """module: what the processes prepare. model: whose forward's signature counts. before_pass: see `loop.descend`.

    deltas: the prepared module, bare -> (name, trained - base) of each trained parameter, float32 on the CPU.
    without: a context in which the base model given to `train_delta` is as it was.
    """

    module: nn.Module
    model: nn.Module
    deltas: Callable[[nn.Module], Deltas]
    before_pass: Callable[[int], None] = lambda rows: None
    without: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def trained_names(model: nn.Module, settings: TrainSettings) -> list[str]:
    """The parameters that `settings.modules` names, by the model's own names; of an adapter, those that it changes.

    Raises UsageError for a name that nothing has, PostalignError for weights that cannot be trained.
    """
    blocks = anatomy(model).block_names
    parameters = own_parameters(model)
    matrices = [
        name for name, p in parameters.items() if p.ndim >= 2 and any(name.startswith(f"{block}.") for block in blocks)
    ]
    if settings.train == "adapter":
        linear = [f"{name}.weight" for name in block_linears(model, blocks)]
        parameters, matrices = {name: parameters[name] for name in linear if name in parameters}, linear
    found = matrices
    if settings.modules != "blocks":
        for part in settings.modules:
            if not any(_named(name, part) for name in parameters):
                known = {name.rsplit(".", 2)[-2] for name in parameters if "." in name}
                raise UsageError(f"no weight that can be trained is named {part!r}.{nearest(part, known)}")
        found = [name for name in parameters if any(_named(name, part) for part in settings.modules)]
    for name in found:
        _check(name, parameters.get(name))
    return found


def _named(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def _check(name: str, parameter: Tensor | None) -> None:
    if parameter is None or not parameter.is_floating_point() or parameter.itemsize < 2:
        raise PostalignError(f"{name} is quantised and cannot be trained: load the model in bfloat16 or float32.")
    if parameter.is_meta:
        raise PostalignError(f"{name} is offloaded and cannot be trained: load the model whole, on one device.")


def low_precision(model: nn.Module, names: list[str], settings: TrainSettings) -> bool:
    """Whether passes are to run in bfloat16."""
    if settings.precision == "auto":
        parameters = own_parameters(model)
        return any(parameters[name].itemsize == 2 for name in names)
    return settings.precision == "bfloat16"


@contextlib.contextmanager
def trainee(model: nn.Module, names: list[str], settings: TrainSettings, processes: Processes) -> Iterator[Trainee]:
    """What `settings.train` asks for. Raises PostalignError for an adapter in shards."""
    if settings.train == "full":
        with evaluating(model):
            yield _copied(model, names, settings, processes)
        return
    if processes.sharded:
        raise PostalignError("an adapter cannot be trained in shards: train full weights, or without FSDP.")
    modules = [name.removesuffix(".weight") for name in names]
    with beside_model(model, modules, settings.rank, settings.alpha, settings.seed) as (patch, adapted):

        def deltas(bare: nn.Module) -> Deltas:
            for name, (a, b) in patch.factors.items():
                change = patch.scale * (b.detach().cpu() @ a.detach().cpu())
                yield f"{name}.weight", change.T if hasattr(model.get_submodule(name), "nf") else change

        with evaluating(model):
            yield Trainee(adapted, model, deltas, adapted.before_pass, lambda: _off(adapted))


def confine(parameters: Mapping[str, Tensor], at: SparsePatch) -> None:
    """Put the patch into trainable parameters, and let nothing move but the weights that it changes."""
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        indices, values = (part.to(parameter.device) for part in at.entries[name])
        places = torch.zeros_like(parameter, dtype=torch.bool).view(-1)
        places[indices.long()] = True
        with torch.no_grad():
            parameter.view(-1)[indices.long()] += values.to(parameter.dtype)
        parameter.register_hook(lambda gradient, places=places: gradient * places.view_as(gradient))


@contextlib.contextmanager
def _off(adapted: Adapted) -> Iterator[None]:
    strength, adapted.control.strength = adapted.control.strength, None
    try:
        yield
    finally:
        adapted.control.strength = strength


def _copied(model: nn.Module, names: list[str], settings: TrainSettings, processes: Processes) -> Trainee:
    """A copy of the model that shares with it all that is not trained (as far as its number format allows)."""
    base = own_parameters(model)
    trained = {id(base[name]) for name in names}
    keep = (torch.bfloat16, torch.float32) if low_precision(model, names, settings) else (torch.float32,)
    if processes.sharded:  # in shards all weights of a block must be of one format
        keep = (torch.float32,)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        train = id(parameter) in trained
        value = parameter.detach()
        if train:
            value = value.to(processes.device, torch.float32, copy=True)
        elif value.is_floating_point() and value.dtype not in keep and value.itemsize >= 2:
            value = value.to(processes.device, torch.float32)
        else:
            value = value.to(processes.device)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=train)
    twin = copy.deepcopy(model, memo).to(processes.device)
    if processes.device.type == "cpu" and getattr(twin.config, "_attn_implementation", "") == "sdpa":
        twin.set_attn_implementation("eager")  # type: ignore[operator]  # whose backward pass is the faster one there

    def deltas(bare: nn.Module) -> Deltas:
        after = own_parameters(bare)
        for name in names:
            yield name, whole(after[name].detach()).cpu() - base[name].detach().cpu().float()

    return Trainee(twin, twin, deltas)
