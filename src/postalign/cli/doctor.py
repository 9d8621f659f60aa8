"""`postalign doctor`: does it work? A model's text, an alignment's edits and what comes of them, checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Json, ModelOptions, load_model, print_json, progress

if TYPE_CHECKING:
    from ..evaluation.doctor import Finding

MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "fail": ("FAIL", "bold red")}


def run(
    model: str = "smollm2",
    /,
    *,
    alignment: Path | None = None,
    as_json: Json = False,
    options: ModelOptions | None = None,
) -> int:
    """Check a model, and an alignment on it. Exit code 1 when something fails.

    Parameters
    ----------
    model
        smollm2, smollm2-fragile, a folder, a *.gguf file or a hub id.
    alignment
        Folder of an alignment. Default: the model alone.
    """
    import postalign as pa

    from ..evaluation.doctor import examine

    loaded_alignment = pa.Alignment.from_pretrained(alignment) if alignment else None
    loaded, tokenizer = load_model(model, options)
    with progress() as on_progress:
        findings = examine(loaded, tokenizer, loaded_alignment, on_progress=on_progress)
    failed = sum(one.status == "fail" for one in findings)
    if as_json:
        checks = [{"check": one.check, "status": one.status, "said": one.said} for one in findings]
        print_json({"model": model, "alignment": str(alignment) if alignment else None, "checks": checks})
    else:
        show(findings)
    return 1 if failed else 0


def show(findings: list[Finding]) -> None:
    """One line for each finding, and the sum."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for one in findings:
        word, style = MARKS[one.status]
        table.add_row(Text(word, style=style), Text(one.check, style="bold"), Text(one.said))
    Console(width=None if sys.stdout.isatty() else 250, highlight=False).print(table)
    counts = {status: sum(one.status == status for one in findings) for status in MARKS}
    print(f"\n{counts['ok']} ok, {counts['warning']} to look at, {counts['fail']} failed")
