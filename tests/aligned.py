"""An alignment with all its parts on a tiny model, and ways to compare alignments and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from postalign.alignment import Alignment, fingerprint
from postalign.decoding import generate_replies
from tests.decoding.twin import PROMPTS, guidance_of, push, splitting_gate


def fitted(model: Any, tokenizer: Any, guide: str = "adapter") -> Alignment:
    """An alignment with all parts, as a method leaves it."""
    return Alignment(
        method="safeinfer",
        edits=[push(), guidance_of(guide, model)],
        gate=splitting_gate(model, tokenizer, PROMPTS),
        config={"lambda": 0.9, "heads": 10},
        base=fingerprint(model, tokenizer),
        provenance={"data": {"hash": "abc"}},
        info={"top_heads": [[1, 2]], "ünï": "é"},
        arrays={"head_effects": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))},
    )


def ids_of(model: Any, tokenizer: Any, alignment: Alignment) -> list[list[int]]:
    return [r.token_ids for r in generate_replies(model, tokenizer, PROMPTS, alignment=alignment, max_new_tokens=5)]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
