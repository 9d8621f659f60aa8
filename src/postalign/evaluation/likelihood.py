"""What an alignment does to ordinary text: perplexity, and divergence from the base model.

Both are read from the alignment's own next-token distribution, step by step as in decoding (gate and guidance
act), over text that is given and not generated. Knows nothing of suites, judges or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .statistics import mean_per_token

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..alignment import Alignment

Progress = Callable[[int], None] | None
Estimate = tuple[float, float, float]


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    alignment: Alignment | None = None,
    *,
    on_progress: Progress = None,
) -> Estimate:
    """Perplexity per token of plain `texts`: (value, low, high), a 95 % interval over texts.

    Each text is raw, without the chat template; its first tokens stand for the prompt (the gate, where there
    is one, reads the last of them) and are not scored. Natural logarithm; texts weigh by their tokens. Raises
    UsageError when no text is longer than that.
    """
    return perplexity_of(text_losses(model, tokenizer, texts, alignment, on_progress=on_progress))


def text_losses(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    alignment: Alignment | None = None,
    *,
    on_progress: Progress = None,
) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, tokens scored) of each text, as for `perplexity`."""
    losses = []
    for scores, ids in _log_probs(model, tokenizer, [(None, text) for text in texts], alignment, on_progress):
        losses.append((-float(scores.gather(1, ids.unsqueeze(1)).sum()) if len(ids) else 0.0, len(ids)))
    return losses


def perplexity_of(losses: Sequence[Sequence[float]]) -> Estimate:
    """Perplexity per token from what `text_losses` gives."""
    scored = [(loss, count) for loss, count in losses if count]
    if not scored:
        raise UsageError("the texts for perplexity are too short: give paragraphs of some sentences.")
    mean, low, high = mean_per_token([loss for loss, _ in scored], [count for _, count in scored])
    return _exp(mean), _exp(low), _exp(high)


def kl_from_base(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    replies: Sequence[str],
    alignment: Alignment,
    *,
    on_progress: Progress = None,
) -> Estimate:
    """Mean KL(base || aligned) per token, in nats, over the base model's own `replies` to `prompts`: (value,
    low, high).

    prompts: as for `generate` (a string or chat messages); replies: what the base model said. Empty replies
    are left out. Raises UsageError when nothing is left.
    """
    pairs = [(p, r) for p, r in zip(prompts, replies, strict=True) if r.strip()]
    if not pairs:
        raise UsageError("no base replies to measure the divergence on: give prompts that the base model answers.")
    sums, counts = [], []
    base, aligned = (
        _log_probs(model, tokenizer, pairs, None),
        _log_probs(model, tokenizer, pairs, alignment, on_progress),
    )
    for (p, _), (q, _) in zip(base, aligned, strict=True):
        width = min(p.shape[-1], q.shape[-1])  # a guide may lack the padding of the embedding
        p, q = p[:, :width], q[:, :width]
        terms = (p.exp() * (p - q)).masked_fill(p == -math.inf, 0.0)  # 0 log 0 = 0
        sums.append(float(terms.sum()))
        counts.append(len(p))
    return mean_per_token(sums, counts)


def _log_probs(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[Any, str]],
    alignment: Alignment | None,
    on_progress: Progress = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(float32 `[answer tokens, vocabulary]`, answer ids) for each (prompt, answer), one at a time: they are
    large.
    """
    score = _scorer()
    for done, (prompt, answer) in enumerate(pairs, 1):
        yield score(model, tokenizer, [prompt], [answer], alignment=alignment)[0]
        if on_progress is not None:
            on_progress(done)


def _scorer() -> Callable[..., Any]:
    """Met when first needed: importing postalign stays quick, and tests can stand in for it."""
    from ..decoding.forced import next_token_log_probs

    return next_token_log_probs


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
