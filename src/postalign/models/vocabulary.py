"""What makes two tokenizers the same: their chat template and their token-to-id map, hashed and compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template's text, `none` without a template."""
    template = tokenizer.chat_template
    if template is None:
        return "none"
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the token-to-id map, in the order of its tokens."""
    pairs = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()


def same_vocabulary(a: Any, b: Any) -> str | None:
    """None when two tokenizers map the same tokens to the same ids, else the first difference in words."""
    first, second = a.get_vocab(), b.get_vocab()
    if first == second:
        return None
    for token, i in sorted(first.items(), key=lambda pair: pair[1]):
        if token not in second:
            return f"token {token!r} (id {i}) is missing from the second vocabulary"
        if second[token] != i:
            return f"token {token!r} has id {i} in the first vocabulary and {second[token]} in the second"
    token, i = min((pair for pair in second.items() if pair[0] not in first), key=lambda pair: pair[1])
    return f"token {token!r} (id {i}) is missing from the first vocabulary"
