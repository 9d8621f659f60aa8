"""`postalign report`: one or more runs as a self-contained page, as Markdown or as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import Flag, Json, load_alignments, print_json


def run(
    runs: list[Path],
    /,
    *,
    out: Path = Path("report.html"),
    alignment: Annotated[list[Path] | None, Parameter(negative=())] = None,
    leave_out_harmful: Flag = False,
    figures_only: Flag = False,
    as_json: Json = False,
) -> None:
    """Turn runs of `postalign eval` into a report: frontier, comparisons, categories, cost, judges, replies.

    Parameters
    ----------
    runs
        Folders that `postalign eval --out` made.
    out
        The report: .html for one page that needs no network, .md for Markdown, .csv for all figures. The latter two
        hold no replies.
    alignment
        Folder of an alignment whose head map is shown too. Repeatable.
    leave_out_harmful
        Leave replies that could be harmful out of the file: those to prompts not known to be harmless, unless every
        judge calls them a refusal. Without it they are in the file, folded.
    figures_only
        Leave all prompts and replies out of the file.
    """
    from ..evaluation import write_report

    write_report(
        runs,
        out,
        alignments=load_alignments(alignment or []),
        leave_out_harmful=leave_out_harmful,
        figures_only=figures_only,
    )
    if as_json:
        print_json({"report": str(out)})
    else:
        print(out)
