"""Templates, one beginning-of-sequence token, left padding, spans, and how a reply ends."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import torch

from postalign.errors import UsageError
from postalign.models.chat import (
    check_length,
    encode,
    end_of_turn,
    eos_ids,
    pad_id,
    render,
    same_vocabulary,
    spans,
    template_hash,
    to_messages,
    token_ids,
    tokenizer_hash,
)
from tests.tiny import CHATML, tiny_model, tiny_tokenizer

GEMMA = (  # no system role, writes its own beginning, trims, calls the assistant "model"
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
LLAMA2 = (  # a space between the opened reply and the answer, and one before its end
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEAF = CHATML.replace(  # drops the system message without a word
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)
TEMPLATES = {"chatml": CHATML, "gemma": GEMMA, "llama2": LLAMA2, "deaf": DEAF, "plain": False}
SAY = "Please explain how the moon moves the water"


@pytest.fixture(params=list(TEMPLATES))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tiny_tokenizer(TEMPLATES[request.param])


def test_to_messages() -> None:
    assert to_messages("hi") == [{"role": "user", "content": "hi"}]
    chat = [{"role": "system", "content": "b"}, {"role": "user", "content": "hi"}]
    assert to_messages(chat, "a")[0] == {"role": "system", "content": "a\n\nb"}
    assert chat[0]["content"] == "b"  # the caller's list is left alone
    for wrong in (
        [],
        [{"role": "user"}],
        {"role": "user", "content": "x"},
        3,
        [{"role": "user", "content": 3}],
    ):
        with pytest.raises(UsageError, match="a prompt is a text or a list"):
            to_messages(wrong)  # type: ignore[arg-type]


def test_render_is_the_models_own_template() -> None:
    assert render(tiny_tokenizer(), "hi", system="Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_form() -> None:
    tokenizer = tiny_tokenizer(template=False)
    chat = [*to_messages("a"), {"role": "assistant", "content": "b"}, *to_messages("c")]
    assert render(tokenizer, chat, "s") == "s\n\nQuestion: a\n\nAnswer: b\n\nQuestion: c\n\nAnswer:"
    assert render(tokenizer, "a", answer="b") == "Question: a\n\nAnswer: b</s>"
    assert render(tokenizer, "a", answer="b", finished=False) == "Question: a\n\nAnswer: b"


def test_a_reply_that_is_begun_is_left_open(tokenizer: Any) -> None:
    begun = {"role": "assistant", "content": "Sure, here", "prefix": True}
    chat = [{"role": "user", "content": SAY}, begun]
    assert render(tokenizer, chat) == render(tokenizer, SAY, answer="Sure, here", finished=False)
    assert render(tokenizer, chat, "Be kind.") == render(tokenizer, SAY, "Be kind.", "Sure, here", finished=False)
    for finished in (True, False):
        whole = render(tokenizer, SAY, answer="Sure, here is", finished=finished)
        assert render(tokenizer, chat, answer=" is", finished=finished) == whole
    (ids,), (same,) = (
        encode(tokenizer, [chat]).input_ids.tolist(),
        encode(tokenizer, [SAY], answers=["Sure, here"]).input_ids.tolist(),
    )
    assert ids == same
    assert chat[1] is begun and begun["content"] == "Sure, here", "the caller's chat is left alone"
    ended = [
        {"role": "user", "content": SAY},
        {"role": "assistant", "content": "Sure"},
        {"role": "user", "content": "a"},
    ]
    assert "Sure" in render(tokenizer, ended), "an answer in the middle is an answer"


@pytest.mark.parametrize("name", ["gemma", "deaf"])
def test_system_that_the_template_will_not_take_heads_the_user_message(name: str) -> None:
    text = render(tiny_tokenizer(TEMPLATES[name]), "hi", system="Be brief.")
    assert "<|im_start|>user\nBe brief.\n\nhi<|im_end|>" in text
    assert text.count("Be brief.") == 1


def test_chat_that_the_template_refuses() -> None:
    chat = [*to_messages("a"), *to_messages("b")]
    with pytest.raises(UsageError, match="roles must alternate"):
        render(tiny_tokenizer(GEMMA), chat)


def test_answers_follow_the_templates_own_words() -> None:
    assert render(tiny_tokenizer(), "a", answer="b").endswith("<|im_start|>assistant\nb<|im_end|>")
    llama2 = tiny_tokenizer(LLAMA2)
    assert render(llama2, "a", answer="b") == "<s>[INST] a [/INST] b </s>"
    assert render(llama2, "a", answer=" b", finished=False) == "<s>[INST] a [/INST] b"


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_one_beginning_only(name: str, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(TEMPLATES[name], add_bos=add_bos)
    ids = encode(tokenizer, [SAY]).input_ids[0].tolist()
    wanted = 1 if add_bos or name in ("gemma", "llama2") else 0
    assert ids.count(tokenizer.bos_token_id) == wanted
    assert ids[0] == tokenizer.bos_token_id or not wanted


def test_beginning_that_is_also_the_turn_marker() -> None:
    """As SmolLM2's: every turn starts with the bos token, and the tokenizer adds none."""
    tokenizer = tiny_tokenizer(add_bos=False)
    tokenizer.bos_token = "<|im_start|>"
    assert encode(tokenizer, ["a"]).input_ids[0].tolist() == token_ids(tokenizer, render(tokenizer, "a"))
    assert encode(tokenizer, ["a"]).input_ids[0].tolist().count(tokenizer.bos_token_id) == 2  # two turns


@pytest.mark.real
def test_built_in_model() -> None:
    """Its bos token is its turn marker: not doubled, and none is added."""
    from postalign.models.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    ids = encode(tokenizer, [SAY]).input_ids[0].tolist()
    chat = tokenizer.apply_chat_template(to_messages(SAY), add_generation_prompt=True)
    assert ids == chat["input_ids"]
    assert ids[:2] == [tokenizer.bos_token_id, *token_ids(tokenizer, "system", beginning=False)]
    assert end_of_turn(tokenizer) == "<|im_end|>"
    assert tokenizer.decode(ids[: spans(tokenizer, SAY).end_of_instruction + 1]).endswith(SAY)


def test_left_padding(tokenizer: Any) -> None:
    prompts = ["a", SAY, "Who are you?"]
    batch = encode(tokenizer, prompts)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    for i, prompt in enumerate(prompts):
        alone = encode(tokenizer, [prompt])
        length = batch.prompt_lengths[i]
        assert [length] == alone.prompt_lengths == [int(batch.attention_mask[i].sum())]
        assert torch.equal(batch.input_ids[i, -length:], alone.input_ids[0])
        assert torch.equal(batch.position_ids[i, -length:], torch.arange(length))
        assert not batch.attention_mask[i, :-length].any()
        assert (batch.input_ids[i, :-length] == tokenizer.pad_token_id).all()
    assert max(batch.prompt_lengths) == batch.input_ids.shape[1]


def test_answers_leave_the_prompts_ids_as_they_are(tokenizer: Any) -> None:
    prompts, answers = ["a", SAY], ["Sure, here is a short answer", "\n\nno"]
    alone, batch = encode(tokenizer, prompts), encode(tokenizer, prompts, answers=answers)
    assert batch.prompt_lengths == alone.prompt_lengths
    for i, answer in enumerate(answers):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()]
        length = batch.prompt_lengths[i]
        assert torch.equal(ids[:length], alone.input_ids[i][alone.attention_mask[i].bool()])
        assert tokenizer.decode(ids[length:]).lstrip(" ") == answer
    done = encode(tokenizer, prompts, answers=answers, finished=True)
    assert int(done.input_ids[0, -1]) == tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer) or "</s>")


def test_without_a_pad_token() -> None:
    tokenizer = tiny_tokenizer(pad=False)
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    batch = encode(tokenizer, ["a", SAY])
    assert int(batch.input_ids[0, 0]) == tokenizer.eos_token_id
    assert int(batch.attention_mask[0, 0]) == 0
    assert tokenizer.pad_token is None


def test_the_users_tokenizer_is_not_changed(tokenizer: Any) -> None:
    tokenizer.padding_side = "right"
    before = copy.deepcopy({k: v for k, v in vars(tokenizer).items() if k != "_tokenizer"})
    text = tokenizer.backend_tokenizer.to_str()
    encode(tokenizer, ["a", SAY], system="s", answers=["x", "y"])
    spans(tokenizer, SAY)
    after = {k: v for k, v in vars(tokenizer).items() if k != "_tokenizer"}
    assert str(before) == str(after)
    assert tokenizer.backend_tokenizer.to_str() == text


@pytest.mark.parametrize("wrong", ["one text", []])
def test_prompts_that_are_no_list(wrong: Any) -> None:
    with pytest.raises(UsageError, match="at least one"):
        encode(tiny_tokenizer(), wrong)
    with pytest.raises(UsageError, match="one answer for each"):
        encode(tiny_tokenizer(), ["a"], answers=[])


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("prompt", [SAY, "assistant", "a", "  spaces \n", "naïve 日本", "user user"])
def test_spans(tokenizer: Any, prompt: str, system: str | None, add_bos: bool) -> None:
    if not add_bos:
        tokenizer = tiny_tokenizer(tokenizer.chat_template or False, add_bos=False)
    chat = [*to_messages(prompt), {"role": "assistant", "content": prompt}, *to_messages(prompt)]
    ids = encode(tokenizer, [chat], system=system).input_ids[0]
    found = spans(tokenizer, chat, system)
    assert found.start_of_answer == len(ids)
    text = tokenizer.decode(ids[: found.end_of_instruction + 1])
    one_less = tokenizer.decode(ids[: found.end_of_instruction])
    content = prompt.strip()
    assert text.rstrip().endswith(content)
    assert one_less.count(content) < text.count(content) or one_less.endswith("\ufffd")
    rest = tokenizer.decode(ids[found.end_of_instruction + 1 :]).replace("<|im_start|>assistant", "")
    assert content not in rest or content == "a"


def test_spans_without_a_user() -> None:
    with pytest.raises(UsageError, match="no user message"):
        spans(tiny_tokenizer(), [{"role": "system", "content": "s"}])


def test_check_length(tiny_llama: Any) -> None:
    tokenizer = tiny_tokenizer()
    batch = encode(tokenizer, ["a", "long " * 100])
    length = batch.prompt_lengths[1]
    check_length(tiny_llama, batch, 512 - length)
    with pytest.raises(UsageError, match=rf"prompt 2 has {length} tokens; with {513 - length} new .* of 512 tokens"):
        check_length(tiny_llama, batch, 513 - length)
    with pytest.raises(UsageError, match="prompt 40 has"):
        check_length(tiny_llama, batch, 500, numbers=[7, 40])


def test_eos_ids() -> None:
    tokenizer: Any = tiny_tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = tiny_model()
    assert eos_ids(model, tokenizer) == {tokenizer.eos_token_id, turn}
    model.generation_config.eos_token_id = [7, 9]
    assert eos_ids(model, tokenizer) == {2, 7, 9, turn}
    assert eos_ids(tiny_model(), tiny_tokenizer(False)) == {2}


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("chatml", "<|im_end|>"),
        ("gemma", "<|im_end|>"),
        ("llama2", "</s>"),
        ("deaf", "<|im_end|>"),
        ("plain", None),
    ],
)
def test_end_of_turn(name: str, token: str | None) -> None:
    assert end_of_turn(tiny_tokenizer(TEMPLATES[name])) == token


def test_template_hash() -> None:
    assert template_hash(tiny_tokenizer(False)) == "none"
    assert template_hash(tiny_tokenizer()) == hashlib.sha256(CHATML.encode()).hexdigest()


def test_vocabularies_are_compared_by_their_maps() -> None:
    a, b = tiny_tokenizer(), tiny_tokenizer(False)
    assert same_vocabulary(a, b) is None
    assert tokenizer_hash(a) == tokenizer_hash(b)
    b.add_tokens(["<new>"])
    assert same_vocabulary(a, b) == "token '<new>' (id 384) is missing from the first vocabulary"
    assert same_vocabulary(b, a) == "token '<new>' (id 384) is missing from the second vocabulary"
    assert tokenizer_hash(a) != tokenizer_hash(b)
    a.add_tokens(["<old>"])
    assert len(a) == len(b)
    assert "'<old>'" in (same_vocabulary(a, b) or "")
    a.add_tokens(["<new>"])
    b.add_tokens(["<old>"])
    assert same_vocabulary(a, b) == "token '<old>' has id 384 in the first vocabulary and 385 in the second"
