"""Exported models: plain transformers loads them, and they are to the bit what the live patch makes of the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from postalign.alignment import Alignment, fingerprint
from postalign.edits import Control, SparsePatch
from postalign.errors import PostalignError, UsageError
from postalign.integrations import disk_names
from postalign.integrations.export import export
from postalign.models.load import load_model
from postalign.models.shards import FolderWeights, Tensors
from tests.aligned import snapshot
from tests.decoding.twin import PROMPTS, guidance_of, merged, patch_for, push, splitting_gate
from tests.edits.test_sparse import bytes_of, sparse_for
from tests.tiny import KINDS, inputs, tiny_model, tiny_tokenizer


def saved(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """A tiny model's folder as it would come from the hub."""
    model = tiny_model(kind).to(dtype)
    model.save_pretrained(folder, **settings)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("as it is")
    (folder / "README.md").write_text("the base's own card")
    return folder


def fit_on(folder: Path, patches: Callable[[Any], list[Any]], dtype: str = "auto") -> Alignment:
    model, tokenizer = load_model(folder, dtype=dtype)
    return Alignment(
        "safepatching",
        patches(model),
        config={"alpha": 0.5, "modules": "blocks"},
        base=fingerprint(model, tokenizer),
        provenance={"data": {"hash": "abc123"}, "seed": 7},
        info={"refusal": {"base": 0.25, "patched": 0.9}},
    )


def patched(folder: Path, alignment: Alignment, dtype: str = "auto") -> Any:
    """The base loaded by us with the alignment written into it."""
    model, _ = load_model(folder, dtype=dtype)
    for edit in alignment.weights:
        edit.attach(model, Control())
    return model


@pytest.fixture
def streamed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("this checkpoint can be streamed")

    monkeypatch.setattr("postalign.integrations.export._export_loaded", never)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
@pytest.mark.usefixtures("streamed_only")
def test_transformers_loads_what_the_live_patch_makes(kind: str, shard: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", kind, max_shard_size=shard)
    alignment = fit_on(base, lambda model: [sparse_for(model, share=0.3), sparse_for(model, seed=1)])
    alignment.save_pretrained(tmp_path / "alignment")
    lazy = Alignment.from_pretrained(tmp_path / "alignment", lazy=True)
    facts = export(lazy, base, to="model", out=tmp_path / "out", shard_bytes=30_000)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    theirs, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = patched(base, alignment)
    assert bytes_of(theirs) == bytes_of(ours) != bytes_of(load_model(base, dtype="auto")[0])
    assert theirs.dtype == torch.bfloat16 and facts["changed"] == sum(p.changed for p in alignment.weights)
    assert set(FolderWeights(tmp_path / "out").names()) == set(FolderWeights(base).names())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    text = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert text == tiny_tokenizer().apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_all_else_is_copied_and_there_is_a_card(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    alignment = fit_on(base, lambda model: [sparse_for(model)])
    (base / "pytorch_model.bin").write_bytes(b"old")
    export(alignment, base, to="model", out=tmp_path / "out")
    old, new = snapshot(base), snapshot(tmp_path / "out")
    assert set(new) == set(old) - {"pytorch_model.bin"}
    changed = {name for name in new if old[name] != new[name]}
    assert changed == {"model.safetensors", "README.md"} and "generation_config.json" in new
    card = new["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and "safepatching" in head["tags"]
    for words in (
        "| alpha | 0.5 |",
        "| data.hash | abc123 |",
        "| refusal.patched | 0.9 |",
        "# A safer version of base",
    ):
        assert words in card
    assert str(tmp_path) not in card and "base_model" not in head
    assert str(alignment.weights[0].changed) in card and alignment.base["weights"] in card


def test_weights_without_a_change_keep_their_bytes(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "gpt2")
    name = "transformer.h.1.mlp.c_fc.weight"
    patch = SparsePatch({name: (torch.tensor([7]).int(), torch.tensor([0.5]).half())}, {name: (32, 128)})
    export(fit_on(base, lambda model: [patch]), base, to="model", out=tmp_path / "out")
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    differ = {n: (old[n].view(torch.int16) != new[n].view(torch.int16)).sum().item() for n in old}
    assert {n: count for n, count in differ.items() if count} == {name: 1}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_cast_before_the_patch(dtype: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama_bias")
    alignment = fit_on(base, lambda model: [sparse_for(model, share=0.3)])
    export(alignment, base, to="model", out=tmp_path / "out", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == getattr(torch, dtype)
    assert bytes_of(theirs) == bytes_of(patched(base, alignment, dtype))


@pytest.mark.usefixtures("streamed_only")
def test_names_with_another_prefix_and_copies_of_tied_weights(tmp_path: Path) -> None:
    """GPT-2's own checkpoint leaves `transformer.` out; some keep the output head beside the embeddings it is."""
    base = saved(tmp_path / "base", "gpt2")
    alignment = fit_on(base, lambda model: [sparse_for(model, share=0.3)])
    expected = bytes_of(patched(base, alignment))
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    export(alignment, base, to="model", out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(short) and torch.equal(found["lm_head.weight"], found["wte.weight"])
    assert not torch.equal(found["wte.weight"], short["wte.weight"])
    assert bytes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == expected


@pytest.mark.usefixtures("streamed_only")
def test_a_tied_weight_may_go_by_its_other_name(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama_bias")
    patch = SparsePatch(
        {"lm_head.weight": (torch.tensor([3]).int(), torch.tensor([0.5]).half())}, {"lm_head.weight": (384, 32)}
    )
    export(fit_on(base, lambda model: [patch]), base, to="model", out=tmp_path / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["model.embed_tokens.weight"]


def test_a_checkpoint_that_must_be_put_together_is_merged_in_memory(tmp_path: Path, monkeypatch: Any) -> None:
    base = saved(tmp_path / "base", "mixtral")
    alignment = fit_on(base, lambda model: [sparse_for(model, share=0.3)])

    def needs_partners(*args: Any) -> Any:
        raise disk_names.Unmapped("x")

    monkeypatch.setattr("postalign.integrations.export.disk_changes", needs_partners)
    export(alignment, base, to="model", out=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bytes_of(theirs) == bytes_of(patched(base, alignment)) and theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_low_rank_patch_is_merged(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", kind, torch.float32)
    alignment = fit_on(base, lambda model: [patch_for(model)])
    export(alignment, base, to="model", out=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    given = inputs(theirs)
    with torch.no_grad():
        expected = merged(tiny_model(kind), patch_for(tiny_model(kind)))(**given).logits
        torch.testing.assert_close(theirs(**given).logits, expected, rtol=1e-4, atol=1e-4)


# the base


def test_another_base_is_refused_before_anything_is_there(tmp_path: Path) -> None:
    base, other = saved(tmp_path / "base"), saved(tmp_path / "other")
    alignment = fit_on(base, lambda model: [sparse_for(model)])
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.02
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PostalignError, match="other weights"):
        export(alignment, other, to="model", out=tmp_path / "out")
    tiny_tokenizer(False).save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    for to in ("model", "peft"):
        with pytest.raises(PostalignError, match="another chat template"):
            export(alignment, base, to=to, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "other"]


@pytest.mark.parametrize("kind", ["llama_bias", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("fitted", ["bfloat16", "float32", "float16"])
def test_the_base_is_known_by_its_weights_in_whatever_dtype_it_was_loaded(
    kind: str, fitted: str, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", kind)
    tensors = load_file(base / "model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[::5] *= 1e-6  # float16 has these in fewer digits than bfloat16
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    alignment = fit_on(base, lambda model: [sparse_for(model)], dtype=fitted)
    export(alignment, base, to="model", out=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bytes_of(theirs) == bytes_of(patched(base, alignment, "bfloat16"))


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    alignment = fit_on(base, lambda model: [sparse_for(model)])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(PostalignError, match=r"quantised \(awq\)"):
        export(alignment, base, to="model", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_built_in_is_exported_as_it_was_fitted(tmp_path: Path, monkeypatch: Any) -> None:
    def load(name: str, *, dtype: Any, **options: Any) -> Any:
        assert name == "smollm2"
        return tiny_model("llama_bias").to(getattr(torch, dtype) if isinstance(dtype, str) else dtype), tiny_tokenizer()

    monkeypatch.setattr("postalign.integrations.export.load_model", load)
    model, tokenizer = load("smollm2", dtype="bfloat16")
    model.postalign_name = "smollm2"
    alignment = Alignment("t", [sparse_for(model), patch_for(model)], base=fingerprint(model, tokenizer))
    export(alignment, to="model", out=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad(), alignment.applied(model):
        expected = model(**inputs(model)).logits
    found = theirs(**inputs(theirs)).logits
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.25)  # bfloat16 rounds by processor
    assert float((found - expected).abs().mean()) < 0.03
    export(alignment.only("weights"), to="model", out=tmp_path / "exact")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    with alignment.only("weights").applied(model):
        assert bytes_of(theirs) == bytes_of(model)
    assert "HuggingFaceTB" in (tmp_path / "exact" / "README.md").read_text()


# what cannot be carried, and where it may go


def test_parts_that_weights_cannot_carry(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    gate = splitting_gate(tiny_llama, tiny_tokenizer, PROMPTS)
    unsafe = SparsePatch(sparse_for(tiny_llama).entries, sparse_for(tiny_llama).shapes, unsafe=True)
    cases = {
        "hidden states": Alignment("t", [sparse_for(tiny_llama), push()]),
        "guidance": Alignment("t", [guidance_of("vector", tiny_llama)]),
        "a gate": Alignment("t", [patch_for(tiny_llama)], gate),
        "unsafe": Alignment("t", [unsafe]),
        "nothing to export": Alignment("t", []),
    }
    for words, alignment in cases.items():
        for to in ("model", "peft"):
            with pytest.raises(UsageError, match=words) as caught:
                export(alignment, "smollm2", to=to, out=tmp_path / "out")
            assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="name the base model"):
        export(Alignment("t", [sparse_for(tiny_llama)]), to="model", out=tmp_path / "out")
    with pytest.raises(UsageError, match="cannot export to 'gguf'"):
        export(Alignment("t", []), to="gguf", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_something(tmp_path: Path) -> None:
    base = saved(tmp_path / "models" / "base")
    alignment = fit_on(base, lambda model: [sparse_for(model)])
    for out in (base, tmp_path / "models"):
        for force in (False, True):
            with pytest.raises(UsageError, match="holds the base model itself"):
                export(alignment, base, to="model", out=out, force=force)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match="not empty: choose"):
            export(alignment, base, to="model", out=notes, force=force)
    out = tmp_path / "out"
    export(alignment, base, to="model", out=out)
    first = snapshot(out)
    with pytest.raises(UsageError, match="--force"):
        export(alignment, base, to="model", out=out)
    (out / "stale.txt").write_text("x")
    export(alignment, base, to="model", out=out, force=True)
    assert snapshot(out) == first


# adapters


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_a_sparse_patch(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base", kind, dtype)
    alignment = fit_on(base, lambda model: [linears_only(sparse_for(model, torch.bfloat16))])
    facts = export(alignment, base, to="peft", out=tmp_path / "out")
    assert facts["format"] == "SHIRA"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    ours = patched(base, alignment)
    given = inputs(ours)
    with torch.no_grad():
        assert torch.equal(theirs(**given).logits, ours(**given).logits)
        assert not torch.equal(ours(**given).logits, load_model(base, dtype="auto")[0](**given).logits)
    assert bytes_of(theirs.merge_and_unload()) == bytes_of(ours)


def linears_only(patch: SparsePatch) -> SparsePatch:
    """Of the blocks; one tensor has fewer changes than the others, one none."""
    names = [n for n in patch.shapes if n.endswith("_proj.weight") and ".2.mlp.up" not in n]
    entries = {n: patch.entries[n] for n in names}
    few = "model.layers.1.mlp.down_proj.weight"
    entries[few] = tuple(part[:1] for part in entries[few])  # type: ignore[assignment]
    return SparsePatch(entries, {n: patch.shapes[n] for n in names})


def test_peft_loads_a_low_rank_patch(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base", "llama", torch.float32)
    alignment = fit_on(base, lambda model: [patch_for(model)])
    assert export(alignment, base, to="peft", out=tmp_path / "out")["format"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    model, _ = load_model(base, dtype="auto")
    with torch.no_grad(), alignment.applied(model):
        torch.testing.assert_close(theirs(**inputs(model)).logits, model(**inputs(model)).logits, rtol=1e-5, atol=1e-5)


def test_patches_that_no_adapter_holds(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    norm, q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
    k = "model.layers.0.self_attn.k_proj.weight"

    def some(**counts: int) -> Any:
        def make(model: Any) -> list[SparsePatch]:
            names = {"norm": norm, "q": q, "k": k, "embed": "model.embed_tokens.weight"}
            entries = {names[n]: (torch.arange(c).int(), torch.ones(c).half()) for n, c in counts.items()}
            return [SparsePatch(entries, {n: tuple(model.get_parameter(n).shape) for n in entries})]

        return make

    cases: dict[str, Any] = {
        "several": lambda model: some(q=1)(model) * 2,
        "not model.norm": some(q=1, norm=1),
        "not model.embed": some(embed=4),
        "more than model.layers.0.self_attn.k_proj": some(q=800, k=1),
    }
    for words, patches in cases.items():
        with pytest.raises(UsageError, match=words.replace(".", r"\.")) as caught:
            export(fit_on(base, patches), base, to="peft", out=tmp_path / "out")
        assert "--to model" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_exported_folder_reads_as_weights(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama_bias")
    alignment = fit_on(base, lambda model: [sparse_for(model)])
    export(alignment, base, to="model", out=tmp_path / "out")
    old, new = Tensors(FolderWeights(base)), Tensors(FolderWeights(tmp_path / "out"))
    for name in old:
        assert torch.equal(alignment.weights[0].merge(name, old[name]), new[name])
