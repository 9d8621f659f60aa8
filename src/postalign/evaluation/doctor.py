"""Does it work? A model's text, an alignment's edits and what comes of them, each checked in one line.

Every check runs the real thing (tokenizer, hooks, decoding) and ends in findings of one line that say what to do. What
is checked is in checks_text.py, checks_edits.py and checks_effects.py. Prints nothing, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ..errors import PostalignError

if TYPE_CHECKING:
    from torch import nn

    from ..alignment import Alignment

Status = Literal["ok", "warning", "fail"]
HARMLESS, HARMFUL = 8, 8  # prompts of each kind that are looked at


@dataclass(frozen=True)
class Finding:
    """One line of the result. check: what was looked at. said: what was found and, unless it is ok, what to do."""

    check: str
    status: Status
    said: str


@dataclass
class Case:
    """What is examined: a model with its tokenizer, an alignment or None, and prompts to try it on."""

    model: nn.Module
    tokenizer: Any
    alignment: Alignment | None
    harmless: list[str] = field(default_factory=list)
    harmful: list[str] = field(default_factory=list)
    replies: dict[bool, dict[str, list[int]]] = field(default_factory=dict)  # aligned or not -> prompt -> ids

    @property
    def prompts(self) -> list[str]:
        return [*self.harmless, *self.harmful]

    @cached_property
    def guide(self) -> nn.Module | None:
        """The model of a guide that has weights of its own."""
        from ..decoding.guides import guide_model
        from ..edits import CheckpointGuide

        found = self.alignment.guidance if self.alignment is not None else None
        if found is None or not isinstance(found.guide, CheckpointGuide):
            return None
        return guide_model(found.guide, self.tokenizer, self.model)


Check = Callable[[Case], Iterator[Finding]]


def examine(
    model: nn.Module,
    tokenizer: Any,
    alignment: Alignment | None = None,
    *,
    harmless: Sequence[str] | None = None,
    harmful: Sequence[str] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Finding]:
    """All checks of `model`, and of `alignment` on it, in a fixed order.

    harmless, harmful: prompts to try it on; some of the starter set's tune split unless given. A check that cannot be
    made because an edit does not fit the model is left out: the finding that says so is there.
    """
    from . import checks_edits, checks_effects, checks_sizes, checks_text

    case = Case(
        model, tokenizer, alignment, _starter("benign", HARMLESS, harmless), _starter("harmful", HARMFUL, harmful)
    )
    checks: list[tuple[str, Check]] = [*checks_text.CHECKS]
    findings: list[Finding] = []
    if alignment is not None:
        findings += checks_edits.fits(case)
        if all(one.status != "fail" for one in findings):
            checks += checks_edits.CHECKS + checks_sizes.CHECKS
            checks += checks_effects.CHECKS
    else:
        checks += checks_effects.BASE_CHECKS
    for done, (name, check) in enumerate(checks):
        if on_progress is not None:
            on_progress("checks", done, len(checks))
        try:
            findings += check(case)
        except PostalignError as error:
            findings.append(Finding(name, "fail", str(error)))
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            findings.append(Finding(name, "fail", f"the check broke ({said}): load the model anew, then run with -v."))
    if on_progress is not None:
        on_progress("checks", len(checks), len(checks))
    return findings


def _starter(label: str, count: int, given: Sequence[str] | None) -> list[str]:
    """Prompts of the starter set's tune split, spread over it so that all its kinds are there."""
    if given is not None:
        return list(given)
    from ..data.sources import load_data

    rows = [row for row in load_data("starter", split="tune") if row.label == label]
    return [rows[i * len(rows) // count].prompt for i in range(min(count, len(rows)))]
