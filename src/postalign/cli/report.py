"""`postalign report`: one self-contained HTML page of one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import Json, load_alignments, print_json


def run(
    runs: list[Path],
    /,
    *,
    out: Path = Path("report.html"),
    alignment: Annotated[list[Path] | None, Parameter(negative=())] = None,
    as_json: Json = False,
) -> None:
    """Turn runs of `postalign eval` into one HTML page: table, trade-off plot, head map, replies.

    Parameters
    ----------
    runs
        Folders that `postalign eval --out` made.
    out
        The page.
    alignment
        Folder of an alignment whose head map is shown too. Repeatable.
    """
    from ..evaluation import write_report

    write_report(runs, out, alignments=load_alignments(alignment or []))
    if as_json:
        print_json({"report": str(out)})
    else:
        print(out)
