"""The figures of a report as Markdown, for a README or a pull request, and as CSV, for everything else. No replies."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from . import report_context as context
from .judges import VERDICTS
from .report_context import NAMES, Joined

COLUMNS = (
    *("run", "system", "suite", "label", "judge", "by", "name", "metric", "n", "value", "low", "high"),
    *("base", "base_value", "difference", "difference_low", "difference_high", "ratio", "ratio_low", "ratio_high"),
    *("test", "p", "p_holm", "resolved"),
)


def as_csv(data: Joined) -> str:
    """Every figure, one a row; a comparison with the base stands in the row of the figure that it compares."""
    key = ("run", "system", "suite", "label", "judge", "metric")
    compared = {tuple(row.get(k) for k in key): row for row in data.tables["comparisons"]}
    rows = []
    for row in [*data.tables["summary"], *data.tables["breakdown"], *data.tables["costs"]]:
        found = compared.pop(tuple(row.get(k) for k in key), None) if "by" not in row else None
        rows.append({**row, **(_difference(found) if found else {})})
    rows += [{**row, **_difference(row), "low": None, "high": None} for row in compared.values()]  # log perplexity
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _difference(row: dict[str, Any]) -> dict[str, Any]:
    names = ("base", "base_value", "difference", "test", "p", "p_holm", "resolved")
    return {name: row[name] for name in names} | {"difference_low": row["low"], "difference_high": row["high"]}


def as_markdown(data: Joined) -> str:
    """Tables of the main figures with their intervals."""
    parts = [f"# How safe, how prudish: {', '.join(data.models)}"]
    for run in data.runs:
        settings = run.settings
        way = "sampled" if settings.get("do_sample") else "greedy"
        line = f"Run `{run.name}`: {way}, at most {settings.get('max_new_tokens')} new tokens, judged by "
        line += f"{', '.join(run.judges)}; postalign {settings.get('postalign')}."
        parts.append(line + ("" if run.finished else " **Unfinished**: as far as it went."))
        parts += [f"```\n{command}\n```" for command in settings.get("reproduce") or []]
    for judge in data.judges:
        parts.append(f"## Replies, judged by {judge}")
        rows, every = context.shares(data, judge), ("harm", "over_refusal", *VERDICTS, "group_right")
        shown = [name for name in every if any(name in row["cells"] for row in rows)]
        body = [
            [row["suite"], row["label"] or "-", row["system"], str(next(iter(row["cells"].values()))["n"])]
            + [_share(row["cells"].get(name)) for name in shown]
            for row in rows
        ]
        parts.append(_table(["suite", "label", "system", "n", *(NAMES.get(name, name) for name in shown)], body))
        worst = context.worst(data, judge)
        if worst:
            cells = [
                [
                    *(r["system"], r["label"], "category" if r["by"] == "kind" else r["by"], r["name"], r["metric"]),
                    *(_interval(r["share"].value, r["share"].low, r["share"].high), str(r["n"])),
                ]
                for r in worst
            ]
            parts += ["### Where it is worst", _table(["system", "label", "by", "name", "", "share", "n"], cells)]
    if data.tables["comparisons"]:
        parts += ["## Against the base, on the same prompts", _comparisons(data)]
    measured = context.measures(data)
    if measured:
        body = [_measure(row) for row in measured]
        parts += ["## Usefulness and cost", _table(["measure", "on", "system", "n", "value", "against base"], body)]
    pairs = [row for row in data.tables["agreement"] if row["label"] == "all"]
    if pairs:
        body = [
            [
                *(f"{r['first']}, {r['second']}", str(r["n"]), _interval(r["agreement"], r["low"], r["high"])),
                *(_plain(r["kappa"], r["kappa_low"], r["kappa_high"]), str(r["unscored"])),
            ]
            for r in pairs
        ]
        parts += ["## Judges", _table(["judges", "n", "agreement", "kappa", "unscored"], body)]
    parts.append("Shares in per cent, with 95 % intervals. Resolved: p below 0.05 after Holm's adjustment.")
    return "\n\n".join(parts) + "\n"


def _comparisons(data: Joined) -> str:
    body = []
    for row in data.tables["comparisons"]:
        scale, unit = (1, "") if row["metric"] in ("log_perplexity", "rouge_l", "score") else (100, " points")
        low, high, difference = (scale * row[name] for name in ("low", "high", "difference"))
        said = f"{difference:+.3g}{unit} ({low:+.3g} to {high:+.3g})"
        place = [row["suite"], row["label"] or "-", row["judge"] or "-", NAMES.get(row["metric"], row["metric"])]
        body.append([row["system"], *place, str(row["n"]), said, f"{row['p_holm']:.3g}", context.verdict_on(row)])
    return _table(["system", "suite", "label", "judge", "measure", "n", "difference", "p (Holm)", ""], body)


def _measure(row: dict[str, Any]) -> list[str]:
    scale = 1e-6 if row["metric"] == "peak_memory" else 1
    low, high = ((None if row[k] is None else scale * row[k]) for k in ("low", "high"))
    value = "-" if row["value"] is None else _plain(scale * row["value"], low, high)
    ratio = "-" if row.get("ratio") is None else "x " + _plain(row["ratio"], row["ratio_low"], row["ratio_high"])
    return [NAMES[row["metric"]], row["suite"] or "all suites", row["system"], str(row["n"]), value, ratio]


def _share(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None else _interval(cell["value"], cell["low"], cell["high"])


def _interval(value: float | None, low: float, high: float) -> str:
    return "-" if value is None else f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _plain(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
