"""Checks of what comes of an alignment: divergence on harmless prompts, broken replies, what a token costs.

Knows replies and passes; knows nothing of how an edit is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..alignment import Alignment
from ..decoding import forced_reply, generate_replies
from ..decoding.stream import Stream
from ..models.anatomy import anatomy
from .doctor import Case, Finding
from .dose import inputs_for
from .repetition import degenerate_reason
from .statistics import mean_per_token

REPLY_TOKENS = 48
NOTABLE = 0.1  # nats per token
MOST_CHANGED = 0.5  # of the tokens
UNANIMOUS = 1e-3
STEPS = 4


def divergence(case: Case) -> Iterator[Finding]:
    """KL(base || aligned) along the base model's replies to harmless prompts, and how often the choice changes."""
    sums, counts, changed = [], [], 0
    for prompt, reply in zip(case.harmless, _replies(case, case.harmless, None), strict=True):
        p = forced_reply(case.model, case.tokenizer, prompt, reply).mixed
        q = forced_reply(case.model, case.tokenizer, prompt, reply, case.alignment).mixed
        width = min(p.shape[-1], q.shape[-1])
        p, q = p[:, :width], q[:, :width].to(p.device)
        sums.append(float((p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0).sum()))
        counts.append(len(p))
        changed += int((p.argmax(-1) != q.argmax(-1)).sum())
    if not sum(counts):
        yield Finding("divergence", "warning", "the model says nothing to harmless prompts: not measured.")
        return
    mean, low, high = mean_per_token(sums, counts)
    share = changed / sum(counts)
    said = f"KL {mean:.3g} ({low:.3g} to {high:.3g}) nats per token on {len(counts)} harmless prompts"
    said += f", another choice at {share:.0%} of {sum(counts)} tokens"
    if not share <= MOST_CHANGED:
        yield Finding("divergence", "fail", f"{said}: it speaks over harmless talk, {_cure(case)}.")
    elif not mean < NOTABLE:
        yield Finding("divergence", "warning", f"{said}: {_cure(case)}.")
    else:
        yield Finding("divergence", "ok", said)


def _cure(case: Case) -> str:
    """What there is to turn down."""
    if case.alignment is not None and case.alignment.weights:
        return "lower the patch's alpha or beta"
    return "lower the strength or lambda, or fit a gate"


def degeneration(case: Case) -> Iterator[Finding]:
    """Replies that loop or fall apart, with the alignment and without."""
    before = _broken(case, None)
    count = len(case.prompts)
    if case.alignment is None:
        said = f"{len(before)} of {count} short replies are broken"
        if 2 * len(before) >= count:
            yield Finding("broken replies", "fail", f"{said} ({before[0]}): check the template and the weights.")
        else:
            yield Finding("broken replies", "ok", said)
        return
    after = _broken(case, case.alignment)
    said = f"{len(after)} of {count} short replies are broken, {len(before)} without the alignment"
    if len(after) <= len(before):
        yield Finding("broken replies", "ok", said)
    else:
        bad = len(after) - len(before) >= count / 4
        cure = f" ({after[0]}): {_cure(case)}."
        yield Finding("broken replies", "fail" if bad else "warning", said + cure)


def _broken(case: Case, alignment: Alignment | None) -> list[str]:
    """Why replies are broken, one line for each that is."""
    texts = [case.tokenizer.decode(ids, skip_special_tokens=True) for ids in _replies(case, case.prompts, alignment)]
    return [reason for text in texts if (reason := degenerate_reason(text)) is not None]


def _replies(case: Case, prompts: list[str], alignment: Alignment | None) -> list[list[int]]:
    """Short greedy replies as token ids; each is made once."""
    made = case.replies.setdefault(alignment is not None, {})
    asked = [prompt for prompt in dict.fromkeys(prompts) if prompt not in made]
    if asked:
        settings: dict[str, Any] = {"alignment": alignment, "max_new_tokens": REPLY_TOKENS}
        found = generate_replies(case.model, case.tokenizer, asked, **settings)
        made.update({prompt: reply.token_ids for prompt, reply in zip(asked, found, strict=True)})
    return [made[prompt] for prompt in prompts]


@torch.no_grad()
def decoding(case: Case) -> Iterator[Finding]:
    """Step by step with caches, the distribution is that of one pass over the reply; a guide has its own opinion."""
    apart, opinions = 0.0, []
    replies = _replies(case, case.prompts, case.alignment)
    for prompt, ids in ((prompt, reply[:STEPS]) for prompt, reply in zip(case.prompts, replies, strict=True) if reply):
        whole = forced_reply(case.model, case.tokenizer, prompt, ids, case.alignment)
        batch, theirs = inputs_for(case, case.alignment, [prompt])
        with Stream(case.model, case.alignment, case.guide) as stream:
            steps = [stream.first(batch, theirs)]
            steps += [stream.next(torch.tensor([token], device=steps[0].device)) for token in ids[:-1]]
        width = min(steps[0].shape[-1], whole.mixed.shape[-1])
        both = torch.cat([step[:, :width] for step in steps]), whole.mixed[:, :width].to(steps[0].device)
        apart = max(apart, float((both[0].exp() - both[1].exp()).abs().max()))
        if whole.guided and whole.guide is not None:
            p, q = whole.own[: whole.guided, :width], whole.guide[: whole.guided, :width].to(whole.own.device)
            opinions.append(float((p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0).sum(-1).mean()))
    allowed = 1e-3 if case.model.dtype == torch.float32 else 0.15
    if not apart <= allowed:
        said = f"step by step, probabilities are up to {apart:.2f} off those of one pass over the reply"
        yield Finding("decoding", "fail", f"{said}: load with attn_implementation='eager', and report a bug.")
    else:
        yield Finding("decoding", "ok", f"step by step as in one pass over the reply (to {max(apart, 1e-6):.0e})")
    if opinions:
        mean = sum(opinions) / len(opinions)
        said = f"the guide is {mean:.3g} nats per token away from the model where it is asked"
        if mean < UNANIMOUS:
            yield Finding("guide", "warning", f"{said}: it costs passes and changes nothing, fit it again.")
        else:
            yield Finding("guide", "ok", said)


@torch.no_grad()
def cost(case: Case) -> Iterator[Finding]:
    """Passes per generated token where the guide is asked, counted block by block, against the model's own one."""
    alignment = case.alignment
    guidance = alignment.guidance if alignment is not None else None
    if alignment is None or guidance is None or guidance.lam == 0:
        return
    edits = [replace(guidance, tokens=None) if edit is guidance else edit for edit in alignment.edits]
    always = replace(alignment, gate=None, edits=edits)
    base, aligned = _passes(case, None), _passes(case, always)
    said = f"{aligned / base:.2f} passes per token"
    if guidance.tokens is not None:
        said += f" for the first {guidance.tokens} of a reply"
    if alignment.gate is not None:
        said += ", where the gate opens"
    if aligned <= base:
        said = "no more passes than without it: the guide is not asked; load the model anew, and report a bug."
        yield Finding("guide cost", "fail", said)
    else:
        yield Finding("guide cost", "ok", f"{said}, against 1.00 without")


def _passes(case: Case, alignment: Alignment | None) -> float:
    """Passes through the model per row and token of decoding; a guide of its own counts by its blocks' weights."""
    work = [0.0]
    handles = []
    models = [case.model] if case.guide is None else [case.model, case.guide]
    whole = sum(p.numel() for p in anatomy(case.model).blocks[0].parameters()) * anatomy(case.model).n_layers
    for model in models:
        for block in anatomy(model).blocks:
            weight = sum(p.numel() for p in block.parameters()) / whole
            handles.append(block.register_forward_hook(_counter(work, weight)))
    try:
        batch, theirs = inputs_for(case, alignment, case.prompts)
        with Stream(case.model, alignment, case.guide if alignment is not None else None) as stream:
            tokens = stream.first(batch, theirs).argmax(-1)
            work[0] = 0.0
            for _ in range(STEPS):
                tokens = stream.next(tokens).argmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    return work[0] / STEPS / len(case.prompts)


def _counter(work: list[float], weight: float) -> Any:
    def count(module: nn.Module, args: tuple, output: Any) -> None:
        out = output if isinstance(output, torch.Tensor) else output[0]
        work[0] += weight * out.shape[0] * out.shape[1]

    return count


BASE_CHECKS = [("decoding", decoding), ("broken replies", degeneration)]
CHECKS = [
    ("decoding", decoding),
    ("guide cost", cost),
    ("divergence", divergence),
    ("broken replies", degeneration),
]
