"""Finished stages of a fit, kept on disk, so that an interrupted fit goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from ..files import write_whole


class Stages:
    """`stage(name, inputs, compute)`: compute's tensors, from `folder` when it was done there before with equal inputs."""

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder) if folder is not None else None

    def __call__(self, name: str, inputs: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.folder is None:
            return compute()
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]
        path = self.folder / f"{name}-{digest}.safetensors"
        if path.exists():
            return load_file(path)
        tensors = {k: v.detach().cpu().contiguous() for k, v in compute().items()}
        write_whole(path, save(tensors))
        return tensors
