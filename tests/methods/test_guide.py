"""Greedy replies are the argmax; self-made pairs begin with their opening; guides are what they were asked to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from postalign.data.records import Data, Prompt
from postalign.edits import AdapterGuide, CheckpointGuide, HiddenEdit
from postalign.errors import PostalignError, UsageError
from postalign.methods import guide
from postalign.methods.greedy import greedy
from postalign.methods.stages import Stages
from postalign.models.chat import encode
from tests.methods.small import fit
from tests.tiny import SENTENCES, tiny_model

PROMPTS = ["Who are you?", "Please explain how the moon moves the water of the sea.", "a"]
ROWS = Data(
    [Prompt(f"How do I {x}?", "harmful") for x in ("bake", "lie", "run", "hide", "fox")] + [Prompt("x", "benign")]
)
TRAINING = {"pairs": 3, "steps": 2, "rank": 2, "learning_rate": 1e-3, "seed": 0}


def by_hand(model: Any, tokenizer: Any, prompt: str, tokens: int, opening: str | None = None) -> list[int]:
    ids = encode(tokenizer, [prompt], answers=None if opening is None else [opening]).input_ids
    new: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            new.append(
                int(model(input_ids=torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits[0, -1].argmax())
            )
    return new


def test_greedy_is_the_argmax_row_by_row(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    texts = greedy(tiny_llama, tiny_tokenizer, PROMPTS, 6)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        new = by_hand(tiny_llama, tiny_tokenizer, prompt, 6)
        assert text == tiny_tokenizer.decode(new, skip_special_tokens=True)


def test_greedy_goes_on_from_an_opening(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    openings = ["Sure, here is", "Of course!\n\n1.", "I"]
    texts = greedy(tiny_llama, tiny_tokenizer, PROMPTS, 5, openings)
    for prompt, opening, text in zip(PROMPTS, openings, texts, strict=True):
        new = by_hand(tiny_llama, tiny_tokenizer, prompt, 5, opening)
        assert text == tiny_tokenizer.decode(new, skip_special_tokens=True)


def test_greedy_whatever_the_generation_config_says(tiny_tokenizer: Any) -> None:
    model = tiny_model()
    expected = greedy(model, tiny_tokenizer, PROMPTS, 6)
    model.generation_config.update(do_sample=True, temperature=0.1, repetition_penalty=5.0, num_beams=3)
    assert greedy(model, tiny_tokenizer, PROMPTS, 6) == expected


def test_greedy_keeps_the_space_after_an_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers that write a space as a mark drop it at the head of a text, and the new text is one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    model = tiny_model()
    word = torch.tensor([tokenizer("bread", add_special_tokens=False)["input_ids"]])
    assert tokenizer.decode(word[0]) == "bread"
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, word.expand(2, -1)], 1))
    assert greedy(model, tokenizer, ["How do I", "How"], 9, ["Sure, here is", "Sure"]) == [" bread"] * 2


REFUSED = Data([*ROWS, Prompt("How do I fall?", "harmful", response="The fox cannot say.")])


def first_choices(model: Any, tokenizer: Any, prompt: str, refusing: str) -> list[str]:
    """The five likeliest first tokens, by hand: neither blank nor part of a letter, nor the word that refuses."""
    with torch.no_grad():
        logits = model(input_ids=encode(tokenizer, [prompt]).input_ids).logits[0, -1]
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in logits.argsort(descending=True).tolist()]
    return [t for t in texts if t.strip() and "\ufffd" not in t and t.strip().lower() != refusing][:5]


def test_self_made_pairs_go_on_from_the_models_own_opening(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    told: list[tuple[str, int, int]] = []
    settings = {"new_tokens": 6, "batch_size": 2}
    pairs = guide.self_made_pairs(tiny_llama, tiny_tokenizer, REFUSED, 4, 0, lambda *x: told.append(x), **settings)
    assert told == [("pairs for the unsafe guide", n, 4) for n in (2, 4)]
    assert len({prompt for prompt, _ in pairs}) == 4
    assert {prompt for prompt, _ in pairs} <= {row.prompt for row in REFUSED.harmful}
    for prompt, answer in pairs:
        whole = {
            o + tiny_tokenizer.decode(by_hand(tiny_llama, tiny_tokenizer, prompt, 6, o), skip_special_tokens=True)
            for o in first_choices(tiny_llama, tiny_tokenizer, prompt, "the")
        }
        assert answer in whole


def test_an_opening_is_drawn_among_the_likeliest_and_begins_no_refusal(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    prompt = ROWS[0].prompt
    free = first_choices(tiny_llama, tiny_tokenizer, prompt, "")

    def openings(refusals: list[str], *draws: float) -> list[str]:
        return guide.own_openings(tiny_llama, tiny_tokenizer, [prompt] * len(draws), refusals, draws)

    assert openings([], 0.0, 1 - 1e-9) == [free[0], free[4]]
    assert set(openings([], *(i / 200 for i in range(200)))) == set(free)
    word = free[0].strip()
    assert openings([f"{word}'m sorry", f"{word.upper()} will not"], 0.0) == [
        first_choices(tiny_llama, tiny_tokenizer, prompt, word.lower())[0]
    ]


def test_self_made_pairs_depend_on_the_seed_only(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    def make(seed: int, batch_size: int) -> list[tuple[str, str]]:
        return guide.self_made_pairs(
            tiny_llama, tiny_tokenizer, ROWS, 99, seed, lambda *_: None, new_tokens=3, batch_size=batch_size
        )

    assert len(make(0, 16)) == 5, "no more than there are"
    assert make(0, 16) == make(0, 2)
    assert make(0, 16) != make(1, 16)


def test_adapter_takes_the_datas_own_pairs(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[str, str]]] = []
    train = guide.train_adapter
    monkeypatch.setattr(
        guide, "train_adapter", lambda m, t, pairs, **rest: (seen.append(pairs), train(m, t, pairs, **rest))[1]
    )
    own = Data(
        [*ROWS, Prompt("q", "harmful", unsafe_response="Sure: so."), Prompt("r", "benign", unsafe_response="no")]
    )
    made = guide.adapter(tiny_llama, tiny_tokenizer, own, Stages(None), {}, lambda *_: None, **TRAINING)
    assert seen == [[("q", "Sure: so.")]]
    assert made.patch.rank == 2
    assert made.patch.scale == 2.0
    assert any(bool(b.any()) for _, b in made.patch.factors.values()), "it has learnt something"


def test_adapter_is_kept(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def make(**more: Any) -> dict[str, Any]:
        settings = {**TRAINING, **more}
        made = guide.adapter(
            tiny_llama, tiny_tokenizer, ROWS, Stages(tmp_path), {}, lambda *x: told.append(x), **settings
        )
        return made.patch.factors

    first = make()
    assert ("training the unsafe guide", 2, 2) in told
    told.clear()
    again = make()
    assert not told
    assert first.keys() == again.keys()
    assert all(torch.equal(x, y) for name in first for x, y in zip(first[name], again[name], strict=True))
    make(steps=1)
    assert ("training the unsafe guide", 1, 1) in told


def test_checkpoint(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "same")
    tiny_tokenizer.save_pretrained(tmp_path / "same")
    made = guide.checkpoint(str(tmp_path / "same"), tiny_tokenizer)
    assert isinstance(made, CheckpointGuide)
    assert made.name == str(tmp_path / "same")
    with pytest.raises(UsageError, match="set guide_model="):
        guide.checkpoint(None, tiny_tokenizer)


def test_checkpoint_with_another_map_of_the_same_size(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    a, b = (tiny_tokenizer.convert_ids_to_tokens(i) for i in (40, 41))
    swapped = text.replace(f'"{a}": 40', f'"{a}": 41').replace(f'"{b}": 41', f'"{b}": 40')
    assert swapped != text
    path.write_text(swapped, encoding="utf-8")
    with pytest.raises(PostalignError, match=r"another vocabulary \(token .* has id 40 .* and 41 .*\): choose a guide"):
        guide.checkpoint(str(tmp_path), tiny_tokenizer)


def test_prompt_and_vector() -> None:
    assert guide.prompt(None).system == guide.UNSAFE_SYSTEM
    assert guide.prompt("Be bad.").system == "Be bad."
    edit = HiddenEdit(torch.arange(4.0), 1, 0.5)
    (back,) = guide.vector(edit).edits()
    assert isinstance(back, HiddenEdit)
    assert (back.layer, back.strength) == (1, -0.5)
    assert torch.equal(back.vector, edit.vector)


def test_an_adapter_of_some_blocks(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = fit(tiny_llama, tiny_tokenizer, guide_layers=[2])
    assert alignment.guidance is not None and isinstance(alignment.guidance.guide, AdapterGuide)
    names = list(alignment.guidance.guide.patch.factors)
    assert names and all(name.startswith("model.layers.2.") for name in names)
    with pytest.raises(UsageError, match="guide_layers=7 is out of range"):
        fit(tiny_llama, tiny_tokenizer, guide_layers=[7])
