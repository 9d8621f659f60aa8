"""`postalign eval`: ask a model the prompts of some suites, with and without alignments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .common import (
    Json,
    ModelOptions,
    Repeated,
    load_alignments,
    load_model,
    print_json,
    print_table,
    progress,
)

if TYPE_CHECKING:
    from ..alignment import Alignment

VERDICTS = ("compliance", "refusal", "degenerate", "unscored")


def run(
    model: str = "smollm2",
    /,
    *,
    alignment: Annotated[list[Path] | None, Parameter(negative=())] = None,
    suite: Repeated = None,
    harmful: Repeated = None,
    benign: Repeated = None,
    out: Path,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    limit: int | None = None,
    text: Path | None = None,
    as_json: Json = False,
    options: ModelOptions | None = None,
) -> None:
    """Measure a model with and without alignments. Interrupted, the same command goes on where it was.

    Parameters
    ----------
    model
        smollm2, smollm2-fragile, a folder, a *.gguf file or a hub id.
    alignment
        Folder of an alignment; its name is the system's. Repeatable. The model as it is always is `base`.
    suite
        starter, or a file or hub id with a column `prompt` and optionally `label` (harmful or benign);
        a slice may follow: file.jsonl[400:520]. Repeatable. Default: starter.
    harmful
        The same; rows without a label count as harmful.
    benign
        The same; rows without a label count as harmless.
    out
        Folder for the run: rows.jsonl, summary.json. More systems and suites can be added to it later.
    max_new_tokens
        Length of a reply at most.
    batch_size
        Prompts at a time; changes no reply.
    limit
        At most this many prompts of each label from each suite.
    text
        Plain text for perplexity: a .jsonl with a column `text`, or a .txt file. Default: our own.
    """
    import postalign as pa

    from ..evaluation import load_suite, load_suites

    labelled = [load_suite(one, label="harmful") for one in harmful or []]
    labelled += [load_suite(one, label="benign") for one in benign or []]
    suites = load_suites([*(suite or ([] if labelled else ["starter"])), *labelled])
    if limit is not None:
        suites = [one.limited(limit) for one in suites]
    systems: dict[str, Alignment | None] = {"base": None, **load_alignments(alignment or [])}
    loaded, tokenizer = load_model(model, options)
    with progress() as on_progress:
        summary = pa.evaluate(
            loaded,
            tokenizer,
            systems,
            suites,
            out=out,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            text=text,
            on_progress=on_progress,
        )
    if as_json:
        print_json(summary)
    else:
        show(summary)
        print(f"\n{out}/summary.json and rows.jsonl hold the rest; a page of it: postalign report {out}")


def show(summary: list[dict[str, Any]]) -> None:
    """Two tables of a run: the share of each verdict in percent with its interval, then the other figures."""
    cells: dict[tuple[str, str | None, str], dict[str, dict[str, Any]]] = {}
    for row in summary:
        cells.setdefault((row["suite"], row["label"], row["system"]), {})[row["metric"]] = row
    shares, others = [], []
    for (suite, label, system), found in cells.items():
        if VERDICTS[0] in found:
            n = str(found[VERDICTS[0]]["n"])
            shares.append([suite, label or "-", system, n, *(percent(found[name]) for name in VERDICTS)])
        others += [
            [suite, label or "-", system, str(row["n"]), metric.replace("_", " "), number(row)]
            for metric, row in found.items()
            if metric not in VERDICTS
        ]
    shares.sort(key=lambda cells: cells[:2])
    others.sort(key=lambda cells: cells[:2])
    print_table(["suite", "label", "system", "n", *(f"{name} %" for name in VERDICTS)], shares)
    if others:
        print_table(["suite", "label", "system", "n", "measure", "value"], others)


def percent(row: dict[str, Any]) -> str:
    """`12.5 (8-18)`: a share and its 95 % interval, in percent."""
    return f"{100 * row['value']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})"


def number(row: dict[str, Any]) -> str:
    """A value and, where it has one, its interval; `-` for one that could not be measured."""
    if row["value"] is None:
        return "-"
    interval = "" if row["low"] is None else f" ({row['low']:.4g} to {row['high']:.4g})"
    return f"{row['value']:.4g}{interval}"
