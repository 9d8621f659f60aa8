"""GGUF files as ordinary models: every weight unpacked to a dense tensor, the tokenizer rebuilt from the
file.

Knows what transformers does to a GGUF file and where it stops short; knows nothing of where files come from.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import struct
from pathlib import Path
from typing import Any

from ..errors import PostalignError

STRING = 8  # GGUF's type number of a string
INSTALL = "reading GGUF files needs one more package: pip install 'postalign[gguf]'."


def load_gguf(path: Path, *, dtype: Any, device_map: Any = None) -> Any:
    """The model in `path`, dequantised to `dtype` (a torch dtype), ready to be saved as safetensors.

    Raises PostalignError when the `gguf` package is missing; the loader's own errors otherwise.
    """
    import transformers

    more = {"device_map": device_map} if device_map is not None else {}
    if hasattr(transformers, "GgufConfig"):  # else newer releases may keep the weights packed, on some devices
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no switch
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, **more
            )
    except ImportError as error:
        raise PostalignError(INSTALL) from error
    return plain(model)


def plain(model: Any) -> Any:
    """Drop the quantisation entry of a model whose weights are dense: transformers refuses to save it
    otherwise.
    """
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer that `path` describes. Raises PostalignError when the `gguf` package is missing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except ImportError as error:
        raise PostalignError(INSTALL) from error
    if gguf_text(path, "tokenizer.ggml.pre") == "smollm":
        split_digits(tokenizer)
    return tokenizer


def split_digits(tokenizer: Any) -> None:
    """Cut every digit off before the byte-level split, as SmolLM2's own tokenizer does and transformers' copy
    does not.

    Without it a line break or a run of blanks before a number (every numbered list) gets other token ids.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def gguf_text(path: Path, key: str) -> str | None:
    """A text entry of a GGUF file's header, or None; read without parsing the rest."""
    name = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", STRING)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(name)
        if at < 0:
            return None
        at += len(name)
        (length,) = struct.unpack("<Q", data[at : at + 8])
        return data[at + 8 : at + 8 + min(length, 1 << 20)].decode("utf-8", "replace")
