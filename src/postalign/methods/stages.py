"""Finished stages of a fit, kept on disk, so that an interrupted fit goes on where it was.

Knows tensors and files; knows no method.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..files import write_whole


class Stages:
    """`stages(name, inputs, compute)`: compute's tensors, read from `folder` if done there before with equal inputs.

    inputs: all that the result depends on, as JSON. folder None: nothing is kept. A damaged file is made again.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder) if folder is not None else None

    def __call__(self, name: str, inputs: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.folder is None:
            return compute()
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]
        path = self.folder / f"{name}-{digest}.safetensors"
        if path.exists():
            with contextlib.suppress(SafetensorError):
                return load_file(path)
        tensors = {k: v.detach().cpu().contiguous() for k, v in compute().items()}
        write_whole(path, save(tensors))
        return tensors


def text_tensor(texts: Sequence[str]) -> Tensor:
    """Texts as a stage keeps them: uint8 `[bytes]`."""
    return torch.tensor(list(json.dumps(list(texts)).encode()), dtype=torch.uint8)


def read_texts(tensor: Tensor) -> list[str]:
    """What `text_tensor` was given."""
    return json.loads(bytes(tensor.tolist()))
