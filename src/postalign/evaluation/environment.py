"""Where a run was made: versions and hardware. No names of machines, people or folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import psutil

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")


def environment(model: Any = None) -> dict[str, Any]:
    """Versions of what computes, and what it computes on; `model` tells the device."""
    import torch

    device = next((p.device for p in model.parameters()), torch.device("cpu")) if hasattr(model, "parameters") else None
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "device": str(device) if device is not None else None,
    }
    if device is not None and device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's model name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
