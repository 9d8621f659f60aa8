"""The engine against a slow twin: every row of a batch, every guide, gates, scopes, rows that end, architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from postalign.alignment import Alignment
from postalign.decoding import generate, generate_replies
from postalign.decoding.engine import Stream, decode
from postalign.decoding.guides import guide_inputs
from postalign.decoding.sampling import Sampler
from postalign.edits import CheckpointGuide, Guidance, ProbeGate, PromptGuide, VectorGuide
from postalign.errors import PostalignError, UsageError
from postalign.models.chat import Batch, encode
from tests.decoding.twin import (
    PROMPTS,
    Twin,
    guidance_of,
    patch_for,
    prompt_ids,
    push,
    splitting_gate,
    vector,
)
from tests.tiny import KINDS, tiny_model, tiny_tokenizer

STEPS = 7
ENDS = {2, 5}  # </s> and <|im_end|>
GUIDES = ["adapter", "checkpoint", "prompt", "vector"]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def parts(name: str, model: Any, tokenizer: Any) -> Alignment:
    """The alignments that are put to the test, by name: `amplification`, a guide's name, or several joined by +."""
    edits: list[Any] = []
    gate = splitting_gate(model, tokenizer, PROMPTS) if "gate" in name else None
    if "amplification" in name:
        edits.append(push())
    if "patch" in name:
        edits.append(patch_for(model, seed=5))
    for kind in GUIDES:
        if kind in name:
            edits.append(guidance_of(kind, model, other=tiny_model("llama", seed=7)))
    return Alignment("test", edits, gate)


NAMES = ["amplification", *GUIDES, *(f"amplification+{g}+gate" for g in GUIDES), "amplification+patch", "patch+gate"]


def forced_steps(model: Any, tokenizer: Any, alignment: Alignment, prompts: list[str], replies: list[list[int]]) -> Any:
    """The stream's log-probabilities `[rows, steps, vocab]` along given replies of equal length, as one batch."""
    guide = alignment.guidance.guide if alignment.guidance else None
    device = torch.device("cpu")
    with torch.no_grad(), Stream(model, alignment, getattr(guide, "model", None)) as stream:
        other = guide_inputs(guide, tokenizer, prompts, device) if isinstance(guide, PromptGuide) else None
        found = [stream.first(encode(tokenizer, prompts), other)]
        for step in range(len(replies[0]) - 1):
            found.append(stream.next(torch.tensor([reply[step] for reply in replies])))
        return torch.stack(found, dim=1), stream.strength


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_single_runs_equals_twin(name: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(name, tiny_llama, tiny_tokenizer)
    twin = Twin(tiny_llama, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, STEPS, ENDS) for prompt in PROMPTS]

    together = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=STEPS)
    assert [reply.token_ids for reply in together] == [ids for ids, _ in expected]
    for prompt, reply in zip(PROMPTS, together, strict=True):
        alone = generate_replies(tiny_llama, tiny_tokenizer, [prompt], alignment=alignment, max_new_tokens=STEPS)
        assert alone[0].token_ids == reply.token_ids
        assert alone[0].gate == reply.gate == twin.strength(prompt_ids(tiny_tokenizer, prompt))

    ids = [reply.token_ids for reply in together]
    steps, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, ids)
    for row, (_, slow) in enumerate(expected):
        close(steps[row], slow)
        single, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, [PROMPTS[row]], [ids[row]])
        close(steps[row], single[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_alignment_acts(name: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(name, tiny_llama, tiny_tokenizer)
    ids = [[9] * 3] * len(PROMPTS)
    base, _ = forced_steps(tiny_llama, tiny_tokenizer, Alignment("base", []), PROMPTS, ids)
    steps, strength = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, ids)
    acted = (steps - base).abs().amax(dim=-1) > 1e-3
    assert torch.equal(acted, strength.bool().unsqueeze(1).expand_as(acted))


@pytest.mark.parametrize("lam", [0.5, 0.99])
def test_published_lambda(lam: float, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(), guidance_of("adapter", tiny_llama, lam)])
    for prompt in PROMPTS[:2]:
        ids, slow = Twin(tiny_llama, tiny_tokenizer, alignment).run(prompt, STEPS)
        steps, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, [prompt], [ids])
        close(steps[0], slow)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_strength_zero_is_bit_equal_to_the_base(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    batch = encode(tiny_tokenizer, PROMPTS)
    nothing = Alignment("test", [push(strength=0.0), guidance_of("vector", model, lam=0.0)])
    shut = Alignment("test", [push(strength=3.0)], ProbeGate(vector(), 0.0, 1, 1e9))
    ids = [[8, 9, 10]] * len(PROMPTS)
    base, _ = forced_steps(model, tiny_tokenizer, Alignment("none", []), PROMPTS, ids)
    with torch.no_grad():
        plain = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
    assert torch.equal(base[:, 0], torch.log_softmax(plain[:, -1].float(), -1))
    for alignment in (nothing, shut):
        steps, _ = forced_steps(model, tiny_tokenizer, alignment, PROMPTS, ids)
        assert torch.equal(steps, base)
        replies = generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=STEPS)
        unaligned = generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=STEPS)
        assert [r.token_ids for r in replies] == [r.token_ids for r in unaligned]


def test_without_alignment_it_is_transformers_generate(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    batch = encode(tiny_tokenizer, PROMPTS)
    theirs = tiny_llama.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=3,
    )
    ours = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=STEPS)
    assert [r.token_ids for r in ours] == theirs[:, batch.input_ids.shape[1] :].tolist()
    assert all(r.gate is None for r in ours)


@pytest.mark.parametrize("guide", GUIDES)
def test_closed_rows_are_bit_equal_to_the_base(guide: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(f"amplification+{guide}+gate", tiny_llama, tiny_tokenizer)
    ids = [[9, 8, 7, 6]] * len(PROMPTS)
    base, _ = forced_steps(tiny_llama, tiny_tokenizer, Alignment("base", []), PROMPTS, ids)
    steps, strength = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, ids)
    closed = strength == 0
    assert 0 < int(closed.sum()) < len(PROMPTS)
    assert torch.equal(steps[closed], base[closed])
    assert not torch.isclose(steps[~closed], base[~closed]).all(-1).any()


def test_a_gate_open_for_all_rows_equals_no_gate(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("amplification+vector", tiny_llama, tiny_tokenizer)
    gated = Alignment("test", alignment.edits, ProbeGate(vector(), 0.0, 2, -1e9))
    ids = [[9, 8, 7]] * len(PROMPTS)
    free, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, ids)
    steps, strength = forced_steps(tiny_llama, tiny_tokenizer, gated, PROMPTS, ids)
    assert torch.equal(steps, free) and bool((strength == 1).all())


@pytest.mark.parametrize(
    "scope", [("prompt",), ("last",), ("generation",), ("all",), ("last", "generation"), ("prompt", "generation")]
)
def test_token_scopes(scope: tuple[str, ...], tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(scope=scope)])
    twin = Twin(tiny_llama, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, 4) for prompt in PROMPTS[:3]]
    ids = [reply for reply, _ in expected]
    steps, _ = forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS[:3], ids)
    for row, (_, slow) in enumerate(expected):
        close(steps[row], slow)


@pytest.mark.parametrize("kind", KINDS)
def test_architectures(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    gate = splitting_gate(model, tiny_tokenizer, PROMPTS)
    alignment = Alignment("test", [push(), patch_for(model), guidance_of("adapter", model)], gate)
    twin = Twin(model, tiny_tokenizer, alignment)
    expected = [twin.run(prompt, 4, ENDS) for prompt in PROMPTS]
    replies = generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=4)
    assert [r.token_ids for r in replies] == [ids for ids, _ in expected]
    shortest = min(len(ids) for ids, _ in expected)
    steps, strength = forced_steps(
        model, tiny_tokenizer, alignment, PROMPTS, [ids[:shortest] for ids, _ in expected]
    )
    close(steps, torch.stack([slow[:shortest] for _, slow in expected]))
    assert set(strength.tolist()) == {0.0, 1.0}
    assert hooks(model) == 0


# rows that end


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


@pytest.mark.parametrize("count", [0, 1, 3])
def test_max_new_tokens(count: int, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    replies = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS[:2], max_new_tokens=count)
    assert [len(r.token_ids) for r in replies] == [count, count]
    assert [r.finish for r in replies] == ["length", "length"]


# order, batches, progress, streaming


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


class Ear:
    """Takes what a streamer of transformers takes."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


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


# chats


def test_system_and_messages(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "You are a cat."}, {"role": "user", "content": "Hi"}]
    as_chat = generate(tiny_llama, tiny_tokenizer, [chat], max_new_tokens=4)
    assert as_chat == generate(tiny_llama, tiny_tokenizer, ["Hi"], system="You are a cat.", max_new_tokens=4)
    assert as_chat != generate(tiny_llama, tiny_tokenizer, ["Hi"], max_new_tokens=4)


def test_a_prompt_guide_replaces_the_system_message(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    guide = PromptGuide("You are a dog.")
    chat = [{"role": "system", "content": "You are a cat."}, {"role": "user", "content": "Hi"}]
    seen = guide_inputs(guide, tiny_tokenizer, [chat, "Hi"], torch.device("cpu")).input_ids.tolist()
    assert seen == [prompt_ids(tiny_tokenizer, "Hi", "You are a dog.")] * 2


# bad input


def assert_one_line(error: BaseException) -> None:
    assert "\n" not in str(error) and len(str(error)) > 10


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompt_longer_than_the_context(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind, max_position_embeddings=64)
    prompts = ["Hi", "the cat sleeps " * 40]
    with pytest.raises(UsageError, match=r"prompt 2 .* context of 64") as caught:
        generate(model, tiny_tokenizer, prompts, max_new_tokens=4)
    assert_one_line(caught.value)
    with pytest.raises(UsageError, match="context"):
        generate(model, tiny_tokenizer, ["Hi"], max_new_tokens=60)
    assert generate(model, tiny_tokenizer, ["Hi"], max_new_tokens=4)


def test_guide_prompt_longer_than_the_context(tiny_tokenizer: Any) -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    alignment = Alignment("test", [Guidance(PromptGuide("the cat sleeps " * 20), 0.9)])
    with pytest.raises(UsageError, match="prompt 1 .*context"):
        generate(model, tiny_tokenizer, ["Hi"], alignment=alignment, max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ("Hi", {}, "list"),
        ([], {}, "prompts"),
        (["Hi"], {"batch_size": 0}, "batch_size"),
        (["Hi"], {"do_sample": True, "temperature": 0.0}, "temperature"),
        (["Hi"], {"do_sample": True, "top_p": 0.0}, "top_p"),
        ([{"role": "user"}], {}, "message"),
    ],
)
def test_wrong_use(prompts: Any, settings: dict[str, Any], words: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        generate(tiny_llama, tiny_tokenizer, prompts, max_new_tokens=2, **settings)
    assert_one_line(caught.value)


# hooks


class Broken(Exception):
    pass


def test_hooks_are_gone_afterwards_and_after_an_error(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("amplification+adapter+gate", tiny_llama, tiny_tokenizer)
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    generate(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=2)
    assert hooks(tiny_llama) == 0

    class Deaf(Ear):
        def put(self, value: Tensor) -> None:
            if self.heard:
                raise Broken
            super().put(value)

    with pytest.raises(Broken):
        generate(tiny_llama, tiny_tokenizer, PROMPTS[:1], alignment=alignment, max_new_tokens=2, streamer=Deaf())
    assert hooks(tiny_llama) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_llama.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Alignment("test", [push(), push(layer=9)]),
        lambda: Alignment("test", [push(), Guidance(VectorGuide(push(layer=9)), 0.9)]),
        lambda: Alignment("test", [push()], ProbeGate(vector(), 0.0, 9, 0.0)),
    ],
    ids=["edit", "guide", "gate"],
)
def test_hooks_are_gone_when_a_part_does_not_fit(make: Callable[[], Alignment], tiny_llama: Any) -> None:
    batch = Batch(torch.tensor([[5, 6]]), torch.tensor([[1, 1]]), [2])
    alignment = make()
    with pytest.raises((PostalignError, IndexError)), Stream(tiny_llama, alignment) as stream:
        stream.first(batch)
    assert hooks(tiny_llama) == 0
    with pytest.raises(PostalignError, match=r"out of range|another shape"):
        generate(tiny_llama, tiny_tokenizer(), ["Hi"], alignment=alignment)


# checkpoints


def test_a_checkpoint_is_loaded_once_by_name(tmp_path: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    other = tiny_model("llama", seed=7)
    other.save_pretrained(tmp_path / "guide")
    tiny_tokenizer.save_pretrained(tmp_path / "guide")
    guide = CheckpointGuide(str(tmp_path / "guide"))
    alignment = Alignment("test", [Guidance(guide, 0.9)])
    first = generate(tiny_llama, tiny_tokenizer, PROMPTS[:2], alignment=alignment, max_new_tokens=5)
    loaded = guide.model
    assert loaded is not None
    assert first == generate(tiny_llama, tiny_tokenizer, PROMPTS[:2], alignment=alignment, max_new_tokens=5)
    assert guide.model is loaded
    expected = parts("checkpoint", tiny_llama, tiny_tokenizer)
    assert first == generate(tiny_llama, tiny_tokenizer, PROMPTS[:2], alignment=expected, max_new_tokens=5)


def test_a_checkpoint_with_another_vocabulary(tmp_path: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = Tokenizer.from_str(_swap(tiny_tokenizer.backend_tokenizer.to_str()))
    other = PreTrainedTokenizerFast(tokenizer_object=swapped, eos_token="</s>", pad_token="<pad>", bos_token="<s>")
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "guide")
    other.save_pretrained(tmp_path / "guide")
    alignment = Alignment("test", [Guidance(CheckpointGuide(str(tmp_path / "guide")), 0.9)])
    with pytest.raises(PostalignError, match="vocabulary") as caught:
        generate(tiny_llama, tiny_tokenizer, ["Hi"], alignment=alignment, max_new_tokens=2)
    assert_one_line(caught.value)


def _swap(text: str) -> str:
    """The same tokenizer with the ids of two letters exchanged: equal size, another map."""
    import json

    description = json.loads(text)
    vocab = description["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return json.dumps(description)


def test_a_guide_with_padded_embeddings(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    wide = tiny_model("llama", vocab_size=400, seed=7)
    narrow = tiny_model("llama", seed=7)
    narrow.load_state_dict(
        {k: v[:384] if v.shape[0] == 400 else v for k, v in wide.state_dict().items()}, strict=True
    )
    guides = []
    for other in (wide, narrow):
        alignment = Alignment("test", [guidance_of("checkpoint", tiny_llama, other=other)])
        guides.append(forced_steps(tiny_llama, tiny_tokenizer, alignment, PROMPTS, [[9, 8]] * 5)[0])
    assert guides[0].shape[-1] == guides[1].shape[-1] == 384
    close(guides[0], guides[1])
