"""How many rows fit into memory, and how it looks when they did not. Knows devices and configs."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

SHARE = 0.5  # of the memory that is free; the rest is for passes, and for caches while they are copied
MOST = 32  # rows; more of them gain little (benchmarks/decoding.py)


def fitting_rows(model: nn.Module, columns: int, *, guided: bool) -> int:
    """Rows of `columns` tokens each (prompt and reply) whose caches and logits fit into the free memory, 1 to 32."""
    config: Any = model.config
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    first = next(model.parameters())
    cache = 2 * config.num_hidden_layers * heads * size * first.element_size() * columns
    row = (cache + 6 * 4 * config.vocab_size) * (2 if guided else 1)
    return max(1, min(MOST, int(SHARE * free_bytes(first.device) // row)))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return int(psutil.virtual_memory().available)


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory ran out, on a GPU or in the CPU's allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate" in str(error))
