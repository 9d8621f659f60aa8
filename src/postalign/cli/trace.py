"""`postalign trace`: token by token, what an alignment changed in a reply, from what to what."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import UsageError
from .common import Json, ModelOptions, load_model, note, print_json

if TYPE_CHECKING:
    from ..evaluation.trace import Candidate, Step, Trace

SHOWN = 3  # tokens in a cell of the terminal's table


def run(
    model: str = "smollm2",
    /,
    *,
    alignment: Path | None = None,
    prompt: Annotated[str, Parameter(name=["--prompt", "-p"], allow_leading_hyphen=True)],
    system: str | None = None,
    max_new_tokens: int = 64,
    top: int = 5,
    html: Path | None = None,
    as_json: Json = False,
    options: ModelOptions | None = None,
) -> None:
    """Show what a guard changed, token by token: base, steered, guide and mixed probabilities.

    Parameters
    ----------
    model
        smollm2, smollm2-fragile, a folder, a *.gguf file or a hub id.
    alignment
        Folder of an alignment. Default: the model as it is.
    prompt
        The prompt.
    system
        System message.
    max_new_tokens
        Length of the reply at most.
    top
        How many tokens each list holds: the likeliest, the promoted, the suppressed.
    html
        Write the trace to this file, one page that needs no network, and print no reply.
    """
    if max_new_tokens < 1 or top < 1:
        raise UsageError("--max-new-tokens and --top must be at least 1.")

    import postalign as pa

    from ..evaluation.trace import trace, write_trace

    loaded_alignment = pa.Alignment.from_pretrained(alignment) if alignment else None
    loaded, tokenizer = load_model(model, options)
    settings: dict[str, Any] = {"system": system, "max_new_tokens": max_new_tokens, "top": top}
    found = trace(loaded, tokenizer, prompt, loaded_alignment, **settings)
    if html is not None:
        note(f"Trace: {write_trace(found, html).resolve()}")
    if as_json:
        print_json(found.to_dict())
    elif html is None:
        show(found)


def show(trace: Trace) -> None:
    """The trace on the terminal: a few lines, the reply with changed tokens marked, a table of its tokens."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..evaluation.trace import percent, visible

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for line in summary(trace):
        console.print(Text(line))
    reply = Text()
    for number, step in enumerate(trace.steps):
        style = "bold reverse yellow" if number == trace.first_changed else "yellow" if step.changed else ""
        reply.append(step.token.text, style=style)
    console.print()
    console.print(reply)

    def listed(found: list[Candidate]) -> str:
        cells = ((visible(one.text), percent(one.base), percent(one.mixed)) for one in found[:SHOWN])
        return ", ".join(f"{text} {before}→{after}" for text, before, after in cells if before != after)

    def row(number: int, step: Step) -> list[Text]:
        mark = "▶" if number == trace.first_changed else "*" if step.changed else ""
        guide = percent(step.token.guide) + ("" if step.guided or step.token.guide is None else " off")
        views = percent(step.token.base), percent(step.token.steered), guide, percent(step.token.mixed)
        own = f"{visible(step.base_token.text)} {percent(step.base_token.base)}" if step.changed else ""
        styles = "", "yellow" if step.changed else "", "", "", "", "bold", "yellow", "green", "red"
        token = visible(step.token.text)
        cells = f"{number + 1}{mark}", token, *views, own, listed(step.promoted), listed(step.suppressed)
        return [Text(cell, style=style) for cell, style in zip(cells, styles, strict=True)]

    names = "#", "token", "base %", "steered %", "guide %", "mixed %", "base would say", "promoted", "suppressed"
    table = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
    for number, step in enumerate(trace.steps):
        table.add_row(*row(number, step))
    console.print(table)


def summary(trace: Trace) -> list[str]:
    """What can be said in words: gate, guidance, and where the reply leaves the base model's."""
    count, changed = len(trace.steps), sum(step.changed for step in trace.steps)
    lines = [f"Model: {trace.model or 'not named'}   Alignment: {trace.method or 'none'}"]
    if trace.gate_score is not None:
        word = "open" if trace.gate else "closed, the reply is the base model's"
        lines.append(f"Gate: {word} (score {trace.gate_score:.2f}, opens from {trace.gate_threshold:.2f})")
    if trace.lam is not None:
        mixed = sum(step.guided for step in trace.steps)
        lines.append(f"Guidance: lambda {trace.lam:g}, mixed in at {mixed} of {count} tokens")
    lines.append(f"Changed: {changed} of {count} tokens are not the base model's choice")
    if trace.first_changed is not None:
        first = trace.steps[trace.first_changed]
        there, here = first.base_token.text, first.token.text
        lines[-1] += f"; the first is number {trace.first_changed + 1}: {there!r} → {here!r}"
    return lines
