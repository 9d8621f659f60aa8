"""Replies to prompts: all of them in order, or each as soon as its row has ended. Knows the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..alignment import Alignment
from ..errors import UsageError
from ..models.chat import Messages, check_length, encode
from .engine import Engine, Request
from .sampling import Sampler

Prompts = Sequence[str | Messages]


@dataclass(frozen=True)
class Reply:
    """One reply. gate: the strength its row was given (None without an alignment); finish: `stop` or `length`.

    seconds: its share of the time of the batches that it was in.
    """

    text: str
    token_ids: list[int]
    gate: float | None
    finish: str
    seconds: float


def generate_replies(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    *,
    alignment: Alignment | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    first_row: int = 0,
    stop: Sequence[str] = (),
    streamer: Any = None,
    batch_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Reply]:
    """`generate`, with what is known of each reply. Raises UsageError for prompts longer than the context."""
    if isinstance(prompts, str):
        raise UsageError("prompts must be a list: put the one prompt in brackets.")
    if not len(prompts):
        raise UsageError("there are no prompts: give one or more.")
    if streamer is not None and len(prompts) != 1:
        raise UsageError("a streamer shows one reply: give one prompt, or leave the streamer out.")
    stop = [word for word in ([stop] if isinstance(stop, str) else stop) if word]
    sampler = Sampler(do_sample, temperature, top_p, top_k, seed)
    told = (lambda token: streamer.put(torch.tensor([token]))) if streamer is not None else None
    with Engine(model, tokenizer, alignment, batch_size=batch_size, sampler=sampler, stop=stop) as engine:
        requests = [
            engine.submit(prompt, system=system, max_new_tokens=max_new_tokens, number=first_row + i, on_token=told)
            for i, prompt in enumerate(prompts)
        ]
        # like lengths together: less padding
        engine.waiting = deque(sorted(engine.waiting, key=lambda request: -len(request.ids)))
        if streamer is not None:
            streamer.put(torch.tensor([requests[0].ids]))
        done = 0
        while engine.step():
            now = sum(request.done for request in requests)
            if on_progress is not None and now > done:
                on_progress(now)
            done = now
        if streamer is not None:
            streamer.end()
        return [reply_of(tokenizer, request, engine.eos, stop) for request in requests]


def generate(model: nn.Module, tokenizer: Any, prompts: Prompts, **settings: Any) -> list[str]:
    """Replies of `model` to `prompts` under an alignment, in the prompts' order.

    prompts: strings or chat message lists; each is put into the model's own template. alignment: None for the model as
    it is. Names and defaults otherwise as in transformers: system, max_new_tokens=128, do_sample, temperature, top_p,
    top_k, seed, stop (texts that end a reply, cut from it), streamer (one prompt), batch_size (None: what memory
    allows), on_progress(done). Greedy unless do_sample; row i samples from a generator of its own, made from
    (seed, first_row + i): the batch does not matter. first_row: what stands before these prompts, where they are a part
    of more.
    """
    return [reply.text for reply in generate_replies(model, tokenizer, prompts, **settings)]


def as_completed(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    *,
    alignment: Alignment | None = None,
    system: str | None = None,
    prefills: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    on_step: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Reply]]:
    """Yield (index of the prompt, its reply) in the order in which replies end; otherwise as `generate_replies`.

    prefills: how each reply begins ("" for one that begins freely). numbers: the random stream of each prompt, by
    default its index. on_step: called after each step of the engine. The same prompts in the same order with the same
    batch size share their batches in the same way every time. Raises UsageError for prompts longer than the context.
    """
    starts = prefills or [""] * len(prompts)
    places = numbers if numbers is not None else range(len(prompts))
    sampler = Sampler(do_sample, temperature, top_p, top_k, seed)
    with Engine(model, tokenizer, alignment, batch_size=batch_size, sampler=sampler) as engine:
        requests = [
            engine.submit(prompt, system=system, max_new_tokens=max_new_tokens, number=number, prefill=prefill)
            for prompt, prefill, number in zip(prompts, starts, places, strict=True)
        ]
        # like lengths together: less padding
        engine.waiting = deque(sorted(engine.waiting, key=lambda request: -len(request.ids)))
        open_ones = dict(enumerate(requests))
        going = True
        while going:
            going = engine.step()
            if on_step is not None:
                on_step()
            for index in [i for i, request in open_ones.items() if request.done]:
                yield index, reply_of(tokenizer, open_ones.pop(index), engine.eos)


def check_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    *,
    system: str | None = None,
    prefills: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    max_new_tokens: int = 128,
) -> None:
    """Raise UsageError when one of them does not fit into the model's context, called by its name in `names`."""
    starts = prefills or [""] * len(prompts)
    for i, (prompt, prefill) in enumerate(zip(prompts, starts, strict=True)):
        batch = encode(tokenizer, [prompt], system=system, answers=[prefill] if prefill else None)
        try:
            check_length(model, batch, max_new_tokens)
        except UsageError as error:
            raise UsageError(str(error).replace("prompt 1 ", f"prompt {names[i] if names else i + 1} ", 1)) from error


def reply_of(tokenizer: Any, request: Request, eos: set[int], stop: Sequence[str] = ()) -> Reply:
    """What became of a request that is done. Its text begins with the prefill, its token ids do not hold it."""
    tokens = request.token_ids
    ended = bool(tokens) and tokens[-1] in eos
    body = tokens[:-1] if ended else tokens
    text = tokenizer.decode(body, skip_special_tokens=True)
    cuts = [text.find(word) for word in stop if word in text]
    if cuts:
        text, ended = text[: min(cuts)], True
    elif request.prefill:
        # decoded with what it follows: alone, some tokenizers drop the space before the first word
        before = tokenizer.decode(request.prefill_ids, skip_special_tokens=True)
        whole = tokenizer.decode(request.prefill_ids + body, skip_special_tokens=True)
        text = whole[len(before) :] if whole.startswith(before) else text
    return Reply(request.prefill + text, tokens, request.gate, "stop" if ended else "length", request.seconds)


__all__ = ["Prompts", "Reply", "as_completed", "check_prompts", "generate", "generate_replies", "reply_of"]
