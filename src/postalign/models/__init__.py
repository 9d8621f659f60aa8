"""What postalign knows of a model: loading it, its parts, its chat template, its activations.

Names are imported when they are first used, so that importing this package needs neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anatomy import Anatomy, anatomy, block_output, with_block_output
    from .load import load_model, load_tokenizer

_HOMES = {
    "Anatomy": ".anatomy",
    "anatomy": ".anatomy",
    "block_output": ".anatomy",
    "with_block_output": ".anatomy",
    "load_model": ".load",
    "load_tokenizer": ".load",
}

__all__ = ["Anatomy", "anatomy", "block_output", "load_model", "load_tokenizer", "with_block_output"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'postalign.models' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
