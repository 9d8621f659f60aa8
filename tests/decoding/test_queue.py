"""The queue: rows that come and go, cancelling, memory that runs out, threads that share a model."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from postalign.alignment import Alignment
from postalign.decoding import generate_replies
from postalign.decoding.engine import Engine
from postalign.edits import SparsePatch
from postalign.errors import PostalignError, UsageError
from tests.decoding.tools import GUIDES, hooks, parts
from tests.decoding.twin import PROMPTS, Twin, guidance_of, patch_for, push
from tests.tiny import tiny_model

MORE = [*PROMPTS, "The quick brown fox", "Question: what moves the sea?", "a b c", "How? Why?", "moon " * 30]
NAMES = ["none", "amplification", *(f"amplification+{guide}+gate" for guide in GUIDES)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_rows_that_join_say_what_they_say_alone(name: str, kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    alignment = None if name == "none" else parts(name, model, tiny_tokenizer)
    free = generate_replies(model, tiny_tokenizer, MORE, alignment=alignment, max_new_tokens=9, batch_size=len(MORE))
    eos = {free[i].token_ids[i % 7 + 1] for i in range(5)}
    model.generation_config.eos_token_id = sorted(eos)
    twin = Twin(model, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, 9, eos)[0] for prompt in MORE]
    assert len({len(ids) for ids in expected}) > 2
    for size in (1, 3, 4):
        replies = generate_replies(model, tiny_tokenizer, MORE, alignment=alignment, max_new_tokens=9, batch_size=size)
        assert [r.token_ids for r in replies] == expected


def test_prompts_are_taken_at_any_time(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("amplification+adapter+gate", tiny_llama, tiny_tokenizer)
    alone = generate_replies(tiny_llama, tiny_tokenizer, MORE, alignment=alignment, max_new_tokens=8, batch_size=1)
    with Engine(tiny_llama, tiny_tokenizer, alignment, batch_size=4) as engine:
        requests = []
        for prompt in MORE:
            requests.append(engine.submit(prompt, max_new_tokens=8))
            engine.step()
        while engine.step():
            assert len(engine.rows) <= 4
    assert [r.token_ids for r in requests] == [r.token_ids for r in alone]
    assert hooks(tiny_llama) == 0


def test_a_cancelled_row_makes_room(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alone = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    with Engine(tiny_llama, tiny_tokenizer, batch_size=2) as engine:
        heard: list[int] = []
        first = engine.submit(PROMPTS[0], max_new_tokens=12, on_token=heard.append)
        others = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS[1:]]
        for _ in range(3):
            engine.step()
        assert len(heard) == 4 == len(first.token_ids)  # one of the prompt's own pass, and three steps
        first.cancel()
        others[-1].cancel()  # one that waits
        engine.step()
        assert first not in engine.rows and others[1] in engine.rows
        while engine.step():
            pass
    assert heard == alone[0].token_ids[:4]
    assert [r.token_ids for r in others[:-1]] == [r.token_ids for r in alone[1:-1]] and not others[-1].token_ids


class Short:
    """A memory for so many rows: a pass over more of them fails as the CPU's allocator does."""

    def __init__(self, model: Any, rows: int) -> None:
        self.rows, self.failed, self.sizes = rows, 0, []  # type: ignore[var-annotated]
        self.handle = model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs["input_ids"])
        self.sizes.append(rows)
        if rows > self.rows:
            self.failed += 1
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("sample", [False, True])
def test_less_memory_means_fewer_rows_and_the_same_replies(sample: bool, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    alignment = parts("amplification+adapter", model, tiny_tokenizer)
    settings: Any = {"alignment": alignment, "max_new_tokens": 8, "do_sample": sample, "seed": 3}
    expected = generate_replies(model, tiny_tokenizer, MORE, batch_size=10, **settings)
    short = Short(model, 3)
    replies = generate_replies(model, tiny_tokenizer, MORE, batch_size=10, **settings)
    assert [r.token_ids for r in replies] == [r.token_ids for r in expected]
    assert short.failed == 2 and max(short.sizes[-10:]) <= 3  # 10 rows, 5, then 2
    short.rows = 0
    with pytest.raises(PostalignError, match="memory ran out"):
        generate_replies(model, tiny_tokenizer, MORE, batch_size=2, **settings)
    short.handle.remove()
    assert hooks(model) == 0


def test_memory_that_runs_out_amid_a_reply_tells_nothing_twice(tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    expected = generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    heard: list[list[int]] = [[] for _ in PROMPTS]
    with Engine(model, tiny_tokenizer, batch_size=5) as engine:
        for prompt, tokens in zip(PROMPTS, heard, strict=True):
            engine.submit(prompt, max_new_tokens=8, on_token=tokens.append)
        engine.step()
        engine.step()
        short = Short(model, 2)
        while engine.step():
            pass
        short.handle.remove()
        assert short.failed == 1
    assert heard == [r.token_ids for r in expected]


def test_other_errors_are_not_taken_for_memory(tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=2)


def test_threads_with_two_alignments_do_not_disturb_each_other(tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    gate = parts("amplification+adapter+gate", model, tiny_tokenizer)
    other = Alignment("test", [push(2, -3.0), guidance_of("vector", model, 0.5)])
    alone = {
        i: [r.token_ids for r in generate_replies(model, tiny_tokenizer, PROMPTS, alignment=a, max_new_tokens=10)]
        for i, a in enumerate((gate, other, None))
    }
    found: dict[tuple[int, int], list[list[int]]] = {}
    start = threading.Barrier(3)

    def run(i: int, alignment: Alignment | None) -> None:
        torch.set_num_threads(1)
        start.wait()
        for turn in range(4):
            replies = generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=10)
            found[i, turn] = [r.token_ids for r in replies]

    threads = [threading.Thread(target=run, args=(i, a)) for i, a in enumerate((gate, other, None))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(map(tuple, ids)) for ids in alone.values()}) == 3
    assert found == {(i, turn): alone[i] for i in range(3) for turn in range(4)}
    assert hooks(model) == 0


def test_a_thread_may_not_patch_the_weights_that_another_decodes_with(tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    patch = SparsePatch.from_dense({name: torch.ones_like(model.get_parameter(name))})
    patched = Alignment("test", [patch])

    def elsewhere(alignment: Alignment | None) -> list[Any]:
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(generate_replies(model, tiny_tokenizer, ["Hi"], alignment=alignment, max_new_tokens=2))
            except UsageError as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found

    for mine, theirs, fine in ((None, patched, False), (patched, None, False), (None, None, True)):
        with Engine(model, tiny_tokenizer, mine) as engine:
            engine.submit("Hi", max_new_tokens=3)
            engine.step()
            found = elsewhere(theirs)[0]
            assert isinstance(found, list) if fine else "another thread" in str(found)
            generate_replies(model, tiny_tokenizer, ["Hi"], alignment=theirs, max_new_tokens=2)  # in this thread it may
        assert isinstance(elsewhere(theirs)[0], list)


def test_what_the_two_have_in_common_runs_once(tiny_tokenizer: Any) -> None:
    """Rows of the guide branch off in front of the first block where they differ."""
    model = tiny_model("llama", num_hidden_layers=4)
    patch = patch_for(model, layers=4)
    upper = type(patch)({n: f for n, f in patch.factors.items() if ".layers.3." in n}, patch.scale)
    guidance = guidance_of("adapter", model)
    alignment = Alignment("test", [push(2), type(guidance)(type(guidance.guide)(upper), 0.9)])
    generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=1)  # tries the model's shape
    rows: dict[int, set[int]] = {}
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: rows.setdefault(i, set()).add(len(out)))
        for i, block in enumerate(model.model.layers)
    ]
    replies = generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=6)
    for handle in handles:
        handle.remove()
    assert rows == {0: {5}, 1: {5}, 2: {10}, 3: {10}}
    twin = Twin(model, tiny_tokenizer, alignment)
    assert [r.token_ids for r in replies] == [twin.run(p, 6, {2, 5})[0] for p in PROMPTS]
