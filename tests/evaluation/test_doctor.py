"""The doctor finds nothing wrong where nothing is, and each thing that is broken on purpose."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from postalign.alignment import Alignment, fingerprint
from postalign.edits import (
    CheckpointGuide,
    Control,
    Guidance,
    HiddenEdit,
    LowRankPatch,
    SparsePatch,
    VectorGuide,
)
from postalign.evaluation import checks_effects
from postalign.evaluation.doctor import Finding, examine
from postalign.models.anatomy import anatomy, block_output, with_block_output
from tests.decoding.tools import GUIDES, hooks, parts
from tests.decoding.twin import PROMPTS, guidance_of, one_probe, patch_for, push, vector
from tests.edits.test_sparse import bytes_of, sparse_for
from tests.tiny import CHATML, SENTENCES, tiny_model
from tests.tiny import tiny_tokenizer as make_tokenizer

HARMLESS, HARMFUL = PROMPTS[:3], PROMPTS[3:]
GENTLE = 0.1  # a push's strength that a tiny random model takes


@pytest.fixture(autouse=True)
def short_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_effects, "REPLY_TOKENS", 6)


def look(model: Any, tokenizer: Any, alignment: Alignment | None = None) -> list[Finding]:
    return examine(model, tokenizer, alignment, harmless=HARMLESS, harmful=HARMFUL)


def one(findings: list[Finding], check: str, status: str) -> Finding:
    """The only finding of `check` that is not ok, or the first that is."""
    found = [f for f in findings if f.check == check]
    told = [f for f in found if f.status != "ok"] or found
    assert told and told[0].status == status, findings
    return told[0]


def statuses(findings: list[Finding], *checks: str) -> set[str]:
    found = [f.status for f in findings if f.check in checks]
    assert found, checks
    return set(found)


def whole(name: str, model: Any, tokenizer: Any) -> Alignment:
    alignment = parts(name, model, tokenizer)
    return replace(alignment.with_strength(GENTLE), base=fingerprint(model, tokenizer))


MECHANICS = ("edits", "fitted on", "acts", "strength 0", "taking off", "decoding", "vocabulary", "padding")


@pytest.mark.parametrize("gate", ["", "+gate"])
@pytest.mark.parametrize("name", ["amplification", "patch", "amplification+patch", *GUIDES, "amplification+vector"])
def test_a_sound_alignment(name: str, gate: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    before = bytes_of(tiny_llama)
    alignment = whole(name + gate, tiny_llama, tiny_tokenizer)
    findings = look(tiny_llama, tiny_tokenizer, alignment)
    mechanics = [f for f in findings if f.check in MECHANICS]
    assert {f.status for f in mechanics} == {"ok"}, findings
    acts = [f for f in findings if f.check == "acts"]
    assert len(acts) == len(alignment.edits) - (alignment.guidance is not None and name in ("checkpoint", "prompt"))
    assert (len([f for f in findings if f.check == "guide cost"]) == 1) == (alignment.guidance is not None)
    assert hooks(tiny_llama) == 0 and bytes_of(tiny_llama) == before
    assert all("\n" not in f.said and len(f.said) < 300 for f in findings)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen2_moe", "gpt_neox", "phi3"])
def test_other_architectures(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    findings = look(model, tiny_tokenizer, whole("amplification+patch+adapter+gate", model, tiny_tokenizer))
    assert {f.status for f in findings if f.check in MECHANICS} <= {"ok"}, findings


def test_a_sound_patch_of_the_weights(tiny_tokenizer: Any) -> None:
    model = tiny_model()
    before = bytes_of(model)
    alignment = Alignment("test", [sparse_for(model, size=0.02)], base=fingerprint(model, tiny_tokenizer))
    findings = look(model, tiny_tokenizer, alignment)
    assert statuses(findings, "acts", "taking off", "decoding", "size") == {"ok"}
    assert "of all" in one(findings, "size", "ok").said
    assert not [f for f in findings if f.check == "strength 0"]  # a patch has none
    assert bytes_of(model) == before


def test_a_model_alone(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    findings = look(tiny_llama, tiny_tokenizer)
    assert {f.check for f in findings} >= {"dtype", "chat template", "padding", "end of turn", "decoding"}
    assert statuses(findings, "dtype", "chat template", "padding", "vocabulary", "decoding") == {"ok"}
    said = one(findings, "end of turn", "warning").said  # the tiny model's config knows </s> only
    assert "'<|im_end|>'" in said and "generation_config" in said


# what is broken on purpose, and the check that turns


class Detached(HiddenEdit):
    """Its hook comes off as soon as it is on."""

    def attach(self, model: nn.Module, control: Control) -> list[Any]:
        handles = super().attach(model, control)
        for handle in handles:
            handle.remove()
        return handles


class Doubled(HiddenEdit):
    def attach(self, model: nn.Module, control: Control) -> list[Any]:
        return [*super().attach(model, control), *super().attach(model, control)]


class Ungated(HiddenEdit):
    """Acts on every row, whatever the gate says."""

    def attach(self, model: nn.Module, control: Control) -> list[Any]:
        def add(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = block_output(output)
            everyone = Control(torch.ones(len(hidden)), control.start)
            where = everyone.coefficients(self.scope, *hidden.shape[:2], hidden.device)
            if where is None:
                return output
            return with_block_output(output, hidden + where.unsqueeze(-1) * self.strength * self.vector)

        return [anatomy(model).blocks[self.layer].register_forward_hook(add)]


class Everywhere(HiddenEdit):
    """Acts on the whole prompt, whatever its scope."""

    def attach(self, model: nn.Module, control: Control) -> list[Any]:
        return HiddenEdit(self.vector, self.layer, self.strength, ("all",)).attach(model, control)


class WrongBlock(HiddenEdit):
    def attach(self, model: nn.Module, control: Control) -> list[Any]:
        return HiddenEdit(self.vector, self.layer + 1, self.strength, self.scope).attach(model, control)


class Leaking(HiddenEdit):
    """Its hook stays when it is taken off."""

    def attach(self, model: nn.Module, control: Control) -> list[Any]:
        super().attach(model, control)
        return []


@pytest.mark.parametrize("kind", [Detached, Doubled, Ungated, Everywhere, WrongBlock])
@pytest.mark.parametrize("guide", ["", "+adapter"])
def test_an_edit_that_acts_wrongly(kind: Any, guide: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = whole(f"amplification{guide}+gate", tiny_llama, tiny_tokenizer)
    edit: Any = alignment.edits[0]
    broken = kind(edit.vector, edit.layer, edit.strength, edit.scope)
    findings = look(tiny_llama, tiny_tokenizer, replace(alignment, edits=[broken, *alignment.edits[1:]]))
    said = one(findings, "acts", "fail").said
    times = {Detached: "0.00 times in place of 1", Doubled: "2.00 times in place of 1"}
    assert times.get(kind, "times in place of") in said and "block 1" in said
    if guide:
        assert [f.status for f in findings if f.check == "acts"] == ["fail", "ok"]  # the other edit is sound


def test_an_edit_that_stays(tiny_tokenizer: Any) -> None:
    model = tiny_model()
    edit = push()
    alignment = Alignment("test", [Leaking(edit.vector, edit.layer, GENTLE)], base=fingerprint(model, tiny_tokenizer))
    said = one(look(model, tiny_tokenizer, alignment), "taking off", "fail").said
    assert "hooks stay" in said


def test_an_edit_that_heeds_no_strength(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    class Stubborn(HiddenEdit):
        def attach(self, model: nn.Module, control: Control) -> list[Any]:
            return HiddenEdit(self.vector, self.layer, 0.5, self.scope).attach(model, control)

        def at(self, **change: Any) -> HiddenEdit:
            return self

    alignment = Alignment("test", [Stubborn(vector(), 1, 0.5)])
    one(look(tiny_llama, tiny_tokenizer, alignment), "strength 0", "fail")


class Lost(LowRankPatch):
    """Acts at its first module only."""

    def attach(self, model: nn.Module, control: Control) -> list[Any]:
        handles = super().attach(model, control)
        for handle in handles[1:]:
            handle.remove()
        return handles


def test_a_guide_whose_patch_is_partly_detached(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    patch = patch_for(tiny_llama)
    guidance: Any = guidance_of("adapter", tiny_llama)
    guidance = replace(guidance, guide=replace(guidance.guide, patch=Lost(patch.factors, patch.scale)))
    said = one(look(tiny_llama, tiny_tokenizer, Alignment("test", [guidance])), "acts", "fail").said
    assert "of the guide" in said and "0.00 times in place of 1" in said


def test_a_vector_guide_that_acts_on_the_models_own_rows(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    edit = push(1, -1.0)
    guidance = Guidance(VectorGuide(Ungated(edit.vector, edit.layer, edit.strength)), 0.9)
    one(look(tiny_llama, tiny_tokenizer, Alignment("test", [guidance])), "acts", "fail")


def test_a_guide_that_is_not_asked(tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from postalign.decoding.stream import Stream

    alignment = whole("prompt", tiny_llama, tiny_tokenizer)
    made = Stream.__init__

    def forget(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.guidance = None
        self.shared = False

    monkeypatch.setattr(Stream, "__init__", forget)
    findings = look(tiny_llama, tiny_tokenizer, alignment)
    assert "not asked" in one(findings, "guide cost", "fail").said
    one(findings, "decoding", "fail")


def test_a_guide_of_the_models_own_opinion(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    guide = CheckpointGuide("twin")
    guide.model = tiny_llama
    findings = look(tiny_llama, tiny_tokenizer, Alignment("test", [Guidance(guide, 0.9)]))
    assert "changes nothing" in one(findings, "guide", "warning").said


def test_a_patch_that_is_not_written(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    alignment = Alignment("test", [sparse_for(model, size=0.02)])
    with monkeypatch.context() as patched:
        patched.setattr(SparsePatch, "attach", lambda self, model, control: [])
        assert "do not become" in one(look(model, tiny_tokenizer, alignment), "acts", "fail").said
    attach = SparsePatch.attach

    def too_much(self: SparsePatch, model: nn.Module, control: Control) -> list[Any]:
        handles = attach(self, model, control)
        name = next(iter(self.shapes))
        listed = set(self.entries[name][0].tolist())
        flat = model.get_parameter(name).data.view(-1)
        flat[next(i for i in range(len(flat)) if i not in listed)] += 1
        return handles

    monkeypatch.setattr(SparsePatch, "attach", too_much)
    findings = look(model, tiny_tokenizer, alignment)
    assert "other weights change too" in one(findings, "acts", "fail").said
    assert "weights stay changed" in one(findings, "taking off", "fail").said


def test_a_patch_too_fine_for_the_number_format(tiny_tokenizer: Any) -> None:
    model = tiny_model()
    patch = SparsePatch.from_dense({"model.norm.weight": torch.full((32,), 1e-4)})
    findings = look(model.to(torch.bfloat16), tiny_tokenizer, Alignment("test", [patch]))
    assert "32 of these values are lost" in one(findings, "acts", "warning").said


def test_size_of_a_vector(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    sound = Alignment("test", [push(strength=0.5)])
    said = one(look(tiny_llama, tiny_tokenizer, sound), "size", "ok").said
    share = float(said.split(": ")[1].split()[0])
    huge = replace(push(strength=0.5), vector=100 * push().vector)
    said = one(look(tiny_llama, tiny_tokenizer, Alignment("test", [huge])), "size", "fail").said
    assert float(said.split(": ")[1].split()[0]) == pytest.approx(100 * share, rel=0.01)
    fitting = float(said.split("at ")[-1].split()[0])
    assert fitting * 100 * share / 0.5 == pytest.approx(1.0, rel=0.1)
    faint = replace(push(strength=GENTLE), vector=1e-3 * push().vector)
    assert "raise" in one(look(tiny_llama, tiny_tokenizer, Alignment("test", [faint])), "size", "warning").said
    vast = Guidance(VectorGuide(replace(push(1, -1.0), vector=100 * push().vector)), 0.9)
    one(look(tiny_llama, tiny_tokenizer, Alignment("test", [vast])), "size", "fail")


def test_size_of_a_patch(tiny_tokenizer: Any) -> None:
    model = tiny_model()
    weight = model.get_parameter("model.norm.weight")
    for share, status in ((0.05, "ok"), (0.5, "warning"), (3.0, "fail"), (1e-5, "warning")):
        patch = SparsePatch.from_dense({"model.norm.weight": share * weight.detach()})
        said = one(look(model, tiny_tokenizer, Alignment("test", [patch])), "size", status).said
        assert f"with {share:.2%} of the norm" in said


def test_edits_that_add_nothing(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    for edits in ([push(strength=0.0)], [guidance_of("adapter", tiny_llama, 0.0)]):
        one(look(tiny_llama, tiny_tokenizer, Alignment("test", list(edits))), "acts", "warning")
    assert one(look(tiny_llama, tiny_tokenizer, Alignment("test", [])), "edits", "warning")


def test_a_gate_that_never_or_always_opens(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    for bias, words in ((-1e6, "opens for 0 of 2 harmful and 0 of 3 harmless"), (1e6, "2 of 2 harmful and 3 of 3")):
        alignment = Alignment("test", [push(strength=GENTLE)], one_probe(vector(9), bias, 1, 0.0))
        findings = look(tiny_llama, tiny_tokenizer, alignment)
        assert words in one(findings, "gate", "warning").said
    never = Alignment("test", [push(strength=GENTLE)], one_probe(vector(9), -1e6, 1, 0.0))
    assert "the gate opened for no prompt" in one(look(tiny_llama, tiny_tokenizer, never), "acts", "warning").said


def test_an_alignment_of_another_model(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    base = fingerprint(tiny_llama, tiny_tokenizer)
    alignment = Alignment("test", [push(strength=GENTLE)], base=base)
    other = make_tokenizer(CHATML + " ")
    assert "chat template" in one(look(tiny_llama, other, alignment), "fitted on", "fail").said
    assert "other weights" in one(look(tiny_model(seed=3), tiny_tokenizer, alignment), "fitted on", "fail").said
    changed = tiny_model(seed=3, num_attention_heads=2)
    findings = look(changed, other, alignment)  # each difference has a line of its own
    assert len([f for f in findings if f.check == "fitted on"]) == 3
    unsaid = replace(alignment, base={})
    assert "does not say" in one(look(tiny_llama, tiny_tokenizer, unsaid), "fitted on", "warning").said
    short = replace(alignment, edits=[HiddenEdit(torch.ones(7), 1, 1.0)])
    findings = look(tiny_llama, tiny_tokenizer, short)
    assert "hidden size" in one(findings, "edits", "fail").said
    assert not [f for f in findings if f.check == "acts"]


def test_number_formats(tiny_tokenizer: Any) -> None:
    alignment = Alignment("test", [push(strength=GENTLE)], base=fingerprint(tiny_model(), tiny_tokenizer))
    model = tiny_model().to(torch.bfloat16)
    findings = look(model, tiny_tokenizer, alignment)
    assert "fitted in float32 and runs in bfloat16" in one(findings, "dtype", "warning").said
    assert statuses(findings, "acts", "strength 0", "taking off") == {"ok"}
    one(look(tiny_model().to(torch.float16), tiny_tokenizer), "dtype", "warning")
    broken = tiny_model()
    broken.model.norm.weight.data[3] = float("nan")
    assert "undefined" in one(look(broken, tiny_tokenizer), "dtype", "fail").said


@pytest.mark.parametrize(
    ("template", "status", "words"),
    [
        (False, "warning", "there is none"),
        ("{{ '<s><s>' }}" + CHATML, "fail", "beginnings of sequence"),
        ("{{ messages[0]['content'] }}" + CHATML, "fail", "shows the prompt 2 times"),
        ("{{ 'Hello' }}", "fail", "shows the prompt 0 times"),
        (CHATML.replace("<|im_start|>", "<|start_header_id|>"), "fail", "no token here"),
    ],
)
def test_templates(template: bool | str, status: str, words: str, tiny_llama: Any) -> None:
    assert words in one(look(tiny_llama, make_tokenizer(template)), "chat template", status).said


def test_a_second_beginning_elsewhere_is_told(tiny_llama: Any) -> None:
    said = one(look(tiny_llama, make_tokenizer("{{ '<s>' }}" + CHATML)), "chat template", "ok").said
    assert "add_special_tokens=False" in said


def test_padding_that_is_read(tiny_tokenizer: Any) -> None:
    model = tiny_model()
    forward = model.forward

    def blind(*args: Any, attention_mask: Any = None, **more: Any) -> Any:
        return forward(*args, **more)

    model.forward = blind
    assert "left padding moves" in one(look(model, tiny_tokenizer), "padding", "fail").said


def test_ends_and_vocabulary(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    endless = copy.deepcopy(tiny_llama)
    endless.generation_config.eos_token_id = endless.config.eos_token_id = None
    bare = make_tokenizer("{% for m in messages %}{{ m['content'] }}.{% endfor %}")
    bare.eos_token = None
    assert "no token ends" in one(look(endless, bare), "end of turn", "fail").said
    told = copy.deepcopy(tiny_llama)
    told.generation_config.eos_token_id = [2, 5]
    one(look(told, tiny_tokenizer), "end of turn", "ok")
    small = tiny_model(vocab_size=300)
    assert "300 embeddings" in one(look(small, tiny_tokenizer), "vocabulary", "fail").said


def test_a_guide_of_another_vocabulary(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Any) -> None:
    other = make_tokenizer(True)
    other.add_tokens(["<new>"])
    tiny_model(seed=7, vocab_size=400).save_pretrained(tmp_path / "guide")
    other.save_pretrained(tmp_path / "guide")
    alignment = Alignment("test", [Guidance(CheckpointGuide(str(tmp_path / "guide")), 0.9)])
    assert "another vocabulary" in one(look(tiny_llama, tiny_tokenizer, alignment), "guide vocabulary", "fail").said


def test_divergence(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    nothing = look(tiny_llama, tiny_tokenizer, Alignment("test", [push(strength=1e-3)]))
    assert "another choice at 0%" in one(nothing, "divergence", "ok").said
    drowned = Alignment("test", [replace(push(2), vector=1000 * push().vector, scope=("all",))])
    findings = look(tiny_llama, tiny_tokenizer, drowned)
    assert "speaks over harmless talk" in one(findings, "divergence", "fail").said


@pytest.mark.parametrize(("broken", "status"), [(0, "ok"), (1, "warning"), (4, "fail")])
def test_broken_replies(
    broken: int, status: str, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, loop = (tiny_tokenizer(text)["input_ids"] for text in (SENTENCES[3], " cat" * 40))

    def replies(case: Any, prompts: list[str], alignment: Any) -> list[list[int]]:
        bad = broken if alignment is not None else 0
        return [loop] * bad + [sound] * (len(prompts) - bad)

    monkeypatch.setattr(checks_effects, "_replies", replies)
    findings = look(tiny_llama, tiny_tokenizer, Alignment("test", [push(strength=GENTLE)]))
    said = one(findings, "broken replies", status).said
    assert f"{broken} of 5 short replies are broken, 0 without" in said
    assert ("loop" in said) == (broken > 0)


def test_a_check_that_breaks_is_a_finding(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    model = copy.deepcopy(tiny_llama)

    def out_of_order(*args: Any, **more: Any) -> Any:
        raise RuntimeError("device-side assert")

    model.forward = out_of_order
    assert "device-side assert" in one(look(model, tiny_tokenizer), "padding", "fail").said


def test_prompts_are_of_the_tune_split(tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from postalign.data.sources import load_data
    from postalign.evaluation.doctor import _starter

    tune = {row.prompt: row.label for row in load_data("starter", split="tune")}
    for label in ("benign", "harmful"):
        prompts = _starter(label, 6, None)
        assert len(set(prompts)) == 6 and {tune[prompt] for prompt in prompts} == {label}
