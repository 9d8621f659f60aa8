"""Guided decoding with a guide that has weights of its own, several tokens at a time.

The model drafts tokens by itself, the guide reads them all in one pass, and each row keeps them up to the first that
the mixed distribution would not have given. What comes out is what one token at a time gives, greedily and sampled:
draft and outcome are drawn with the same random numbers, so a draft stands where mixing changes nothing. After
Leviathan et al. (arXiv 2211.17192), with the union rule in place of the target. Knows streams and samplers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits import union, union_order
from .sampling import Sampler
from .stream import Stream

MOST = 8  # tokens drafted at once
LASTING = 0.9  # of what earlier rounds said of how often a draft stands
FIXED = 30  # what a pass costs whatever it reads, in tokens (benchmarks/products.py)


class Speculation:
    """Drafts as many tokens as pay, by how often drafts have stood lately: a single one where they mostly fall."""

    def __init__(self) -> None:
        self.stood, self.judged = 1.0, 2.0  # a coin, until more is known

    def drafts(self, rows: int) -> int:
        """The number that gives the most tokens for the time of that many passes and one of the guide."""
        p = min(self.stood / self.judged, 0.999)
        guide = {k: (FIXED + rows * k) / (FIXED + rows) for k in range(1, MOST + 1)}
        speeds = {k: (1 - p**k) / (1 - p) / (k + passes) for k, passes in guide.items()}
        return max(speeds, key=lambda k: speeds[k])

    @staticmethod
    def possible(stream: Stream) -> bool:
        """Whether this stream has a guide of its own, and caches of which columns can be taken back."""
        state = stream.state
        if stream.other is None or state.other is None or state.rows is None or not len(state.guided):
            return False
        caches = state.rows.cache, state.other.cache
        always = stream.guidance is not None and stream.guidance.tokens is None
        return always and all(cache.movable and not cache.sliding for cache in caches)

    @torch.no_grad()
    def next(
        self, stream: Stream, tokens: Tensor, sampler: Sampler, places: Sequence[int], most: int
    ) -> list[list[int]]:
        """Append `tokens` `[rows]`; 1 to `most` tokens that follow, for each row. The last of them is not read yet."""
        state, guidance = stream.state, stream.guidance
        assert state.rows is not None and state.other is not None and stream.other is not None and guidance is not None
        guided = state.guided
        count = max(1, min(self.drafts(len(guided)), most))
        read, own = [tokens], []
        for ahead in range(count):
            own.append(stream.branches.extend(state.rows, read[-1].unsqueeze(1))[:, -1])
            scores = torch.log_softmax(own[-1], -1) if sampler.do_sample else own[-1]
            read.append(sampler.peek(scores, places, ahead))
        theirs = stream.other.extend(state.other, torch.stack(read[:count], 1)[guided])
        lam = (guidance.lam * state.strength[guided].abs()).unsqueeze(-1)
        chosen = []
        for ahead, (a, drafted) in enumerate(zip(own, read[1:], strict=True)):
            b, mixed = theirs[:, ahead].to(a.device), drafted.clone()
            width = min(a.shape[-1], b.shape[-1])
            left, right = a[guided, :width], b[:, :width]
            if sampler.do_sample:
                scores = union(torch.log_softmax(left, -1), torch.log_softmax(right, -1), lam)
            else:
                scores = union_order(left, right, lam)
            mixed[guided] = sampler.peek(scores, [places[row] for row in guided.tolist()], ahead)
            chosen.append(mixed)
        outcome, draft = torch.stack(chosen, 1), torch.stack(read[1:], 1)
        stands = (outcome == draft).long().cumprod(1).sum(1)
        kept = (1 + stands).clamp(max=count)
        self.stood = LASTING * self.stood + float(stands.float().mean())
        self.judged = LASTING * self.judged + float(kept.float().mean())
        stream.branches.retract(state.rows, count - kept)
        stream.other.retract(state.other, (count - kept)[guided])
        numbers = kept.tolist()
        for place, number in zip(places, numbers, strict=True):
            sampler.forget(place, number)
        stream.replied = [had + number for had, number in zip(stream.replied, numbers, strict=True)]
        return [row[:number] for row, number in zip(outcome.tolist(), numbers, strict=True)]
