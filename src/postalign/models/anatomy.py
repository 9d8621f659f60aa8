"""The parts of a decoder-only language model: blocks, attention output projections, heads, norm, output head.

Found by structure and by watching one block run on six tokens, so that no list of architectures is kept: the
attention output projection is the first linear layer of a block whose input depends on other positions. Knows
transformers' generic interface (config, get_decoder, get_output_embeddings); knows no model by name.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import PostalignError
from .tracing import Call, block_output, evaluating, in_memory, linears, mixed, same, trace_block, width

__all__ = ["Anatomy", "anatomy", "block_output", "with_block_output"]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The named parts of one model. All tuples have one entry per block.

    attention_out: the projections W_O; their *input* is all heads' outputs, `[..., n_heads * head_dim]`.
    mlp_out: the modules whose output is the feed-forward's contribution (`down_proj`, `c_proj`; in a mixture
    of experts the whole feed-forward, since no single layer ends it).
    """

    blocks: tuple[nn.Module, ...]
    block_names: tuple[str, ...]
    attention_out: tuple[nn.Module, ...]
    mlp_out: tuple[nn.Module, ...]
    n_heads: int
    head_dim: int
    hidden_size: int
    lm_head: nn.Module
    final_norm: nn.Module
    attention_out_names: tuple[str, ...] = field(repr=False)
    mlp_out_names: tuple[str, ...] = field(repr=False)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def head_weight(self, layer: int, head: int) -> Tensor:
        """W_O of one head, float32 `[hidden, head_dim]`, on the projection's device.

        Adding `d` to the head's output adds `head_weight @ d` to the projection's; a bias plays no
        part. Plain weights are read; a quantised, adapted or offloaded projection is asked for its
        answers to unit vectors.
        Raises PostalignError for a layer or head that the model does not have.
        """
        if not (0 <= layer < self.n_layers and 0 <= head < self.n_heads):
            raise PostalignError(
                f"there is no head ({layer}, {head}): "
                f"choose a layer from 0-{self.n_layers - 1} and a head from 0-{self.n_heads - 1}."
            )
        module, columns = self.attention_out[layer], slice(head * self.head_dim, (head + 1) * self.head_dim)
        weight: Any = getattr(module, "weight", None)
        plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and not weight.is_meta
        if plain and type(module) is nn.Linear:
            matrix = weight[:, columns]
        elif plain and type(module) is Conv1D:  # keeps [in, out]
            matrix = weight[columns].T
        else:
            matrix = _response(module, columns, self.n_heads * self.head_dim)
        return matrix.detach().float().clone()


def _response(module: nn.Module, columns: slice, size: int) -> Tensor:
    """`[out, columns]`: what a linear module answers to each unit vector, less what it answers to zero."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1), torch.float32)
    units = torch.eye(size, dtype=dtype, device=in_memory(module))[columns]
    with evaluating(module):
        answers = module.forward(torch.cat([units, 0 * units[:1]]).unsqueeze(0))[0].float()  # past the hooks
    return (answers[:-1] - answers[-1]).T


_known: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of `model`, a causal language model of transformers (or a PEFT model around one).

    The first call runs one block on twelve tokens (make it before you put hooks that mind); later calls are
    cheap until a part is replaced, by an adapter say. Raises PostalignError that names what was not found.
    """
    known = _known.get(model)
    if known is None or not _current(model, known):
        known = _known[model] = _examine(model)
    return known


def with_block_output(output: Any, new: Tensor) -> Any:
    """`output` with its hidden states replaced by `new`, in the same form (tensor, tuple or list)."""
    if not isinstance(output, (tuple, list)):
        return new
    if hasattr(output, "_replace"):  # a named tuple
        return type(output)(new, *output[1:])
    return type(output)((new, *output[1:]))


def _current(model: nn.Module, known: Anatomy) -> bool:
    names = (*known.block_names, *known.attention_out_names, *known.mlp_out_names)
    parts = (*known.blocks, *known.attention_out, *known.mlp_out)
    try:
        return all(model.get_submodule(name) is part for name, part in zip(names, parts, strict=True))
    except AttributeError:
        return False


def _examine(model: nn.Module) -> Anatomy:
    decoder, config, lm_head = _language_model(model)
    hidden, n_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    holder, name, blocks = _blocks(decoder, config)
    places = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    calls = trace_block(decoder, blocks[0], _size(config, "vocab_size"))
    attention, head_dim = _attention_out(calls, config, n_heads, hidden)
    feed_forward, mlp = _mlp_out(calls, attention, hidden)
    attention_out, mlp_out = [], []
    for i, block in enumerate(blocks):
        projection = _part(block, attention)
        if projection is None or width(projection) != (n_heads * head_dim, hidden):
            raise _unsupported(model, f"block {i} has no attention output projection like block 0's ({attention!r})")
        attention_out.append(projection)
        # a model may mix dense and mixture-of-experts blocks: then the feed-forward as a whole is the end
        end = _part(block, mlp) or _part(block, feed_forward)
        if end is None:
            raise _unsupported(model, f"block {i} has no feed-forward like block 0's ({feed_forward!r})")
        mlp_out.append(end)
    names = [tuple(places[id(part)] for part in parts) for parts in (blocks, attention_out, mlp_out)]
    return Anatomy(
        blocks=tuple(blocks),
        block_names=names[0],
        attention_out=tuple(attention_out),
        mlp_out=tuple(mlp_out),
        n_heads=n_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        lm_head=lm_head,
        final_norm=_final_norm(holder, name, hidden),
        attention_out_names=names[1],
        mlp_out_names=names[2],
    )


def _unsupported(model: nn.Module, what: str) -> PostalignError:
    return PostalignError(f"{type(model).__name__} is not supported: {what}. Use a decoder-only transformer.")


def _language_model(model: nn.Module) -> tuple[nn.Module, Any, nn.Module]:
    """(text decoder, its config, output head)."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise _unsupported(model, "it is not a transformers model (no config, no get_decoder)")
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(model, "it is an encoder-decoder; a decoder-only stack was not found")
    lm_head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(lm_head, nn.Module):
        raise PostalignError(
            f"{type(model).__name__} has no language-model head: load the model with AutoModelForCausalLM."
        )
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    if decoder is lm_head:  # a head that is called "decoder" misleads transformers
        decoder = model.base_model
    return decoder, config.get_text_config(), lm_head


def _told(config: Any, name: str) -> Any:
    """What the config says of `name`, None when it says nothing."""
    try:
        return getattr(config, name, None)
    except RuntimeError as error:  # transformers' answer where blocks differ
        raise PostalignError(
            f"{type(config).__name__}.{name} differs between blocks, which is not supported: "
            "use a transformer with like attention in every block."
        ) from error


def _size(config: Any, name: str) -> int:
    value = _told(config, name)
    if not isinstance(value, int) or value < 1:
        found = "was not found" if value is None else f"is not one number ({value})"
        raise PostalignError(
            f"{type(config).__name__}.{name} {found}: use a transformer with like attention in every block."
        )
    return value


def _blocks(decoder: nn.Module, config: Any) -> tuple[nn.Module, str, list[nn.Module]]:
    """(module that holds the list, the list's name in it, blocks): the longest outermost list of blocks."""
    wanted = _told(config, "num_hidden_layers")
    found: list[tuple[nn.Module, str, list[nn.Module]]] = []

    def walk(module: nn.Module) -> None:
        for name, child in module.named_children():
            if not isinstance(child, nn.ModuleList):
                walk(child)
            elif len(child) and len({type(block) for block in child}) == 1 and len(linears(child[0])) >= 2:
                found.append((module, name, list(child)))

    walk(decoder)
    if not found:
        raise _unsupported(decoder, "no list of like blocks was found in its decoder")
    return max(found, key=lambda entry: (len(entry[2]) == wanted, len(entry[2])))


def _attention_out(calls: list[Call], config: Any, n_heads: int, hidden: int) -> tuple[str, int]:
    """(name in the block, head_dim) of the first linear layer whose input depends on other positions."""
    call = next((c for c in calls if width(c.module) and c.inputs and mixed(c.inputs[0])), None)
    if call is None:
        raise PostalignError(
            "no attention output projection was found: no linear layer of block 0 reads a mix of positions; "
            "use a decoder-only transformer with ordinary attention and loaded weights."
        )
    inward, outward = width(call.module) or (0, 0)
    told = [_told(config, "head_dim"), _told(config, "v_head_dim"), hidden // n_heads]
    dims = [d for d in told if isinstance(d, int) and d > 0]
    if outward != hidden or inward not in [n_heads * d for d in dims]:
        raise PostalignError(
            f"no attention output projection was found: the first layer after tokens mix, {call.name!r}, is "
            f"{inward} -> {outward}, not {n_heads} heads x {dims[0]} -> {hidden}; "
            "hybrid blocks and projections fused with the feed-forward are not supported."
        )
    if "." not in call.name:
        raise PostalignError(f"no attention submodule was found around {call.name!r}: use a decoder-only transformer.")
    return call.name, inward // n_heads


def _mlp_out(calls: list[Call], attention: str, hidden: int) -> tuple[str, str]:
    """(feed-forward, module that ends it), names in the block; the same where no single layer ends it.

    The feed-forward is the largest of the block's other children by its matrices, of equals the last to end.
    """
    children = [c for c in calls if "." not in c.name and c.name != attention.split(".")[0] and _matrices(c.module)]
    if not children:
        raise PostalignError("no feed-forward was found in the first block: use a decoder-only transformer.")
    largest = max(_matrices(c.module) for c in children)
    whole = [c for c in children if _matrices(c.module) == largest][-1]
    inside = [c for c in calls if c.name.startswith(whole.name + ".") and (width(c.module) or (0, 0))[1] == hidden]
    if inside and _ends(inside[-1], whole):
        return whole.name, inside[-1].name
    return whole.name, whole.name


def _ends(layer: Call, whole: Call) -> bool:
    """Is the layer's output the whole's, alone or with one of the whole's inputs (the residual) added?"""
    if same(whole.output, layer.output):
        return True
    if whole.output is None or layer.output is None or whole.output.shape != layer.output.shape:
        return False
    return any(same(whole.output, layer.output + x) for x in whole.inputs if x.shape == layer.output.shape)


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2)


def _part(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def _final_norm(holder: nn.Module, blocks: str, hidden: int) -> nn.Module:
    """The last norm beside the list of blocks, one that comes after it before one that comes ahead of it."""
    children = list(holder.named_children())
    start = [name for name, _ in children].index(blocks)

    def is_norm(name: str, module: nn.Module) -> bool:
        shapes = [tuple(p.shape) for p in module.parameters()]
        named = re.search(r"norm|ln", f"{name} {type(module).__name__}".lower()) is not None
        return all(shape == (hidden,) for shape in shapes) and (bool(shapes) or named)

    norms = [m for name, m in (*children[:start], *children[start + 1 :]) if is_norm(name, m)]
    if not norms:
        raise PostalignError(
            f"no final norm was found beside the blocks of {type(holder).__name__}: it is not supported."
        )
    return norms[-1]
