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

    def for_rows(self, indices: Sequence[int]) -> Sampler:
        """The same sampler for prompts with these indices; its `rows` argument then counts from 0."""
        self.generators = [torch.Generator().manual_seed((self.seed * 1_000_003 + i) % 2**63) for i in indices]
        return self

    def __call__(self, scores: Tensor, rows: Tensor) -> Tensor:
        """scores: log-probabilities `[current rows, vocab]`; rows: index of each into `for_rows`. Returns ids."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        probabilities = torch.softmax(self.warpers(torch.empty(0), scores), dim=-1).cpu()  # type: ignore[arg-type]
        draws = [
            torch.multinomial(p, 1, generator=self.generators[row])
            for p, row in zip(probabilities, rows.tolist(), strict=True)
        ]
        return torch.cat(draws).to(scores.device)


class StopText:
    """Stops a row when one of `words` appears in its reply."""

    def __init__(self, tokenizer: Any, words: Sequence[str], prompt_length: int):
        self.tokenizer, self.words, self.prompt_length = tokenizer, [w for w in words if w], prompt_length
        # a token is at least one byte of text, so a word that ends now began at most this many tokens ago
        self.window = max((len(word.encode()) for word in self.words), default=0) + 8

    def __call__(self, sequences: Tensor, rows: Tensor) -> Tensor:
        tails = sequences[:, self.prompt_length :][:, -self.window :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([any(w in text for w in self.words) for text in texts], device=sequences.device)
