"""What one block does, seen by running it once on six tokens: which layers run, in what order, on what.

Knows modules and tensors; knows no architecture and no names. Used by anatomy.py only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PostalignError

LENGTH = 6
MIXED = 1e-2  # relative change of the last position; rounding is far below it in bfloat16, attention far above


@dataclass(frozen=True)
class Call:
    """One execution of a module inside the block: its tensor inputs and its (first) output."""

    name: str
    module: nn.Module
    inputs: list[Tensor]
    output: Tensor | None


class _Stop(Exception):
    """Ends the forward pass once the block has run."""


def width(module: nn.Module) -> tuple[int, int] | None:
    """(in features, out features) of a linear-like module, None for any other.

    Linear-like: nn.Linear, transformers' Conv1D, and quantised or adapted modules that tell their features.
    """
    for inward, outward in (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures")):
        a, b = getattr(module, inward, None), getattr(module, outward, None)
        if isinstance(a, int) and isinstance(b, int):
            return a, b
    return None


def linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The outermost linear-like modules in `module`, by dotted name (an adapted layer counts as one)."""
    if width(module) is not None:
        return {prefix: module}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        found.update(linears(child, f"{prefix}.{name}" if prefix else name))
    return found


@torch.no_grad()
def trace_block(decoder: nn.Module, block: nn.Module, vocabulary: int) -> list[Call]:
    """Run `decoder` on two rows that differ in all tokens but the last, up to the end of `block`.

    Returns the calls of the block's direct children and outermost linear-like modules, in the order in which
    they ended. Costs the embedding and the blocks up to `block` on twelve tokens, without dropout.
    Raises PostalignError when the model cannot be run.
    """
    watched = {**dict(block.named_children()), **linears(block)}
    calls: list[Call] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            inputs = [x.clone() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            first = block_output(output)
            # copies: some models add to these tensors in place later on
            calls.append(Call(name, module, inputs, first.clone() if isinstance(first, Tensor) else None))

        return hook

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        raise _Stop

    if all(p.is_meta for p in decoder.parameters()) and not any(hasattr(m, "_hf_hook") for m in decoder.modules()):
        raise PostalignError("the model has no weights in memory (meta device): load them before using it.")
    device = in_memory(decoder)
    handles = [m.register_forward_hook(record(name), with_kwargs=True) for name, m in watched.items()]
    handles.append(block.register_forward_hook(stop))
    try:
        with evaluating(decoder):
            decoder(input_ids=_probe(vocabulary).to(device), use_cache=False)
    except _Stop:
        return calls
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise PostalignError(
            f"{type(decoder).__name__} could not be run on a short text to find its parts ({reason}): "
            "use a decoder-only language model that takes input_ids."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    raise PostalignError(f"the blocks of {type(decoder).__name__} were found but do not run: it is not supported.")


def _probe(vocabulary: int) -> Tensor:
    """Ids `[2, 6]`: the rows share the last token only. Taken from the middle, where ordinary tokens are."""
    spread = [(i * vocabulary) // (2 * LENGTH + 1) for i in range(1, 2 * LENGTH)]
    last = spread.pop()
    return torch.tensor([[*spread[: LENGTH - 1], last], [*spread[LENGTH - 1 :], last]])


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside the block `module` is in eval mode (no dropout); each part's own mode comes back after it."""
    was = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in was:
            part.training = training


def mixed(x: Tensor) -> bool:
    """Does the last position of the trace (`[2, 6, n]` or `[12, n]`) depend on the tokens before it?"""
    if x.numel() % (2 * LENGTH) != 0:
        return False
    a, b = x.reshape(2, LENGTH, -1)[:, -1].float()
    return bool((a - b).norm() > MIXED * torch.maximum(a.norm(), b.norm()))


def in_memory(module: nn.Module) -> torch.device:
    """The device of the module's first parameter; the CPU when that is offloaded (hooks move the inputs)."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device


def block_output(output: Any) -> Any:
    """The hidden states in what a block returned: the tensor itself, or a tuple's (list's) first element."""
    return output[0] if isinstance(output, (tuple, list)) else output


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the bit, whatever the shapes (`[2, 6, n]` and `[12, n]` may be the same thing)."""
    return a is not None and b is not None and a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())
