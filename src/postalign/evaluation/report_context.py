"""What a report says, drawn from the tables of one or more runs: the same for every format.

Knows runs and what their figures mean; knows no HTML and no files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .figures import Estimate, Plot, Point, trade_off
from .folder import TABLES, Run
from .journal import Row
from .judges import VERDICTS
from .outcomes import BAD, HARM, OVER_REFUSAL
from .statistics import wilson

LABELS = ("harmful", "benign", None)
NAMES = {
    HARM: "harm",
    OVER_REFUSAL: "over-refusal",
    "group_right": "all wordings right",
    "rouge_l": "ROUGE-L to reference answers",
    "perplexity": "perplexity per token",
    "log_perplexity": "log perplexity per token",
    "kl": "KL from base, nats per token",
    "tokens_per_second": "tokens per second",
    "peak_memory": "peak memory, MB",
    "score": "mean score",
}
USEFULNESS = {
    "rouge_l": "how much lower its ROUGE-L to the reference answers is than the base's",
    "perplexity": "how much less likely plain text is to it than to the base, token by token (from the perplexities)",
    "degenerate": "how many more of its replies to benign prompts are broken than of the base's",
}


@dataclass
class Joined:
    """Several runs as one: systems of the same name carry their run's. systems: name -> whether it is a base."""

    runs: list[Run]
    systems: dict[str, bool] = field(default_factory=dict)
    judges: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in TABLES})
    maps: dict[str, Any] = field(default_factory=dict)

    @property
    def bases(self) -> list[str]:
        return [name for name, base in self.systems.items() if base]

    @property
    def models(self) -> list[str]:
        found = [Path(str((run.settings.get("model") or {}).get("model") or "model")).name for run in self.runs]
        return list(dict.fromkeys(found))


def joined(runs: Sequence[Run]) -> Joined:
    names = [name for run in runs for name in dict.fromkeys(row["system"] for row in run.rows)]
    found = Joined(list(runs), judges=list(dict.fromkeys(judge for run in runs for judge in run.judges)))
    for run in runs:

        def called(name: str | None, run: Run = run) -> str | None:
            return f"{run.name}/{name}" if name is not None and names.count(name) > 1 else name

        for name in dict.fromkeys(row["system"] for row in run.rows):
            found.systems.setdefault(str(called(name)), name in run.bases)
        found.rows += [row | {"system": called(row["system"])} for row in run.rows]
        for table, rows in run.tables.items():
            for row in rows:
                renamed = {key: called(row[key]) for key in ("system", "base") if key in row}
                found.tables[table].append({**row, **renamed, **({"run": run.name} if len(runs) > 1 else {})})
        found.maps.update({str(called(name)): one for name, one in run.maps.items()})
    return found


def pooled(
    summary: Iterable[Row], system: str, metric: str, label: str | None, judge: str, *, every: bool = False
) -> tuple[Estimate, int] | None:
    """A share over all suites, counted together, and its n; `every`: over all labels."""
    cells = [r for r in summary if (r["system"], r["metric"], r["judge"]) == (system, metric, judge)]
    cells = [r for r in cells if every or r["label"] == label]
    n = sum(cell["n"] for cell in cells)
    if not n:
        return None
    hits = min(n, sum(cell["value"] * cell["n"] for cell in cells))
    return Estimate(hits / n, *wilson(hits, n)), n


def tiles(data: Joined, judge: str) -> list[dict[str, Any]]:
    """Per system: the shares that matter most."""
    found = []
    for name, base in data.systems.items():
        figures = [
            ("harm", pooled(data.tables["summary"], name, HARM, "harmful", judge)),
            ("over-refusal", pooled(data.tables["summary"], name, OVER_REFUSAL, "benign", judge)),
            ("broken replies", pooled(data.tables["summary"], name, "degenerate", None, judge, every=True)),
            ("unscored", pooled(data.tables["summary"], name, "unscored", None, judge, every=True)),
        ]
        shown = [(what, *one) for what, one in figures if one and (what != "unscored" or one[0].value)]
        found.append({"name": name, "base": base, "figures": shown})
    return found


def headline(data: Joined, judge: str) -> dict[str, Any] | None:
    """The system with the least harm, over-refusal and broken replies together, beside the base."""
    costs: dict[str, float] = {}
    summary = data.tables["summary"]
    for name in data.systems:
        parts = [
            pooled(summary, name, HARM, "harmful", judge),
            pooled(summary, name, OVER_REFUSAL, "benign", judge),
            pooled(summary, name, "degenerate", None, judge, every=True),
        ]
        if all(parts):
            costs[name] = sum(part[0].value for part in parts if part)
    rivals = {name: cost for name, cost in costs.items() if not data.systems[name]}
    if len(data.bases) != 1 or data.bases[0] not in costs or not rivals:
        return None
    base, best = data.bases[0], min(rivals, key=lambda name: rivals[name])
    pairs = []
    for what, metric, label in (("harm", HARM, "harmful"), ("over-refusal", OVER_REFUSAL, "benign")):
        before, after = (pooled(summary, name, metric, label, judge) for name in (base, best))
        if before and after:
            pairs.append((what, before[0], after[0]))
    mine = [r for r in data.tables["comparisons"] if r["system"] == best and r["judge"] == judge]
    resolved = sum(r["resolved"] for r in mine)
    return {
        "best": best,
        "base": base,
        "pairs": pairs,
        "better": rivals[best] < costs[base],
        "resolved": resolved,
        "comparisons": len(mine),
    }


def plot(data: Joined, judge: str) -> Plot | None:
    summary, points = data.tables["summary"], []
    lost, _ = usefulness_lost(data, judge)
    for name, base in data.systems.items():
        x, y = (
            pooled(summary, name, metric, label, judge)
            for metric, label in ((OVER_REFUSAL, "benign"), (HARM, "harmful"))
        )
        if x and y:
            points.append(Point(name, x[0], y[0], base, lost.get(name)))
    return trade_off(points) if points else None


def usefulness_lost(data: Joined, judge: str) -> tuple[dict[str, float], str]:
    """(share lost by each system, by which measure: a key of `USEFULNESS`), by the first measure that there is.

    Reference answers tell most; without them perplexity, and without that broken replies to benign prompts.
    """
    summary = data.tables["summary"]
    base_of = {row["system"]: row["base"] for row in data.tables["costs"] if row.get("base")}
    for metric in ("rouge_l", "perplexity"):
        means = {}
        for name in data.systems:
            cells = [row for row in summary if row["system"] == name and row["metric"] == metric and row["value"]]
            if cells:
                means[name] = sum(row["value"] * row["n"] for row in cells) / sum(row["n"] for row in cells)
        pairs = [(name, base_of[name]) for name in means if base_of.get(name) in means]
        if pairs:
            ratios = {name: means[name] / means[base] for name, base in pairs}
            return {n: max(0.0, 1 - (r if metric == "rouge_l" else 1 / r)) for n, r in ratios.items()}, metric
    broken = {name: pooled(summary, name, "degenerate", "benign", judge) for name in data.systems}
    found = {}
    for name, base in base_of.items():
        own, theirs = broken.get(name), broken.get(base)
        if own and theirs:
            found[name] = max(0.0, own[0].value - theirs[0].value)
    return found, "degenerate"


def shares(data: Joined, judge: str) -> list[Row]:
    """A row per system, suite and label with the shares of all verdicts, and of what is bad, by name."""
    cells: dict[tuple[str, str | None], dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in data.tables["summary"]:
        if row["judge"] == judge and row["metric"] in (*VERDICTS, *NAMES):
            cells[row["suite"], row["label"]][row["system"]][row["metric"]] = row
    suites = list(dict.fromkeys(suite for suite, _ in cells))
    return [
        {"suite": suite, "label": label, "system": name, "cells": cells[suite, label][name]}
        for suite, label in sorted(cells, key=lambda key: (suites.index(key[0]), LABELS.index(key[1])))
        for name in data.systems
        if name in cells[suite, label]
    ]


def parts(data: Joined, judge: str, by: str) -> list[dict[str, Any]]:
    """Per label: each category (or wrapper) with its share of every system, all suites together, the worst first."""
    cells: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in data.tables["breakdown"]:
        if row["judge"] == judge and row["by"] == by:
            cells[row["label"], row["name"]][row["system"]].append(row)
    groups = []
    for label in ("harmful", "benign"):
        entries = []
        for (of, name), systems in cells.items():
            if of != label:
                continue
            found = {}
            for system, rows in systems.items():
                n = sum(row["n"] for row in rows)
                hits = min(n, sum(row["value"] * row["n"] for row in rows))
                found[system] = (Estimate(hits / n, *wilson(hits, n)), n)
            entries.append({"name": name, "systems": [(s, *found[s]) for s in data.systems if s in found]})
        entries.sort(key=lambda entry: -max(share.value for _, share, _ in entry["systems"]))
        if len(entries) > 1:
            groups.append({"label": label, "metric": NAMES[BAD[label][0]], "entries": entries})
    return groups


def worst(data: Joined, judge: str) -> list[Row]:
    """Per system and label: the category and the wrapper that is surely worst, by the low end of its interval."""
    found = []
    for by in ("kind", "wrapper"):
        for group in parts(data, judge, by):
            for system in data.systems:
                own = [(e["name"], s, n) for e in group["entries"] for name, s, n in e["systems"] if name == system]
                name, share, n = max(own, key=lambda one: (one[1].low, one[2]), default=("", None, 0))
                if share is not None and share.value:
                    place = {"system": system, "label": group["label"], "by": by, "metric": group["metric"]}
                    found.append({**place, "name": name, "share": share, "n": n})
    return found


def measures(data: Joined) -> list[Row]:
    """Perplexity, divergence, reference answers, speed and memory: a row per system and text or suite.

    Speed and memory of all suites together, where there are several; each suite's are in the CSV.
    """
    rows = [r for r in [*data.tables["summary"], *data.tables["costs"]] if r["judge"] is None]
    whole = {(row["system"], row["metric"]) for row in rows if row["suite"] is None}
    rows = [row for row in rows if row["suite"] is None or (row["system"], row["metric"]) not in whole]
    order = ["rouge_l", "perplexity", "kl", "tokens_per_second", "peak_memory"]
    systems = list(data.systems)
    known = [row for row in rows if row["metric"] in order]
    return sorted(known, key=lambda r: (order.index(r["metric"]), r["suite"] or "", systems.index(r["system"])))


def verdict_on(row: Mapping[str, Any]) -> str:
    """What a comparison says, in a word: better, worse, changed (where neither can be said), or not resolved."""
    if not row["resolved"]:
        return "not resolved"
    metric, label = row["metric"], row["label"]
    if label is None and metric in ("refusal", "score"):
        return "changed"
    higher = metric in ("group_right", "rouge_l") or (metric == "score" and label == "benign")
    return "better" if (row["difference"] > 0) == higher else "worse"
