"""What the engine is given: chats, checkpoints by name, wrong use; and that hooks never stay behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from postalign.alignment import Alignment
from postalign.decoding import generate, generate_replies
from postalign.decoding.engine import Stream
from postalign.decoding.guides import guide_inputs
from postalign.edits import CheckpointGuide, Guidance, PromptGuide, VectorGuide
from postalign.errors import PostalignError, UsageError
from postalign.models.chat import Batch, encode
from tests.decoding.tools import Ear, assert_one_line, hooks, parts
from tests.decoding.twin import PROMPTS, one_probe, prompt_ids, push, vector
from tests.tiny import SENTENCES, tiny_model, tiny_tokenizer


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


def test_a_reply_that_is_begun_goes_on_from_there(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, here is", "prefix": True}]
    ids = encode(tiny_tokenizer, ["Hi"], answers=["Sure, here is"]).input_ids
    said: list[int] = []
    for _ in range(6):
        said.append(int(tiny_llama(input_ids=torch.cat([ids, torch.tensor([said]).long()], 1)).logits[0, -1].argmax()))
    replies = generate_replies(tiny_llama, tiny_tokenizer, ["Hi", chat, SENTENCES[0]], max_new_tokens=6)
    assert replies[1].token_ids == said[: len(replies[1].token_ids)] and len(replies[1].token_ids) > 1
    (alone,) = generate_replies(
        tiny_llama, tiny_tokenizer, [chat], alignment=Alignment("t", [push()]), max_new_tokens=6
    )
    assert alone.token_ids != replies[1].token_ids, "an alignment acts behind a begun reply too"


# bad input


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
    with pytest.raises(UsageError, match=r"prompt 1 .*context"):
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
        lambda: Alignment("test", [push()], one_probe(vector(), 0.0, 9, 0.0)),
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
