"""postalign: make an open-weight chat model safer after training, and measure what that costs.

    import postalign as pa
    model, tokenizer = pa.load_model("smollm2-fragile")
    alignment = pa.fit("safeinfer", model, tokenizer, data=pa.load_data("starter"))
    texts = pa.generate(model, tokenizer, ["How do I sharpen a knife?"], alignment=alignment)

Names are imported when they are first used, so that `import postalign` is quick and needs no heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .alignment import Alignment
    from .data.records import Data
    from .data.sources import load_data
    from .decoding import generate
    from .errors import PostalignError, UsageError
    from .evaluation import evaluate
    from .models.load import load_model
    from .tuning import fit

_HOMES = {
    "Alignment": ".alignment",
    "Data": ".data.records",
    "PostalignError": ".errors",
    "UsageError": ".errors",
    "evaluate": ".evaluation",
    "fit": ".tuning",
    "generate": ".decoding",
    "load_data": ".data.sources",
    "load_model": ".models.load",
}

__all__ = [
    "Alignment",
    "Data",
    "PostalignError",
    "UsageError",
    "__version__",
    "evaluate",
    "fit",
    "generate",
    "load_data",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'postalign' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
