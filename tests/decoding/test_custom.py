"""The engine behind transformers' own generate: same ids, their processors, stops and streamers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TextStreamer

from postalign.alignment import Alignment
from postalign.decoding import generate_replies
from postalign.edits import CheckpointGuide, Guidance
from postalign.errors import UsageError
from postalign.models.chat import encode
from tests.decoding.test_sampling import assert_fits, warped
from tests.decoding.tools import Ear
from tests.decoding.twin import PROMPTS, Twin, guidance_of, prompt_ids, push, splitting_gate
from tests.tiny import tiny_model

STEPS = 8
ENDS = [2, 5]


def whole(model: Any, tokenizer: Any, guide: str = "adapter") -> Alignment:
    gate = splitting_gate(model, tokenizer, PROMPTS)
    return Alignment("test", [push(), guidance_of(guide, model, other=tiny_model("llama", seed=7))], gate)


def generated(model: Any, tokenizer: Any, alignment: Alignment | None, prompts: Any = PROMPTS, **more: Any) -> Any:
    """New ids `[rows, steps]` (or what generate returns) of transformers' generate, greedy unless told."""
    batch = encode(tokenizer, prompts)
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 3, "eos_token_id": ENDS}
    if alignment is not None:
        settings["custom_generate"] = alignment.custom_generate
    made = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **{**settings, **more})
    return made[:, batch.input_ids.shape[1] :] if isinstance(made, Tensor) else made


def padded(replies: list[Any]) -> list[list[int]]:
    longest = max(len(reply.token_ids) for reply in replies)
    return [reply.token_ids + [3] * (longest - len(reply.token_ids)) for reply in replies]


@pytest.mark.parametrize("guide", ["adapter", "checkpoint", "vector"])
def test_greedy_ids_are_those_of_pa_generate(guide: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = whole(tiny_llama, tiny_tokenizer, guide)
    ours = generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=STEPS)
    assert generated(tiny_llama, tiny_tokenizer, alignment).tolist() == padded(ours)
    one = generated(tiny_llama, tiny_tokenizer, alignment, PROMPTS[:1])  # without padding: no mask reaches us
    assert one.tolist() == [ours[0].token_ids]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen2_moe"])
def test_other_architectures(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    alignment = whole(model, tiny_tokenizer, "adapter")
    ours = generate_replies(model, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=STEPS)
    assert generated(model, tiny_tokenizer, alignment).tolist() == padded(ours)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"suppress_tokens": list(range(50, 300)), "repetition_penalty": 0.7},
        {"bad_words_ids": [[9], [10]]},
    ],
)
def test_hidden_edits_alone_equal_plain_generate_under_applied(
    more: dict[str, Any], tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    """Also with processors that look at the sign of the scores."""
    alignment = Alignment("test", [push()])
    with alignment.applied(tiny_llama):
        theirs = generated(tiny_llama, tiny_tokenizer, None, **more)
    assert torch.equal(generated(tiny_llama, tiny_tokenizer, alignment, **more), theirs)
    base = generated(tiny_llama, tiny_tokenizer, None, **more)
    assert torch.equal(generated(tiny_llama, tiny_tokenizer, alignment.with_strength(0.0), **more), base)
    assert not torch.equal(base, theirs)


class Ban(LogitsProcessor):
    def __init__(self, tokens: list[int]):
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


def test_logits_processor(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(), guidance_of("vector", tiny_llama)])
    free = generated(tiny_llama, tiny_tokenizer, alignment)
    banned = free[:, 2].tolist()
    made = generated(tiny_llama, tiny_tokenizer, alignment, logits_processor=[Ban(banned)])
    assert not set(banned) & set(made.flatten().tolist())
    twin = Twin(tiny_llama, tiny_tokenizer, alignment)
    reply: list[int] = []
    for _ in range(STEPS):
        scores = twin.next(PROMPTS[0], reply)
        scores[banned] = -torch.inf
        reply.append(int(scores.argmax()))
    assert made[0].tolist() == reply


class StopRow(StoppingCriteria):
    """Ends each row after its own number of tokens; counts on seeing all rows."""

    def __init__(self, start: int, ends: list[int]):
        self.start, self.ends = start, torch.tensor(ends)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.start >= self.ends


def test_stopping_criteria_see_all_rows(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = whole(tiny_llama, tiny_tokenizer)
    width = encode(tiny_tokenizer, PROMPTS).input_ids.shape[1]
    ends = [3, 1, 2, 6, 1]
    free = generated(tiny_llama, tiny_tokenizer, alignment)
    made = generated(tiny_llama, tiny_tokenizer, alignment, stopping_criteria=[StopRow(width, ends)])
    assert made.shape == (5, 6)
    for row, end in enumerate(ends):
        assert made[row].tolist() == free[row, :end].tolist() + [3] * (6 - end)


def test_prefix_constraints_keep_to_their_rows(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """A constraint by row number holds though other rows have ended."""
    alignment = Alignment("test", [push()])

    def allowed(row: int, ids: Tensor) -> list[int]:
        return [2] if row in (0, 1, 2) else [40 + row, 60 + row]

    made = generated(tiny_llama, tiny_tokenizer, alignment, prefix_allowed_tokens_fn=allowed)
    assert made[:3].tolist() == [[2] + [3] * (STEPS - 1)] * 3
    assert all(set(made[row].tolist()) <= {40 + row, 60 + row} for row in (3, 4))


def test_streamer_given_to_generate(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = whole(tiny_llama, tiny_tokenizer)
    ear = Ear()
    made = generated(tiny_llama, tiny_tokenizer, alignment, PROMPTS[:1], streamer=ear)
    assert ear.heard == [prompt_ids(tiny_tokenizer, PROMPTS[0]), *([token] for token in made[0].tolist())]
    assert ear.ended == 1
    assert generated(tiny_llama, tiny_tokenizer, alignment, PROMPTS[:1]).tolist() == made.tolist()
    assert ear.ended == 1  # a later call has no streamer


def test_streamer_bound_beforehand(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    ear = Ear()
    bound = functools.partial(whole(tiny_llama, tiny_tokenizer).custom_generate, streamer=ear)
    made = generated(tiny_llama, tiny_tokenizer, None, PROMPTS[:1], custom_generate=bound)
    assert ear.heard == [[token] for token in made[0].tolist()]


def test_text_streamer(capsys: pytest.CaptureFixture[str], tiny_llama: Any, tiny_tokenizer: Any) -> None:
    streamer = TextStreamer(tiny_tokenizer, skip_prompt=True)
    made = generated(tiny_llama, tiny_tokenizer, Alignment("t", [push()]), PROMPTS[:1], streamer=streamer)
    assert capsys.readouterr().out == tiny_tokenizer.decode(made[0]) + "\n"


def test_a_streamer_hears_all_rows_of_a_batch(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    width = encode(tiny_tokenizer, PROMPTS).input_ids.shape[1]
    ear = Ear()
    made = generated(
        tiny_llama,
        tiny_tokenizer,
        Alignment("t", [push()]),
        streamer=ear,
        stopping_criteria=[StopRow(width, [1, 4, 2, 4, 3])],
    )
    assert ear.heard[1:] == made.T.tolist()


def test_return_dict(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = whole(tiny_llama, tiny_tokenizer)
    plain = generated(tiny_llama, tiny_tokenizer, alignment)
    made = generated(tiny_llama, tiny_tokenizer, alignment, return_dict_in_generate=True)
    assert torch.equal(made.sequences[:, -plain.shape[1] :], plain)


def test_sampling_follows_torchs_seed(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = whole(tiny_llama, tiny_tokenizer)

    def draw(seed: int) -> list[list[int]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return generated(tiny_llama, tiny_tokenizer, alignment, do_sample=True, temperature=1.3).tolist()

    assert draw(1) == draw(1) != draw(2)
    greedy = generated(tiny_llama, tiny_tokenizer, alignment)
    assert torch.equal(generated(tiny_llama, tiny_tokenizer, alignment, do_sample=True, top_k=1), greedy)


def test_sampled_tokens_fit_the_mixed_distribution(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(), guidance_of("vector", tiny_llama, 0.5)])
    more = {"temperature": 1.2, "top_k": 15, "top_p": 0.9}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = generated(
            tiny_llama,
            tiny_tokenizer,
            alignment,
            ["Hi"],
            do_sample=True,
            max_new_tokens=1,
            num_return_sequences=1500,
            **more,
        )
    exact = Twin(tiny_llama, tiny_tokenizer, alignment).next("Hi", [])
    assert_fits(torch.bincount(made[:, 0], minlength=384), warped(exact, **more))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
)
def test_what_is_refused(more: dict[str, Any], words: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        generated(tiny_llama, tiny_tokenizer, Alignment("t", [push()]), **more)
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks for m in tiny_llama.modules())


def test_a_filled_cache_is_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    batch = encode(tiny_tokenizer, PROMPTS[:1])
    with torch.no_grad():
        cache = tiny_llama(batch.input_ids[:, :-1], use_cache=True).past_key_values
    with pytest.raises(UsageError, match="past_key_values"):
        generated(tiny_llama, tiny_tokenizer, Alignment("t", [push()]), PROMPTS[:1], past_key_values=cache)


def test_embeddings_are_refused(tiny_llama: Any) -> None:
    embeds, alignment = torch.zeros(1, 4, 32), Alignment("t", [push()])
    with pytest.raises(UsageError, match="input_ids"):
        tiny_llama.generate(inputs_embeds=embeds, custom_generate=alignment.custom_generate, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prompt_longer_than_the_context(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind, max_position_embeddings=64)
    alignment = Alignment("t", [push()])
    with pytest.raises(UsageError, match=r"prompt 2 .*context of 64"):
        generated(model, tiny_tokenizer, alignment, ["Hi", "the cat sleeps " * 40])
    assert generated(model, tiny_tokenizer, alignment, ["Hi"]).shape == (1, STEPS)


def test_guides_that_need_more_than_ids(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"pa\.generate"):
        generated(tiny_llama, tiny_tokenizer, Alignment("t", [guidance_of("prompt", tiny_llama)]))
    with pytest.raises(UsageError, match="checkpoint"):
        generated(tiny_llama, tiny_tokenizer, Alignment("t", [Guidance(CheckpointGuide("x"), 0.9)]))


def test_an_alignment_of_another_shape_is_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="layer 9"):
        generated(tiny_llama, tiny_tokenizer, Alignment("t", [push(layer=9)]))
