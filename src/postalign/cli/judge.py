"""`postalign judge`: score replies with a judge, or measure judges against people's labels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from ..errors import UsageError
from .common import Json, note, print_json, print_table, progress, read_config

app = App(name="judge", help="Score replies with a judge, or measure judges against people's labels.")
Judges = Annotated[list[str], Parameter(negative=())]
Settings = Annotated[list[str] | None, Parameter(name="--set", negative=())]


@app.command
def calibrate(
    file: Path,
    /,
    *,
    judge: Judges,
    prompt_column: str = "prompt",
    response_column: str = "response",
    label_column: str = "label",
    mapping: Annotated[list[str] | None, Parameter(name="--map", negative=())] = None,
    positive: str | None = None,
    limit: int | None = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Measure judges against labelled replies: accuracy, precision, recall, kappa with its interval, confusion.

    Parameters
    ----------
    file
        A .csv, .jsonl, .json or .parquet file with prompts, replies and labels.
    judge
        rules, embedded, embedded:harm, model:HUB_ID_OR_FOLDER[:format] or endpoint:MODEL@BASE_URL. Repeatable: how far
        the judges agree is told too.
    prompt_column
        The column of the prompts.
    response_column
        The column of the replies.
    label_column
        The column of the labels: refusal, partial, compliance, degenerate, or what --map says.
    mapping
        VALUE=VERDICT: what a label means, such as 1=compliance; VALUE=skip leaves such rows out. Repeatable.
    positive
        Compare only this verdict against all others together.
    limit
        The first so many labelled rows.
    settings
        key=value for every --judge, such as batch_size=4 or budget_usd=2. Repeatable.
    """
    from ..evaluation.calibration import between, read_replies
    from ..evaluation.calibration import calibrate as measure

    columns = {"prompt": prompt_column, "response": response_column, "label": label_column}
    replies = read_replies(file, **columns, mapping=_mapping(mapping or []), limit=limit)
    loaded = _load(judge, settings)
    results, verdicts = [], []
    with progress() as on_progress:
        for one in loaded:
            _tell_cost(one, replies.pairs)
            figures, said = measure(one, replies, positive=positive, on_progress=on_progress)
            results.append(figures)
            verdicts.append(said)
            _tell_spent(one)
    pairs = [
        {"judges": [results[a]["judge"], results[b]["judge"]], **between(verdicts[a], verdicts[b], replies.pairs)}
        for a, b in itertools.combinations(range(len(loaded)), 2)
    ]
    if as_json:
        print_json({"file": file.name, "judges": results, "agreement": pairs})
        return
    for figures in results:
        _show(figures)
    if pairs:
        cells = [[" and ".join(p["judges"]), str(p["n"]), str(p["unscored"]), _interval(p)] for p in pairs]
        print_table(["judges", "both scored", "unscored", "kappa"], cells)


@app.command
def score(
    file: Path,
    /,
    *,
    judge: str,
    out: Path,
    prompt_column: str = "prompt",
    response_column: str = "response",
    limit: int | None = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Judge the replies of a file. Interrupted, the same command goes on where it was.

    Parameters
    ----------
    file
        A .csv, .jsonl, .json or .parquet file with prompts and replies.
    judge
        rules, embedded, embedded:harm, model:HUB_ID_OR_FOLDER[:format] or endpoint:MODEL@BASE_URL.
    out
        A .jsonl file: for each reply its row in FILE, prompt, response, verdict, score, reason and judge.
    prompt_column
        The column of the prompts.
    response_column
        The column of the replies.
    limit
        The first so many rows.
    settings
        key=value for the judge, such as batch_size=4 or budget_usd=2. Repeatable.
    """
    from ..evaluation.calibration import judge_in_chunks, read_replies
    from ..evaluation.journal import Journal
    from ..evaluation.judges import VERDICTS, judge_name

    replies = read_replies(file, prompt=prompt_column, response=response_column, limit=limit)
    [loaded] = _load([judge], settings)
    name = judge_name(loaded)
    journal = Journal(out, ("row", "judge"))
    known = {where: i for i, where in enumerate(replies.where)}
    for row in journal.rows:
        pair = (row.get("prompt"), row.get("response"))
        if row["judge"] != name or row["row"] not in known or replies.pairs[known[row["row"]]] != pair:
            raise UsageError(f"{out} holds verdicts of another judge or file: choose another --out.")
    missing = [i for i, where in enumerate(replies.where) if (where, name) not in journal]
    todo = [replies.pairs[i] for i in missing]
    _tell_cost(loaded, todo)
    with progress() as on_progress:
        done = 0
        for verdicts in judge_in_chunks(loaded, todo, on_progress):
            part = missing[done : done + len(verdicts)]
            journal.append(
                {
                    "row": replies.where[i],
                    "prompt": replies.pairs[i][0],
                    "response": replies.pairs[i][1],
                    "verdict": verdict.verdict,
                    "score": verdict.score,
                    "reason": verdict.reason,
                    "judge": name,
                }
                for i, verdict in zip(part, verdicts, strict=True)
            )
            done += len(verdicts)
    _tell_spent(loaded)
    counts = {verdict: sum(row["verdict"] == verdict for row in journal.rows) for verdict in VERDICTS}
    if as_json:
        print_json({"out": str(out), "judge": name, "n": len(journal.rows), "verdicts": counts})
    else:
        print_table(["judge", "n", *counts], [[name, str(len(journal.rows)), *map(str, counts.values())]])
        print(out)


def _load(specs: list[str], settings: list[str] | None) -> list[Any]:
    from ..evaluation.judge_specs import load_judge

    return [load_judge(spec, **read_config(None, settings or [])) for spec in specs]


def _mapping(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        value, equals, verdict = text.rpartition("=")
        if not equals or not value:
            raise UsageError(f"--map {text!r} must read VALUE=VERDICT.")
        found[value.strip()] = verdict.strip()
    return found


def _tell_cost(judge: Any, pairs: Any) -> None:
    if hasattr(judge, "estimate") and pairs:
        note(f"{judge.name}: at most {judge.estimate(pairs)}")


def _tell_spent(judge: Any) -> None:
    if hasattr(judge, "spent"):
        note(f"{judge.name}: used {judge.spent}")


def _show(figures: dict[str, Any]) -> None:
    """One judge: a line of totals, precision and recall, and the confusion table."""
    accuracy = "-" if figures["accuracy"] is None else f"{100 * figures['accuracy']:.1f} %"
    print(
        f"{figures['judge']}: {figures['n']} replies, {figures['unscored']} unscored, accuracy {accuracy}, "
        f"kappa {_interval(figures)}"
    )
    for reason in figures["unscored_reasons"]:
        print(f"  unscored: {reason}")
    names = list(figures["verdicts"])
    cells = [[name, _percent(v["precision"]), _percent(v["recall"])] for name, v in figures["verdicts"].items()]
    print_table(["verdict", "precision %", "recall %"], cells)
    table = figures["confusion"]
    print_table(["label \\ verdict", *names], [[a, *(str(table[a][b]) for b in names)] for a in names])


def _percent(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "-"
    return f"{100 * share['value']:.1f} ({100 * share['low']:.0f}-{100 * share['high']:.0f})"


def _interval(figures: dict[str, Any]) -> str:
    if figures["kappa"] is None:
        return "-"
    return f"{figures['kappa']:.3f} ({figures['low']:.3f} to {figures['high']:.3f})"
