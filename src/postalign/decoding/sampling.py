"""From log-probabilities to tokens: greedy or sampled, each row with a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import UsageError


class Sampler:
    """Picks one token per row. With do_sample, row i draws from a generator of (seed, i): batches do not matter."""

    def __init__(self, do_sample: bool, temperature: float, top_p: float, top_k: int, seed: int):
        if do_sample and (temperature <= 0 or not 0 < top_p <= 1 or top_k < 0):
            raise UsageError("sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0 (0 switches top_k off).")
        self.do_sample, self.seed = do_sample, seed
        self.warpers = LogitsProcessorList()
        if do_sample and temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if do_sample and top_k > 0:
            self.warpers.append(TopKLogitsWarper(top_k))
        if do_sample and top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.generators: list[torch.Generator] = []
        self.numbers: list[int] = []
        self.pending: list[list[Tensor]] = []  # random numbers of draws that are to come

    def add(self, number: int) -> int:
        """A random stream made from (seed, number); its place among this sampler's."""
        self.numbers.append(number)
        self.generators.append(self._generator(number))
        self.pending.append([])
        return len(self.generators) - 1

    def for_rows(self, numbers: Sequence[int]) -> Sampler:
        """This sampler with random streams of these numbers, at the places 0, 1, ..."""
        for number in numbers:
            self.add(number)
        return self

    def again(self, place: int) -> None:
        """Let this random stream begin once more."""
        self.generators[place], self.pending[place] = self._generator(self.numbers[place]), []

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)

    def probabilities(self, scores: Tensor) -> Tensor:
        """What is drawn from, float32 `[rows, vocab]`, of log-probabilities."""
        return torch.softmax(self.warpers(torch.empty(0), scores), dim=-1)  # type: ignore[arg-type]

    def __call__(self, scores: Tensor, places: Sequence[int]) -> Tensor:
        """One token for each row of `scores` `[rows, vocab]`, drawn by the random stream at its place; ids `[rows]`.

        scores: log-probabilities; greedily, any numbers that rank the tokens.
        """
        tokens = self.peek(scores, places, 0)
        for place in places:
            self.forget(place, 1)
        return tokens

    def peek(self, scores: Tensor, places: Sequence[int], ahead: int) -> Tensor:
        """What would be drawn from `scores` `ahead` draws from now: the same random numbers, as often as one asks."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        drawn = self.probabilities(scores).cpu()
        tokens = [int((p / self._noise(place, ahead, len(p))).argmax()) for p, place in zip(drawn, places, strict=True)]
        return torch.tensor(tokens, device=scores.device)

    def forget(self, place: int, draws: int) -> None:
        """So many draws of this random stream are done."""
        if self.do_sample:
            del self.pending[place][:draws]

    def _noise(self, place: int, ahead: int, size: int) -> Tensor:
        """Exponential numbers `[size]`: the token of the largest p / noise is a draw from p."""
        pending = self.pending[place]
        while len(pending) <= ahead:
            pending.append(torch.empty(size).exponential_(generator=self.generators[place]))
        return pending[ahead][:size]


class StopText:
    """Whether one of `words` appears at the end of a reply, given its tokens so far."""

    def __init__(self, tokenizer: Any, words: Sequence[str]):
        self.tokenizer, self.words = tokenizer, [w for w in words if w]
        # a token is at least one byte of text, so a word that ends now began at most this many tokens ago
        self.window = max((len(word.encode()) for word in self.words), default=0) + 8

    def __call__(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(tokens[-self.window :], skip_special_tokens=True)
        return any(word in text for word in self.words)
