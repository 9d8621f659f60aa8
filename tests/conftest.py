"""Fixtures shared by all tests: one thread and tiny models. Tests of the built-in model are marked `real`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(name="tiny_tokenizer", scope="session")
def tiny_tokenizer_fixture() -> Any:
    """The tiny tokenizer with a ChatML-like template. Shared: do not change it."""
    return tiny_tokenizer()


@pytest.fixture(name="tiny_llama", scope="session")
def tiny_llama_fixture() -> Any:
    """A tiny random Llama on the tiny tokenizer's vocabulary. Shared: leave its weights as they are."""
    return tiny_model("llama")
