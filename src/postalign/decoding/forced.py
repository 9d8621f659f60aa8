"""The distribution that decoding would use, along a given reply: for perplexity, divergence and traces.

Knows which numbers are mixed, as stream.py does, and reads a whole reply in one pass; picks no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..edits import CheckpointGuide, Control, PromptGuide, union
from ..edits.edit import attach_all
from ..models.chat import Messages, encode, token_ids
from ..models.forward import accepted
from .branches import last_states
from .guides import guide_inputs, guide_model

RAW_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Forced:
    """What stands behind each token of one answer. Log-probabilities are float32 `[answer tokens, vocab]`.

    ids: the answer's `[answer tokens]`. own: of the model with the edits that are in it. guide: None where the row
    has none. mixed: what decoding draws from; `guided` of its first tokens are mixed with the guide's. score: what
    the gate made of the prompt (None without a gate), strength: what that came to.
    """

    ids: Tensor
    own: Tensor
    guide: Tensor | None
    mixed: Tensor
    guided: int
    strength: float
    score: float | None


def next_token_log_probs(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Messages | None],
    answers: Sequence[str | Sequence[int]],
    alignment: Alignment | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Teacher-forced log-probabilities of each answer's tokens under `model` with `alignment`.

    A prompt is put into the chat template; a prompt of None means plain text, whose first 16 tokens (with the beginning
    of sequence, where the tokenizer adds one) stand for the prompt: the gate reads the last of them, and a prompt guide
    has no other view of it. An answer is text or token ids, which are taken as they are. Returns, per pair, (float32
    log-probabilities `[answer tokens, vocab]`, the answer's ids `[answer tokens]`). One pass per pair and branch.
    """
    found = (forced_reply(model, tokenizer, p, a, alignment) for p, a in zip(prompts, answers, strict=True))
    return [(one.mixed, one.ids) for one in found]


def forced_reply(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Messages | None,
    answer: str | Sequence[int],
    alignment: Alignment | None = None,
) -> Forced:
    """What stands behind each token of `answer` to `prompt`; both as for `next_token_log_probs`."""
    device = next(model.parameters()).device
    head, tail = _split(tokenizer, prompt, answer, device)
    kind = alignment.guidance.guide if alignment is not None and alignment.guidance is not None else None
    guide = guide_model(kind, tokenizer, model) if isinstance(kind, CheckpointGuide) else None
    view = None
    if isinstance(kind, PromptGuide) and prompt is not None:
        view = [guide_inputs(kind, tokenizer, [prompt], device).input_ids[0]]
    return forced(model, [head], [tail], alignment, guide=guide, guide_heads=view)[0]


@torch.no_grad()
def forced(
    model: nn.Module,
    heads: Sequence[Tensor],
    tails: Sequence[Tensor],
    alignment: Alignment | None = None,
    *,
    guide: nn.Module | None = None,
    guide_heads: Sequence[Tensor] | None = None,
) -> list[Forced]:
    """The same of several answers at once: ids `tails` after prompts of ids `heads`, neither of them empty.

    guide: the model of a guide that has weights of its own. guide_heads: the prompts as the guide reads them, where it
    reads others. One pass per branch over all rows.
    """
    device = next(model.parameters()).device
    gate, guidance = (alignment.gate, alignment.guidance) if alignment else (None, None)
    strength, scores = torch.ones(len(heads), device=device), None
    if gate is not None:
        states = _last_states(model, heads, gate.layers)
        strength, scores = gate.strength(states).to(device), gate.scores(states).tolist()
    own = _along(model, heads, tails, alignment.hidden if alignment else [], strength)
    mixed, theirs = list(own), {}
    limit = guidance.tokens if guidance is not None else None
    if alignment is not None and guidance is not None and guidance.lam > 0:
        opened = strength.nonzero().flatten().tolist()
        views = heads if guide_heads is None else guide_heads
        shared = alignment.weights if guide is None else []  # patches are in the weights that such a guide reads too
        edits = [*shared, *guidance.guide.edits()]
        rows = [views[i] for i in opened], [tails[i] for i in opened]
        said = _along(guide or model, *rows, edits, torch.ones(len(opened), device=device)) if opened else []
        theirs = dict(zip(opened, said, strict=True))
        for i, b in theirs.items():
            a = own[i]
            width = min(a.shape[-1], b.shape[-1])  # padded embeddings may differ; the token maps do not
            a, lam = torch.log_softmax(a[:, :width], -1), guidance.lam * float(strength[i].abs())
            both = union(a[:limit], b[:limit, :width].to(a.device), lam)
            mixed[i] = torch.cat([both, a[len(both) :]])
    results = []
    for i, tail in enumerate(tails):
        guided = 0 if i not in theirs else len(tail) if limit is None else min(len(tail), limit)
        score = None if scores is None else scores[i]
        results.append(Forced(tail, own[i], theirs.get(i), mixed[i], guided, float(strength[i]), score))
    return results


def _split(
    tokenizer: Any, prompt: str | Messages | None, answer: str | Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    listed = token_ids(tokenizer, answer, beginning=prompt is None) if isinstance(answer, str) else list(answer)
    ids = torch.tensor(listed, dtype=torch.long, device=device)
    if prompt is None:
        return ids[:RAW_PROMPT_TOKENS], ids[RAW_PROMPT_TOKENS:]
    return encode(tokenizer, [prompt], device=device).input_ids[0], ids


def _last_states(model: nn.Module, heads: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
    """`[rows, blocks, hidden]`."""
    with last_states(model, layers) as states:
        model(**_inputs(model, heads, 1))
    return torch.stack(states, 1)


def _along(
    model: nn.Module, heads: Sequence[Tensor], tails: Sequence[Tensor], edits: Sequence[Any], strength: Tensor
) -> list[Tensor]:
    """Log-probabilities `[len(tail), vocab]` of what follows each head, with `edits` live at `strength` `[rows]`."""
    rows = [torch.cat(pair) for pair in zip(heads, tails, strict=True)]
    width, longest = max(map(len, rows)), max(map(len, tails))
    start = torch.tensor([width - len(tail) for tail in tails], device=strength.device)
    handles = attach_all(edits, model, Control(strength=strength, start=start))
    try:
        logits = model(**_inputs(model, rows, longest + 1)).logits[:, -longest - 1 : -1]
    finally:
        for handle in reversed(handles):
            handle.remove()
    return [torch.log_softmax(logits[i, longest - len(tail) :].float(), -1) for i, tail in enumerate(tails)]


def _inputs(model: nn.Module, rows: Sequence[Tensor], kept: int) -> dict[str, Any]:
    """A forward pass over left-padded rows, with logits for the last `kept` columns if the model can be told so."""
    width = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False, **accepted(model, logits_to_keep=kept)}
    if any(len(row) < width for row in rows):
        mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs |= {"attention_mask": mask, **accepted(model, position_ids=positions)}
    return inputs
