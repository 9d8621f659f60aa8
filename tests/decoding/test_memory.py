"""How many rows memory holds, and telling that it ran out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from postalign.decoding import memory
from postalign.decoding.engine import Engine
from tests.decoding.tools import parts
from tests.tiny import tiny_model


def test_rows_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    config = model.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 100
    row = cache + 6 * 4 * config.vocab_size
    for free, plain, guided in ((0, 1, 1), (8 * row, 4, 2), (20 * row, 10, 5), (10**12, memory.MOST, memory.MOST)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert memory.fitting_rows(model, 100, guided=False) == plain
        assert memory.fitting_rows(model, 100, guided=True) == guided


def test_what_is_free_is_asked_of_the_machine() -> None:
    assert 10**7 < memory.free_bytes(torch.device("cpu")) < 10**14


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert memory.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert memory.out_of_memory(MemoryError())
    assert memory.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not memory.out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not memory.out_of_memory(ValueError("out of memory"))


def test_the_engine_takes_as_many_rows_as_fit(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postalign.decoding import engine as module

    asked: list[Any] = []
    monkeypatch.setattr(
        module,
        "fitting_rows",
        lambda model, columns, guided: asked.append((columns, guided)) or 3,  # type: ignore[func-returns-value]
    )
    alignment = parts("vector", tiny_llama, tiny_tokenizer)
    with Engine(tiny_llama, tiny_tokenizer, alignment) as engine:
        requests = [engine.submit("moon " * n, max_new_tokens=4) for n in range(1, 9)]
        most = 0
        while engine.step():
            most = max(most, len(engine.rows))
    assert most == 3 and all(r.done for r in requests)
    longest = max(len(r.ids) for r in requests)
    assert asked[0] == (longest + 4, True)


def test_heads_are_found_in_any_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**6)
    bare = SimpleNamespace(num_attention_heads=4, hidden_size=32, num_hidden_layers=3, vocab_size=384)
    model: Any = torch.nn.Linear(2, 2)
    model.config = bare
    assert memory.fitting_rows(model, 10, guided=False) == min(32, int(5e5 // (2 * 3 * 4 * 8 * 4 * 10 + 24 * 384)))
