"""Tiny random models of many architectures and a tiny tokenizer, all built offline in milliseconds.

`from tests.tiny import KINDS, tiny_model, tiny_tokenizer`. Knows how to write small configs; knows nothing of
postalign. Weights are random but seeded, float32 and in eval mode; sizes are chosen so that mistakes show
(heads times head_dim may differ from hidden, key-value heads are fewer than heads where that is possible).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
SENTENCES = [
    "How do I bake a loaf of bread at home without a machine?",
    "I cannot help with that, but here is a safer way to reach the same end.",
    "Please explain how the moon moves the water of the sea.",
    "The quick brown fox jumps over the lazy dog while the cat sleeps.",
    "Sure, here is a short answer: first warm the oven, then wait for an hour.",
    "user assistant system You are a helpful assistant. Question: Answer:",
    "Sorry, I will not write that. Would you like a story in place of it?",
]
TOKENIZER_SIZE = 384


@functools.lru_cache(maxsize=1)
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    template: bool | str = True, *, add_bos: bool = True, pad: bool = True
) -> tf.PreTrainedTokenizerFast:
    """A fresh byte-level BPE tokenizer of 384 tokens with `<s>`, `</s>` and `<pad>`; lossless on any text.

    template: True for a ChatML-like chat template, False for none, or the Jinja text of another one.
    add_bos: whether the tokenizer itself puts `<s>` before a text (as Llama's does; SmolLM2's does not).
    pad: whether it has a pad token.
    """
    backend = Tokenizer.from_str(_backend())
    if add_bos:
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos]
        )
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **({"pad_token": "<pad>"} if pad else {}),
    )
    tokenizer.chat_template = CHATML if template is True else (template or None)
    return tokenizer


_COMMON: dict[str, Any] = {
    "vocab_size": TOKENIZER_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "layer_types": _ALTERNATING}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

_CONFIGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {}),
    "llama_wide": (
        tf.LlamaConfig,
        {"head_dim": 16},
    ),  # GQA, head_dim is not hidden / heads: 4 * 16 = 64, hidden 32
    "llama_bias": (tf.LlamaConfig, {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": (tf.Qwen2Config, {}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 16}),
    "mistral": (tf.MistralConfig, {"sliding_window": None, "head_dim": 8}),
    "gemma2": (tf.Gemma2Config, _GEMMA),
    "gemma3": (tf.Gemma3TextConfig, _GEMMA),
    "phi3": (tf.Phi3Config, {}),
    "gpt2": (tf.GPT2Config, {}),
    "gpt_neox": (tf.GPTNeoXConfig, {}),
    "mixtral": (tf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": (tf.Qwen2MoeConfig, {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 24}),
}
KINDS: list[str] = list(_CONFIGS)


def tiny_model(kind: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A random causal language model of architecture `kind` (see `KINDS`): hidden 32, 3 blocks, 4 heads.

    `overrides` are config keys (`num_hidden_layers=2`, `hidden_size=64`). Global random state is left alone.
    """
    make, extra = _CONFIGS[kind]
    config = make(**{**_COMMON, **extra, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.2)  # so that a bias counted where it must not be shows up
    model.generation_config.eos_token_id = config.eos_token_id
    return model.eval()


def inputs(model: Any, length: int = 9, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids without special tokens and a full mask: `input_ids`, `attention_mask` `[rows, length]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIALS), model.config.get_text_config().vocab_size, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


__all__ = ["CHATML", "KINDS", "SPECIALS", "inputs", "tiny_model", "tiny_tokenizer"]
