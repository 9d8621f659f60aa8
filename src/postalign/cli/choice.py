"""`postalign choice`: multiple-choice questions on safety, with and without alignments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from .common import Json, ModelOptions, load_alignments, load_model, note, print_json, print_table, progress

if TYPE_CHECKING:
    from ..alignment import Alignment


def run(
    model: str = "smollm2",
    /,
    *,
    suite: str = "safetybench",
    answers: Path | None = None,
    alignment: Annotated[list[Path] | None, Parameter(negative=())] = None,
    protocol: Literal["letters", "text"] = "letters",
    shots: str | None = None,
    data_dir: Path | None = None,
    out: Path,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    as_json: Json = False,
    options: ModelOptions | None = None,
) -> None:
    """Accuracy on multiple-choice questions, by category. Interrupted, the same command goes on where it was.

    Parameters
    ----------
    model
        smollm2, smollm2-fragile, a folder, a *.gguf file or a hub id.
    suite
        safetybench (English), safetybench:zh, safetybench:zh_subset, a file in its columns (safetybench=FILE), or any
        file with the columns question, options and category, and optionally id and answer.
    answers
        The right ones, {"ID": {"answer": 0}}: SafetyBench has them in its repository (opensource_data). Without, the
        choices are written down and not scored.
    alignment
        Folder of an alignment; its name is the system's. Repeatable. The model as it is always is `base`.
    protocol
        letters: the likeliest letter behind an opening bracket. text: the letter that the reply names.
    shots
        Worked examples first: a file {"CATEGORY": [{"question", "options", "answer"}]}, or en or zh for SafetyBench's.
    data_dir
        Folder whose NAME.jsonl (csv, json, parquet) take the place of the hub. Default: POSTALIGN_DATA.
    out
        Folder for the run: choices.jsonl, choices.json, submission-SYSTEM.json.
    limit
        At most this many questions of each category.
    max_new_tokens
        Length of a reply at most (text).
    batch_size
        Questions at a time (text); changes no reply.
    """
    from ..evaluation.choice_questions import load_questions, load_shots
    from ..evaluation.multiple_choice import evaluate_choices

    questions = load_questions(suite, answers=answers, data_dir=data_dir)
    if limit is not None:
        questions = questions.limited(limit)
    examples = load_shots(shots) if shots is not None else None
    systems: dict[str, Alignment | None] = {"base": None, **load_alignments(alignment or [])}
    loaded, tokenizer = load_model(model, options)
    with progress() as on_progress:
        summary = evaluate_choices(
            loaded,
            tokenizer,
            systems,
            questions,
            out=out,
            protocol=protocol,
            shots=examples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    if not summary:
        note("The right answers are not known: nothing was scored. Name them with --answers and run this again.")
    if as_json:
        print_json(summary)
        return
    header = ["category", "system", "n", "accuracy %", "unparsed as wrong %", "unparsed", "chance %"]
    rows = [
        [
            row["category"],
            row["system"],
            str(row["n"]),
            f"{100 * row['accuracy']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})",
            f"{100 * row['strict']:.1f}",
            str(row["unparsed"]),
            f"{100 * row['chance']:.1f}",
        ]
        for row in summary
    ]
    if rows:
        print_table(header, sorted(rows, key=lambda row: (row[0] == "all", row[0])))
    print(f"\n{out}/choices.jsonl and choices.json hold the rest.")
