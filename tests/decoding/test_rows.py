"""Rows that end at their own step, stop texts, batches, order and streaming change no row's reply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from postalign.alignment import Alignment
from postalign.decoding import generate, generate_replies
from postalign.decoding.engine import Stream, decode
from postalign.decoding.guides import guide_inputs
from postalign.decoding.sampling import Sampler
from postalign.errors import UsageError
from postalign.models.chat import encode
from tests.decoding.tools import GUIDES, Ear, close, forced_steps, parts
from tests.decoding.twin import PROMPTS, Twin, guidance_of, prompt_ids, push, splitting_gate
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("guide", GUIDES)
def test_keep_changes_nothing(kind: str, guide: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    gate = splitting_gate(model, tiny_tokenizer, PROMPTS)
    alignment = Alignment("test", [push(), guidance_of(guide, model, other=tiny_model(kind, seed=7))], gate)
    ids = [[20 + 7 * row + step for step in range(6)] for row in range(len(PROMPTS))]
    whole, strength = forced_steps(model, tiny_tokenizer, alignment, PROMPTS, ids)
    order = strength.argsort().tolist()  # closed rows first
    for drop in (order[:1], order[-1:], order[:3], order[2:]):
        kept = [row for row in range(len(PROMPTS)) if row not in drop]
        current = list(range(len(PROMPTS)))
        chosen = alignment.guidance.guide if alignment.guidance else None
        other = guide_inputs(chosen, tiny_tokenizer, PROMPTS, torch.device("cpu")) if guide == "prompt" else None
        with torch.no_grad(), Stream(model, alignment, getattr(chosen, "model", None)) as stream:
            stream.first(encode(tiny_tokenizer, PROMPTS), other)
            for step in range(1, 6):
                if step in (2, 4):  # first `drop` leaves, then all but the last
                    left = kept if step == 2 else kept[-1:]
                    stream.keep(torch.tensor([current.index(row) for row in left]))
                    current = left
                scores = stream.next(torch.tensor([ids[row][step - 1] for row in current]))
                close(scores, whole[current, step])
                assert torch.equal(stream.strength, strength[current])


@pytest.mark.parametrize("tokens", [1, 3])
def test_guidance_ends_after_its_first_tokens(tokens: int, tiny_tokenizer: Any) -> None:
    """Rows are what the twin says, the guide's passes stop, and what follows differs from guidance to the end."""
    model = tiny_model("llama")
    guidance = guidance_of("adapter", model, lam=0.99)
    alignment = Alignment("test", [push(), replace(guidance, tokens=tokens)])
    replies = generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=8)
    twin = Twin(model, tiny_tokenizer, alignment)
    assert [reply.token_ids for reply in replies] == [twin.run(prompt, 8)[0] for prompt in PROMPTS]
    whole = generate_replies(
        model, tiny_tokenizer, PROMPTS, alignment=Alignment("test", [push(), guidance]), max_new_tokens=8
    )
    assert [r.token_ids[:tokens] for r in whole] == [r.token_ids[:tokens] for r in replies]
    assert [r.token_ids for r in whole] != [r.token_ids for r in replies]
    with torch.no_grad(), Stream(model, alignment) as stream:
        stream.first(encode(tiny_tokenizer, PROMPTS))
        for step in range(1, 6):
            assert (len(stream.guided) > 0) == (step <= tokens)
            stream.next(torch.zeros(len(PROMPTS), dtype=torch.long))


@pytest.mark.parametrize("name", ["amplification", "amplification+adapter+gate", "amplification+prompt", "vector+gate"])
def test_rows_that_end_at_different_steps(name: str, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    alignment = parts(name, model, tiny_tokenizer)
    prompts = [*PROMPTS, "The quick brown fox", "Question: what moves the sea?", "a b c"]
    free = generate_replies(model, tiny_tokenizer, prompts, alignment=alignment, max_new_tokens=12)
    # ends: the token that each row says at its own step, so that they end one after the other
    eos = {reply.token_ids[min(row + 1, 11)] for row, reply in enumerate(free[:6])}
    model.generation_config.eos_token_id = sorted(eos)
    twin = Twin(model, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, 12, eos)[0] for prompt in prompts]
    replies = generate_replies(model, tiny_tokenizer, prompts, alignment=alignment, max_new_tokens=12)
    assert len({len(ids) for ids in expected}) > 2
    assert [r.token_ids for r in replies] == expected
    assert [r.finish for r in replies] == ["stop" if ids[-1] in eos else "length" for ids in expected]
    assert all(r.text == tiny_tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in free)


def test_ended_rows_are_dropped_and_compact_can_be_switched_off(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    batch = encode(tiny_tokenizer, PROMPTS)
    ends = {0: 2, 1: 1, 2: 5, 3: 3, 4: 8}

    def run(compact: bool) -> tuple[list[list[int]], list[int]]:
        sizes: list[int] = []

        def stopping(sequences: Tensor, rows: Tensor) -> Tensor:
            sizes.append(len(rows))
            made = sequences.shape[1] - batch.input_ids.shape[1]
            return torch.tensor([made >= ends[int(row)] for row in rows])

        ids, _ = decode(
            tiny_llama,
            batch,
            alignment=Alignment("test", [push()]),
            max_new_tokens=10,
            eos=set(),
            pad=3,
            sampler=Sampler(False, 1.0, 1.0, 0, 0),
            stopping=stopping,
            compact=compact,
        )
        return ids, sizes

    dropped, sizes = run(True)
    kept, all_sizes = run(False)
    assert dropped == kept
    assert [len(ids) for ids in dropped] == [2, 1, 5, 3, 8]
    assert set(all_sizes) == {5} and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


def test_stop_texts(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    free = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    words = [reply.text[4:6] for reply in free[:2]]
    assert all(len(word) == 2 and "\ufffd" not in word for word in words)
    stopped = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=12, stop=[*words, ""])
    for before, after in zip(free, stopped, strict=True):
        cut = min((before.text.find(word) for word in words if word in before.text), default=None)
        assert after.text == before.text[:cut]
        assert after.finish == ("length" if cut is None else "stop")
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        if cut is not None:  # no token too many
            assert not any(word in tiny_tokenizer.decode(after.token_ids[:-1]) for word in words)
    alone = generate(tiny_llama, tiny_tokenizer, PROMPTS[:1], max_new_tokens=12, stop=words[0])
    assert alone == [free[0].text[: free[0].text.find(words[0])]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_max_new_tokens(count: int, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    replies = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS[:2], max_new_tokens=count)
    assert [len(r.token_ids) for r in replies] == [count, count]
    assert [r.finish for r in replies] == ["length", "length"]


@pytest.mark.parametrize("size", [1, 2, 16])
def test_order_and_batch_size(size: int, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("amplification+vector+gate", tiny_llama, tiny_tokenizer)
    done: list[int] = []
    texts = generate(
        tiny_llama,
        tiny_tokenizer,
        PROMPTS,
        alignment=alignment,
        max_new_tokens=5,
        batch_size=size,
        on_progress=done.append,
    )
    alone = [
        generate(tiny_llama, tiny_tokenizer, [prompt], alignment=alignment, max_new_tokens=5)[0] for prompt in PROMPTS
    ]
    assert texts == alone
    assert done == [min(n, 5) for n in range(size, 5 + size, size)]


def test_streaming_hears_every_token(tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    free = generate_replies(model, tiny_tokenizer, PROMPTS[:1], max_new_tokens=8)[0]
    model.generation_config.eos_token_id = free.token_ids[4]
    ear = Ear()
    reply = generate_replies(model, tiny_tokenizer, PROMPTS[:1], max_new_tokens=8, streamer=ear)[0]
    assert reply.finish == "stop"
    assert ear.heard[0] == prompt_ids(tiny_tokenizer, PROMPTS[0])
    assert ear.heard[1:] == [[token] for token in reply.token_ids]
    assert ear.ended == 1


def test_text_streamer_of_transformers(capsys: pytest.CaptureFixture[str], tiny_llama: Any) -> None:
    from transformers import TextStreamer

    tokenizer = tiny_tokenizer()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = generate(tiny_llama, tokenizer, ["Hi"], max_new_tokens=8, streamer=streamer)[0]
    assert capsys.readouterr().out == text + "\n"


def test_a_streamer_takes_one_prompt(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="streamer"):
        generate(tiny_llama, tiny_tokenizer, PROMPTS[:2], streamer=Ear())
