"""Decoding under an alignment: one engine for `pa.generate`, transformers' `custom_generate` and the command line."""

from .engine import Reply, generate, generate_replies
from .forced import next_token_log_probs

__all__ = ["Reply", "generate", "generate_replies", "next_token_log_probs"]
