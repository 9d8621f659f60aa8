"""Linear layers whose product suits the processor, for passes of few rows. Knows processors; knows no model.

A decoding step does little but read weights. MKL, which torch multiplies float32 with, reads them with one thread for a
single row and several times over for a few on AMD's processors; oneDNN, or the same product turned over, does not
(benchmarks/products.py). Elsewhere torch's choice is left alone.
"""

from __future__ import annotations

import functools
import platform
import threading
import weakref

import torch
from torch import Tensor, nn

FEW, SHORT = 4, 1000  # rows and inputs up to which the product turned over is the quicker one
_users: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@functools.cache
def slow_products() -> bool:
    """Whether torch's own float32 product is slow for few rows on this processor."""
    known = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.mkldnn.is_available() and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return "AuthenticAMD" if "AuthenticAMD" in platform.processor() else ""


def quick_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W' + b`, float32 on a CPU, without a gradient: x `[..., in]`, weight `[out, in]`, bias `[out]` or None."""
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= FEW or x.shape[-1] > SHORT:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    flat = x.reshape(rows, -1)
    if rows == 1:  # a product with a vector is the slow one
        flat = flat.repeat(2, 1)
    out = torch.mm(weight, flat.t())[:, :rows].t().contiguous()
    out = out if bias is None else out.add_(bias)
    return out.view(*x.shape[:-1], -1)


class QuickProducts:
    """While it stands, the model's linear layers use `quick_linear` where they can; `remove` ends it.

    Several may stand on one model, in several threads. Passes that need gradients are computed as always.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model
        with _lock:
            _users[model] = _users.get(model, 0) + 1
            if _users[model] == 1:
                for module in model.modules():
                    if type(module) is nn.Linear and "forward" not in vars(module) and _fits(module.weight):
                        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the layers their own forward back, if nobody else uses this."""
        model, self.model = self.model, None
        if model is None:
            return
        with _lock:
            _users[model] -= 1
            if not _users[model]:
                for module in model.modules():
                    own = vars(module).get("forward")
                    if isinstance(own, functools.partial) and own.func is _forward:
                        del module.forward


def _fits(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    weight = module.weight
    if torch.is_grad_enabled() or not _fits(weight) or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(input, weight, module.bias)
    return quick_linear(input, weight, module.bias)
