"""The decoding loop behind `pa.generate` and the command line: a queue of prompts, and rows that come and go.

Every reply is its prompt's own: neither the batch nor the order of coming and going matters to it. Rows that have ended
make room for prompts that wait, and where memory runs out, half as many rows go on. Knows streams of distributions and
tokenizers; knows no edit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..alignment import Alignment
from ..edits import CheckpointGuide, PromptGuide
from ..errors import PostalignError, UsageError
from ..models.chat import Batch, Messages, check_length, encode, eos_ids, pad_id
from .fixed import decode
from .guides import guide_inputs, guide_model
from .memory import fitting_rows, out_of_memory
from .sampling import Sampler, StopText
from .speculative import Speculation
from .stream import Stream


@dataclass(eq=False)
class Request:
    """A prompt on its way to a reply: `token_ids` grow until `done`."""

    ids: list[int]
    guide_ids: list[int] | None
    max_new_tokens: int
    place: int  # of its random stream
    on_token: Callable[[int], None] | None = None
    prefill: str = ""
    prefill_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    gate: float | None = None
    seconds: float = 0.0
    done: bool = False
    told: int = 0

    def cancel(self) -> None:
        """Ask for no more tokens; the row makes room for another prompt."""
        self.done = True

    def restart(self) -> None:
        self.token_ids, self.seconds = [], 0.0


class Engine:
    """Decodes requests, up to `batch_size` at once (None: as many as memory seems to allow).

    `submit` takes a prompt at any time, `step` decodes the next token of every row that is under way. Greedy, or
    sampled with one random stream for each request, made from (seed, its number). Use it in `with`, or close it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        alignment: Alignment | None = None,
        *,
        batch_size: int | None = None,
        sampler: Sampler | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size={batch_size} is out of range: choose 1 or more.")
        if alignment is not None:
            alignment.check(model, tokenizer)
        self.model, self.tokenizer, self.alignment = model, tokenizer, alignment
        found = alignment.guidance.guide if alignment and alignment.guidance else None
        self.prompt_guide = found if isinstance(found, PromptGuide) else None
        self.guide = guide_model(found, tokenizer, model) if isinstance(found, CheckpointGuide) else None
        self.batch_size = batch_size
        self.sampler = sampler or Sampler(False, 1.0, 1.0, 0, 0)
        self.stop = StopText(tokenizer, stop) if stop else None
        self.eos, self.pad = eos_ids(model, tokenizer), pad_id(tokenizer)
        self.device = next(model.parameters()).device
        self.stream = Stream(model, alignment, self.guide)
        self.speculation = Speculation()
        self.waiting: deque[Request] = deque()
        self.rows: list[Request] = []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the edits out of the model."""
        self.stream.close()

    def submit(
        self,
        prompt: str | Messages,
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        number: int = 0,
        prefill: str = "",
        on_token: Callable[[int], None] | None = None,
    ) -> Request:
        """Line up a prompt. number: which random stream it samples from. Raises UsageError for one that is too long.

        prefill: how the reply begins; the model goes on from there, and edits and gates take it for the prompt's end.
        """
        given = [prefill] if prefill else None
        batch = encode(self.tokenizer, [prompt], system=system, answers=given, device=self.device)
        check_length(self.model, batch, max_new_tokens, numbers=[number + 1])
        ids = batch.input_ids[0].tolist()
        begun, theirs = ids[batch.prompt_lengths[0] :], None
        if self.prompt_guide is not None:
            other = guide_inputs(self.prompt_guide, self.tokenizer, [prompt], self.device)
            check_length(self.model, other, max_new_tokens + len(begun), numbers=[number + 1])
            theirs = other.input_ids[0].tolist() + begun
        place = self.sampler.add(number)
        request = Request(ids, theirs, max_new_tokens, place, on_token, prefill, begun)
        request.done = max_new_tokens <= 0
        self.waiting.append(request)
        return request

    @torch.no_grad()
    def step(self) -> bool:
        """One token, or a few, for every row that is under way; False when there is nothing left to do."""
        started, rows = time.perf_counter(), []
        try:
            self._admit()
            rows = [request for request in self.rows if not request.done]
            if rows:
                self._advance()
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._halve(error)
        for request in rows:
            request.seconds += (time.perf_counter() - started) / len(rows)
        return bool(self.rows or self.waiting)

    def _admit(self) -> None:
        """Let rows that have ended go, and prompts that wait come in, when it is worth the copying."""
        live = [i for i, request in enumerate(self.rows) if not request.done]
        ended = len(self.rows) - len(live)
        if ended and (not live or 4 * ended >= len(self.rows)):
            self._keep(live)
        self.waiting = deque(request for request in self.waiting if not request.done)
        if not self.waiting:
            return
        size = self.batch_size or self._fitting()
        room = size - len(self.rows)
        if self.rows and (4 * room < size or not self.stream.can_join):
            return
        new = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        self.rows += new  # at once, so that they are not lost when memory runs out
        batch = self._batch([request.ids for request in new])
        theirs = [request.guide_ids for request in new if request.guide_ids is not None]
        guide_batch = self._batch(theirs) if theirs else None
        if len(new) == len(self.rows):
            scores = self.stream.first(batch, guide_batch)
        else:
            scores = self.stream.join(batch, guide_batch)
        if self.alignment is not None:
            for request, strength in zip(new, self.stream.strength[-len(new) :].tolist(), strict=True):
                request.gate = strength
        self._take(new, self.sampler(scores, [request.place for request in new]).tolist())

    def _advance(self) -> None:
        """The next token of each row. A row that has ended, and has not gone yet, is fed padding."""
        last = [request.token_ids[-1] if not request.done else self.pad for request in self.rows]
        tokens = torch.tensor(last, device=self.device)
        places = [request.place for request in self.rows]
        if self.speculation.possible(self.stream):
            most = min(one.max_new_tokens - len(one.token_ids) for one in self.rows if not one.done)
            found = self.speculation.next(self.stream, tokens, self.sampler, places, most)
            for request, several in zip(self.rows, found, strict=True):
                for token in several:
                    self._take([request], [token])
            return
        scores = self.stream.next(tokens, normalised=self.sampler.do_sample)
        self._take(self.rows, self.sampler(scores, places).tolist())

    def _take(self, rows: Sequence[Request], tokens: Sequence[int]) -> None:
        for request, token in zip(rows, tokens, strict=True):
            if request.done:
                continue
            request.token_ids.append(token)
            if request.on_token is not None and len(request.token_ids) > request.told:
                request.on_token(token)
                request.told = len(request.token_ids)
            full = len(request.token_ids) >= request.max_new_tokens
            if full or token in self.eos or (self.stop is not None and self.stop(request.token_ids)):
                request.done = True

    def _keep(self, live: list[int]) -> None:
        if live:
            self.stream.keep(torch.tensor(live, device=self.device))
        self.rows = [self.rows[i] for i in live]

    def _batch(self, prompts: Sequence[list[int]]) -> Batch:
        longest = max(map(len, prompts))
        ids = [[self.pad] * (longest - len(one)) + one for one in prompts]
        mask = [[0] * (longest - len(one)) + [1] * len(one) for one in prompts]
        make = {"dtype": torch.long, "device": self.device}
        return Batch(torch.tensor(ids, **make), torch.tensor(mask, **make), [len(one) for one in prompts])  # type: ignore

    def _fitting(self) -> int:
        requests = [*self.rows, *self.waiting]
        columns = max(len(request.guide_ids or request.ids) + request.max_new_tokens for request in requests)
        return max(len(self.rows), fitting_rows(self.model, columns, guided=self.stream.guidance is not None))

    def _halve(self, error: Exception) -> None:
        """Half as many rows from now on. Those under way start again: they say the same, and are not told twice."""
        live = [request for request in self.rows if not request.done]
        if len(self.rows) <= 1:
            raise PostalignError(
                "memory ran out with a single prompt: shorten it, lower max_new_tokens, or load the model in bfloat16."
            ) from error
        self.batch_size = len(self.rows) // 2
        self.stream.close()
        self.rows = []
        for request in reversed(live):
            request.restart()
            self.sampler.again(request.place)
            self.waiting.appendleft(request)
        self.stream = Stream(self.model, self.alignment, self.guide)


__all__ = ["Engine", "Request", "Stream", "decode"]
