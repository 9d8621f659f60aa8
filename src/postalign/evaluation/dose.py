"""How often each edit acted, measured: hooks before and after an edit's own, on real decoding passes.

A dose is how many times the edit's change stands in what a module puts out, per row and position: 1 where it acted
once, 0 where it did not, the gate's strength where that is in it. Knows hooks and streams; judges nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..decoding.guides import guide_inputs
from ..decoding.stream import Stream
from ..edits import HiddenEdit, LowRankPatch, PromptGuide
from ..models.anatomy import anatomy, block_output
from ..models.chat import Batch, encode
from .doctor import Case


@dataclass(eq=False)
class Site:
    """One module that an edit acts on. change: (its input, its output before) -> what one dose adds.

    scope: which positions it is meant for. doses: of each pass since it is watched, `[rows, length]`; of a module that
    is given tokens without their rows, `[tokens]`.
    """

    module: nn.Module
    change: Callable[[Tensor, Tensor], Tensor]
    scope: tuple[str, ...]
    doses: list[Tensor] = field(default_factory=list)

    def before(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.earlier = block_output(output).detach().clone()  # a patch adds to the output in place

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        expected = self.change(args[0] if args else self.earlier, self.earlier).float()
        size = expected.square().sum(-1)
        found = ((block_output(output).detach().float() - self.earlier.float()) * expected).sum(-1)
        self.doses.append(torch.where(size > 0, found / size.clamp(min=1e-30), torch.zeros_like(found)).cpu())


def sites_of(edit: Any, model: nn.Module) -> list[Site]:
    """Where `edit` acts by hooks; nowhere for one that is written into the weights or changes nothing."""
    if isinstance(edit, HiddenEdit):
        push = edit.strength * edit.vector
        if not bool(push.any()):
            return []
        return [Site(anatomy(model).blocks[edit.layer], lambda given, out: push.to(out.device, out.dtype), edit.scope)]
    if isinstance(edit, LowRankPatch):
        return [
            Site(model.get_submodule(name), _low_rank(a, b, edit.scale), ("all",))
            for name, (a, b) in edit.factors.items()
            if bool(a.any()) and bool(b.any())
        ]
    return []


def _low_rank(a: Tensor, b: Tensor, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    def change(given: Tensor, out: Tensor) -> Tensor:
        key = given.device, given.dtype
        return scale * nn.functional.linear(nn.functional.linear(given, a.to(*key)), b.to(*key))

    return change


@contextlib.contextmanager
def watched(sites: Sequence[Site]) -> Iterator[None]:
    """Inside it the sites keep their doses. To be entered when the edits are live: before and after their hooks."""
    handles = []
    try:
        for site in sites:
            site.doses = []
            handles.append(site.module.register_forward_hook(site.before, prepend=True))
            handles.append(site.module.register_forward_hook(site.after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_for(case: Case, alignment: Alignment | None, prompts: Sequence[str]) -> tuple[Batch, Batch | None]:
    """The prompts as the model reads them, and as a prompt guide does."""
    device = next(case.model.parameters()).device
    guide = alignment.guidance.guide if alignment is not None and alignment.guidance is not None else None
    theirs = guide_inputs(guide, case.tokenizer, prompts, device) if isinstance(guide, PromptGuide) else None
    return encode(case.tokenizer, prompts, device=device), theirs


Compared = Iterator[tuple[str, Tensor, Tensor]]


def counted(case: Case, alignment: Alignment, sites: Sequence[Site], *, guide: bool, steps: int = 3) -> Compared:
    """Doses beside what they should be, on single prompts and on some steps of a batch: (where, found, wanted).

    guide: whether the sites are those of the guide's edits, which act on its rows alone; others act on the model's own
    rows alone, as the gate says. Modules that see some rows' tokens only are to be left out.
    """
    for prompt in case.prompts:
        yield from on_prompt(case, alignment, sites, prompt, guide=guide)
    yield from on_steps(case, alignment, sites, guide=guide, steps=steps)


@torch.no_grad()
def on_prompt(case: Case, alignment: Alignment, sites: Sequence[Site], prompt: str, *, guide: bool) -> Compared:
    """One prompt is read, by the gate first and once more where that opens; doses of all passes add up."""
    batch, theirs = inputs_for(case, alignment, [prompt])
    length = batch.prompt_lengths[0]
    with Stream(case.model, alignment, case.guide) as stream, watched(sites):
        stream.first(batch, theirs)
        strength, seen = float(stream.strength[0]), len(stream.guided) > 0 and case.guide is None
    for site in sites:
        passes = [dose.reshape(-1, length) if dose.dim() == 1 else dose for dose in site.doses]
        rows = [row[-length:] for dose in passes for row in dose]
        wanted = expected_on_prompt(site.scope, length)
        if seen and rows:  # the guide's row is the last of the last pass
            yield "on a prompt of the guide", rows.pop(), wanted * guide
        yield "on a prompt", sum(rows, torch.zeros(length)), wanted * (0.0 if guide else strength)


@torch.no_grad()
def on_steps(case: Case, alignment: Alignment, sites: Sequence[Site], *, guide: bool, steps: int) -> Compared:
    """A batch of all prompts, some of which the gate may have opened for: each step's doses, row by row."""
    batch, theirs = inputs_for(case, alignment, case.prompts)
    with Stream(case.model, alignment, case.guide) as stream:
        tokens = stream.first(batch, theirs).argmax(-1)
        for _ in range(steps):
            with watched(sites):
                tokens = stream.next(tokens).argmax(-1)
            below = len(stream.guided) if case.guide is None else 0
            rows = torch.cat([stream.strength.cpu() * (not guide), torch.full((below,), float(guide))])
            for site in sites:
                found = torch.cat([torch.zeros(0), *(dose.reshape(-1) for dose in site.doses)])
                wanted = rows * float("all" in site.scope or "generation" in site.scope)
                if len(found) != len(wanted):  # the module was not run, or the edit changed how often
                    found = nn.functional.pad(found, (0, max(0, len(wanted) - len(found))))[: len(wanted)]
                yield "on a generated token", found, wanted


def expected_on_prompt(scope: Sequence[str], length: int) -> Tensor:
    """1 at the prompt's positions that `scope` names, float32 `[length]`."""
    wanted = torch.zeros(length)
    if "all" in scope or "prompt" in scope:
        wanted[:] = 1
    if "last" in scope:
        wanted[-1] = 1
    return wanted
