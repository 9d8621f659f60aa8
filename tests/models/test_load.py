"""Loading by name: what comes out, and one line for everything that cannot be loaded. No network."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as tf
from transformers.utils import logging

from postalign.errors import PostalignError, UsageError
from postalign.models import gguf, load_model, load_tokenizer
from postalign.models import locate as locating
from postalign.models.locate import locate
from tests.tiny import inputs, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTALIGN_CACHE", str(tmp_path / "cache"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def fails(name: Any, *parts: str, **options: Any) -> PostalignError:
    with pytest.raises(PostalignError) as caught:
        load_model(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return caught.value


def test_a_folder_gives_model_and_tokenizer_ready_for_batches(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == tokenizer.eos_token  # it had none
    assert tokenizer.model_max_length == 512
    batch = inputs(model)
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, tiny_model()(**batch).logits, atol=1e-5)
    other = load_tokenizer(str(folder))
    assert (other.padding_side, other.pad_token, other.model_max_length) == ("left", "</s>", 512)


def test_a_pad_token_that_is_there_stays(folder: Path) -> None:
    tiny_tokenizer(pad=True).save_pretrained(folder)
    assert load_model(folder)[1].pad_token == "<pad>"


def test_a_tokenizer_without_any_end_still_gets_a_pad_token(folder: Path) -> None:
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token_id is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16, "torch.bfloat16"])
def test_dtypes_by_name(folder: Path, dtype: Any) -> None:
    assert load_model(folder, dtype=dtype)[0].dtype == torch.bfloat16


def test_a_dtype_that_is_none(folder: Path) -> None:
    assert isinstance(fails(folder, "Did you mean 'bfloat16'?", dtype="bfloat"), UsageError)
    fails(folder, "'int8'", dtype="int8")


def test_loading_is_silent_and_leaves_the_switches_alone(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    fails(folder / "absent", "no such model folder")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_names_that_are_nothing(tmp_path: Path, folder: Path) -> None:
    assert isinstance(fails(folder.parent / "tinny", "no such model folder", "Did you mean 'tiny'?"), UsageError)
    fails("smolm2", "Did you mean 'smollm2'?", "cannot be reached")
    fails("some/model", "cannot be reached")
    fails(tmp_path / "absent.gguf", "no such file")
    (tmp_path / "file.bin").write_bytes(b"")
    fails(tmp_path / "file.bin", "is a file")
    (tmp_path / "bad.gguf").write_bytes(b"not one")
    fails(tmp_path / "bad.gguf", "is not a GGUF file")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 9)
    fails(tmp_path / "torn.gguf", "torn.gguf")
    fails("smollm2", "built in", revision="main")


def test_a_hub_model_in_the_local_cache_needs_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(folder / "config.json"))
    assert locate("some/model", None, None) == ("some/model", {"local_files_only": True})
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    assert locate("some/model", None, None) == ("some/model", {})


def test_a_hub_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locating, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: time.sleep(30))
    fails("some/model", "cannot be reached")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("GatedRepoError", "gated"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("RepositoryNotFoundError", "no model 'some/model'"),
        ("RemoteEntryNotFoundError", "no config.json"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, name: str, part: str) -> None:
    kind = getattr(huggingface_hub.errors, name)

    def refuse(*_: Any, **__: Any) -> Any:
        raise kind.__new__(kind)  # its constructor wants a whole response

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    fails("some/model", part, revision="v9")


def test_folders_that_hold_no_model(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no config.json", "save_pretrained")
    (tmp_path / "empty" / "model.gguf").write_bytes(b"")
    fails(tmp_path / "empty", "give the file", "model.gguf")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    fails(tmp_path / "adapter", "is an adapter")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    fails(folder, "holds no weights")
    (folder / "model.safetensors").write_bytes(weights[:-1000])
    fails(folder, "could not load")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{", encoding="utf-8")
    fails(folder, "config.json cannot be read")


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fails(folder, "incomplete", "1 tensors", "model.layers.1.mlp.up_proj.weight")


def test_other_kinds_of_models_are_refused(tmp_path: Path, folder: Path) -> None:
    config = tf.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    tf.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert isinstance(fails(tmp_path / "bert", "BertForMaskedLM", "not a causal"), UsageError)
    config = tf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    fails(tmp_path / "t5", "not a causal")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "llamma"}), encoding="utf-8")
    fails(folder, "could not load")


def test_code_of_a_stranger_needs_consent(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    fails(folder, "trust_remote_code=True")


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    fails(folder, "no tokenizer")


# GGUF files


def write_gguf(path: Path, pre: str = "smollm") -> Any:
    """A tiny Llama in float32 with the tiny tokenizer; the model that must come out again."""
    writer_of = pytest.importorskip("gguf")
    model = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    config, tensors = model.config, model.state_dict()
    vocabulary = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    writer = writer_of.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for ours, theirs in names.items():
        tensor = tensors[f"{ours}.weight"]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-1])
        if heads:  # the format keeps the rotary halves interleaved
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{theirs}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_becomes_a_plain_model_that_can_be_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    original = write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    model, tokenizer = load_model(tmp_path / "tiny.gguf")
    assert capfd.readouterr() == ("", "")
    batch = inputs(original)
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, original(**batch).logits, atol=1e-5)
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token is not None
    assert tokenizer.model_max_length == 512
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert load_model(str(tmp_path / "tiny.gguf"), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_digits_are_split_where_the_file_asks_for_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    assert gguf.gguf_text(tmp_path / "a.gguf", "tokenizer.ggml.pre") == "smollm"
    assert gguf.gguf_text(tmp_path / "a.gguf", "tokenizer.ggml.absent") is None
    pieces = load_tokenizer(tmp_path / "a.gguf").backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]
    write_gguf(tmp_path / "b.gguf", pre="default")
    pieces = load_tokenizer(tmp_path / "b.gguf").backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "Ġ12"]


def test_gguf_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF and more")

    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", missing)
    fails(tmp_path / "a.gguf", "pip install 'postalign[gguf]'")


def test_importing_the_package_needs_no_heavy_library() -> None:
    import subprocess

    code = "import sys, postalign.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
