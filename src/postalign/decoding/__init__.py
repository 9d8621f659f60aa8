"""Decoding under an alignment: one engine for `pa.generate`, transformers' `custom_generate` and the command line."""

from .forced import Forced, forced, forced_reply, next_token_log_probs
from .replies import Reply, as_completed, check_prompts, generate, generate_replies

__all__ = [
    "Forced",
    "Reply",
    "as_completed",
    "check_prompts",
    "forced",
    "forced_reply",
    "generate",
    "generate_replies",
    "next_token_log_probs",
]
