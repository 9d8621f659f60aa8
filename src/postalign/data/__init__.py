"""Prompts, pairs and contrasts, and where they are read from."""

from __future__ import annotations

from .records import Contrast, Data, Prompt
from .sources import load_data

__all__ = ["Contrast", "Data", "Prompt", "load_data"]
