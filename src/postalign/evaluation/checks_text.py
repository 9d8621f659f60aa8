"""Checks of a model's text: number format, chat template, padding, ends of turns, vocabulary.

Knows tokenizers and one forward pass; knows nothing of what edits do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import PostalignError
from ..models.chat import encode, end_of_turn, eos_ids, pad_id, spans
from ..models.fingerprint import fingerprint
from ..models.forward import accepted
from ..models.templates import render
from .doctor import Case, Finding

_SIGNS = re.compile(r"<\|[^<>|\s]+\|>|<(?:start|end)_of_turn>")  # how templates write special tokens
ASKED = "Which sea is the saltiest?"


def dtype(case: Case) -> Iterator[Finding]:
    """Which number format the weights have, whether all are numbers, and what the alignment was fitted in."""
    numbers = [p for p in case.model.parameters() if p.is_floating_point() and not p.is_meta]
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in numbers})
    count = sum(p.numel() for p in case.model.parameters())
    broken = sum(not bool(torch.isfinite(p).all()) for p in numbers)
    said = f"{' and '.join(kinds)}, {count / 1e6:.1f} million weights on {next(case.model.parameters()).device.type}"
    if broken:
        said = f"{broken} tensors hold infinite or undefined numbers: load the model anew, in float32 or bfloat16."
        yield Finding("dtype", "fail", said)
    elif "float16" in kinds and numbers[0].device.type == "cpu":
        yield Finding("dtype", "warning", f"{said}: slow and easily infinite there, load with --dtype float32.")
    else:
        yield Finding("dtype", "ok", said)
    fitted = case.alignment.base.get("dtype") if case.alignment is not None else None
    here = str(getattr(case.model, "dtype", ""))
    if fitted and here and fitted != here:
        names = fitted.removeprefix("torch."), here.removeprefix("torch.")
        said = f"the alignment was fitted in {names[0]} and runs in {names[1]}: compare both with postalign eval."
        yield Finding("dtype", "warning", said)


def template(case: Case) -> Iterator[Finding]:
    """Whether a chat template is there, shows the prompt once, and is written in tokens of this tokenizer."""
    tokenizer = case.tokenizer
    if tokenizer.chat_template is None:
        said = "there is none, so prompts are put as `Question: ... Answer:`: set tokenizer.chat_template to its own."
        yield Finding("chat template", "warning", said)
        return
    text = render(tokenizer, ASKED)
    shown = text.count(ASKED)
    if shown != 1:
        said = f"it shows the prompt {shown} times: take the template that came with the model."
        yield Finding("chat template", "fail", said)
        return
    spans(tokenizer, ASKED)
    strange = [sign for sign in dict.fromkeys(_SIGNS.findall(text)) if _pieces(tokenizer, sign) != 1]
    if strange:
        said = f"it writes {strange[0]}, which is no token here: take the template that came with this tokenizer."
        yield Finding("chat template", "fail", said)
        return
    ids, bos = encode(tokenizer, [ASKED]).input_ids[0].tolist(), tokenizer.bos_token_id
    first = next((i for i, token in enumerate(ids) if token != bos), len(ids)) if bos is not None else 0
    if first > 1:
        said = f"{first} beginnings of sequence stand before the prompt: take the extra ones out of the template."
        yield Finding("chat template", "fail", said)
        return
    said = f"there, and applied once; {'one' if first else 'no'} beginning of sequence"
    if bos is not None and tokenizer(text)["input_ids"][:2] == [bos, bos]:
        said += " (the tokenizer adds a second one to templated text: elsewhere call it with add_special_tokens=False)"
    yield Finding("chat template", "ok", said)


@torch.no_grad()
def padding(case: Case) -> Iterator[Finding]:
    """A prompt gives the same logits alone and padded on the left beside a longer one."""
    tokenizer, model = case.tokenizer, case.model
    device = next(model.parameters()).device
    prompts = ["Hi", " ".join([ASKED] * 3)]
    batch = encode(tokenizer, prompts, device=device)
    more = {"position_ids": batch.position_ids}
    mask = batch.attention_mask
    together = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **accepted(model, **more))
    alone = model(input_ids=encode(tokenizer, prompts[:1], device=device).input_ids, use_cache=False)
    a, b = together.logits[0, -1].float(), alone.logits[0, -1].float()
    # a few units in the last place of the number format, over as many sums as there are layers
    apart = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
    allowed = 1e-3 if together.logits.dtype == torch.float32 else 0.1
    if not apart <= allowed:
        said = f"left padding moves the logits by {apart:.0%}: load with attn_implementation='eager', or batch_size=1."
        yield Finding("padding", "fail", said)
        return
    token = tokenizer.pad_token
    said = f"left padding changes nothing; {token!r} fills" if token else "left padding changes nothing"
    if token is None and tokenizer.eos_token_id is None:
        said = f"the tokenizer has no token to pad with, so id {pad_id(tokenizer)} fills (masked): set pad_token."
        yield Finding("padding", "warning", said)
        return
    yield Finding("padding", "ok", said if token else f"{said}; no pad token, the end of sequence fills (masked)")


def end(case: Case) -> Iterator[Finding]:
    """Which tokens end a reply, and whether the end of a turn is among those that everyone knows."""
    tokenizer, model = case.tokenizer, case.model
    ends = eos_ids(model, tokenizer)
    if not ends:
        said = "no token ends a reply: set eos_token_id in the model's generation_config."
        yield Finding("end of turn", "fail", said)
        return
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ends))
    turn = end_of_turn(tokenizer)
    if turn is None and tokenizer.chat_template is not None:
        said = f"the template ends an answer with no special token, so only {names} end a reply: check its template."
        yield Finding("end of turn", "warning", said)
        return
    config: Any = getattr(model, "generation_config", None)
    told = getattr(config, "eos_token_id", None)
    told = [told] if isinstance(told, int) else told or []
    if turn is not None and tokenizer.convert_tokens_to_ids(turn) not in told:
        said = f"{names}; other programs do not stop at {turn!r}: add it to generation_config.eos_token_id."
        yield Finding("end of turn", "warning", said)
        return
    yield Finding("end of turn", "ok", names)


def vocabulary(case: Case) -> Iterator[Finding]:
    """Whether model, tokenizer, guide and alignment belong together."""
    rows = case.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    highest = max(case.tokenizer.get_vocab().values())
    if highest >= rows:
        said = f"the tokenizer has ids up to {highest} and the model {rows} embeddings: load the model's own tokenizer."
        yield Finding("vocabulary", "fail", said)
    else:
        yield Finding("vocabulary", "ok", f"ids up to {highest}, {rows} embeddings")
    alignment = case.alignment
    if alignment is None:
        return
    if not alignment.base:
        said = "the alignment does not say what it was fitted on: compare it with the base by postalign eval."
        yield Finding("fitted on", "warning", said)
    else:
        here = fingerprint(case.model, case.tokenizer)
        wrong = []
        for key in ("config", "weights", "tokenizer", "template"):
            try:
                alignment.check_base({"dtype": here["dtype"], key: here[key]})
            except PostalignError as error:
                wrong.append(str(error))
        yield from (Finding("fitted on", "fail", said) for said in wrong)
        if not wrong:
            named = alignment.base.get("model") or "this model"
            yield Finding("fitted on", "ok", f"{named}: structure, weights, vocabulary and template match")


def guide_vocabulary(case: Case) -> Iterator[Finding]:
    """A checkpoint guide must map the same tokens to the same ids; other guides share the model's own vocabulary."""
    guidance = case.alignment.guidance if case.alignment is not None else None
    if guidance is None:
        return
    other = case.guide  # raises with the first difference
    if other is None:
        yield Finding("guide vocabulary", "ok", "the guide is on the model's own weights")
        return
    rows = other.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    highest = max(case.tokenizer.get_vocab().values())
    if highest >= rows:
        said = f"the guide has {rows} embeddings and the tokenizer ids up to {highest}: choose a guide of this family."
        yield Finding("guide vocabulary", "fail", said)
    else:
        yield Finding("guide vocabulary", "ok", f"the guide has {rows} embeddings for ids up to {highest}")


def _pieces(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


CHECKS = [
    ("dtype", dtype),
    ("chat template", template),
    ("padding", padding),
    ("end of turn", end),
    ("vocabulary", vocabulary),
    ("guide vocabulary", guide_vocabulary),
]
