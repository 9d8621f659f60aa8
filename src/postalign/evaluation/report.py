"""One self-contained HTML page from one or more runs: table, trade-off, head map, prompts side by side.

Knows the files of a run and what the template needs; the drawing's geometry is in `figures.py`, the look in
`report.html.j2`. The page asks the network for nothing; every text in it is escaped; harmful replies stay
folded.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..errors import UsageError
from ..files import write_whole
from .figures import Estimate, HeadMap, Plot, Point, head_map_figure, trade_off
from .journal import Journal, Row
from .judges import VERDICTS
from .run_settings import head_map
from .runner import MEASURE_KEY, ROW_KEY, summarize
from .statistics import wilson

LABELS = ("harmful", "benign", None)
MEASURE_NAMES = {
    "perplexity": "perplexity per token",
    "kl": "KL from base, nats per token",
    "tokens_per_second": "tokens per second",
}


@dataclass(frozen=True)
class Run:
    """One run as read from its folder. finished: its summary was written."""

    name: str
    settings: dict[str, Any]
    rows: list[Row]
    summary: list[Row]
    maps: dict[str, Any]
    finished: bool


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    alignments: Mapping[str, Any] | Sequence[str | Path] | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Write the page for `runs` (folders made by `evaluate`) to `out`, whole, and return its path.

    alignments: more head maps than the runs keep: name -> Alignment or folder, or folders by their own names.
    An unfinished run is shown as far as it went. Raises UsageError when a folder is not a run or holds no
    rows.
    """
    loaded = [read_run(Path(run)) for run in runs]
    if not loaded:
        raise UsageError("no run given: name a folder that `postalign eval` made.")
    systems, rows, summary, maps = _joined(loaded)
    maps.update(_extra_maps(alignments))
    bases = [name for name, base in systems.items() if base]
    page = _template().render(
        title=title or "How safe, how prudish: " + ", ".join(dict.fromkeys(_model_name(run) for run in loaded)),
        runs=loaded,
        models=list(dict.fromkeys(_model_name(run) for run in loaded)),
        headline=_headline(systems, summary),
        tiles=_tiles(systems, summary),
        bases=bases,
        colours={name: i % 8 for i, name in enumerate(systems)},
        verdicts=VERDICTS,
        table=_table(systems, summary),
        measures=_measures(systems, summary),
        plot=_plot(systems, summary),
        maps=_figures(maps),
        suites=_prompts(systems, rows),
        systems=list(systems),
    )
    out = Path(out)
    write_whole(out, page)
    return out


def read_run(folder: Path) -> Run:
    """The files of a run. Raises UsageError when `folder` is not one, or has no rows yet."""
    if not (folder / "run.json").exists():
        raise UsageError(f"{folder} is not a run (no run.json): name a folder that `postalign eval` made.")
    try:
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        finished = (folder / "summary.json").exists()
        rows = Journal(folder / "rows.jsonl", ROW_KEY).rows
        measures = Journal(folder / "measures.jsonl", MEASURE_KEY).rows
        summary = (
            json.loads((folder / "summary.json").read_text(encoding="utf-8")) if finished else summarize(rows, measures)
        )
        path = folder / "head_effects.json"
        maps = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UsageError(f"a file of the run {folder} is damaged ({error}): run `postalign eval` again.") from error
    if not rows:
        raise UsageError(f"the run {folder} has no rows yet: let `postalign eval` finish first.")
    return Run(folder.resolve().name, settings, rows, summary, maps, finished)


def _joined(runs: Sequence[Run]) -> tuple[dict[str, bool], list[Row], list[Row], dict[str, Any]]:
    """(system -> is it a base, rows, summary, maps) of all runs; a system of the same name in two runs gets
    the run's.
    """
    names: list[str] = [name for run in runs for name in dict.fromkeys(row["system"] for row in run.rows)]
    systems: dict[str, bool] = {}
    rows: list[Row] = []
    summary: list[Row] = []
    maps: dict[str, Any] = {}
    for run in runs:
        known = run.settings.get("systems", {})

        def called(name: str, run: Run = run) -> str:
            return f"{run.name}/{name}" if names.count(name) > 1 else name

        for row in run.rows:
            systems.setdefault(called(row["system"]), row["system"] in known and known[row["system"]] is None)
        rows += [row | {"system": called(row["system"])} for row in run.rows]
        summary += [row | {"system": called(row["system"])} for row in run.summary]
        maps.update({called(name): one for name, one in run.maps.items()})
    return systems, rows, summary, maps


def _extra_maps(alignments: Mapping[str, Any] | Sequence[str | Path] | None) -> dict[str, Any]:
    if not alignments:
        return {}
    named = alignments if isinstance(alignments, Mapping) else {Path(folder).name: folder for folder in alignments}
    found = {}
    for name, one in named.items():
        if isinstance(one, (str, Path)):
            from ..alignment import Alignment

            one = Alignment.from_pretrained(one)
        drawn = head_map(one) if one is not None else None
        if drawn is not None:
            found[name] = drawn
    return found


def _figures(maps: Mapping[str, Any]) -> list[HeadMap]:
    """One figure per different map: systems made from one fit share theirs."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, one in maps.items():
        names[json.dumps([one["effects"], one["heads"]])].append(name)
    return [head_map_figure(", ".join(shared), *json.loads(key)) for key, shared in names.items()]


def _model_name(run: Run) -> str:
    model = run.settings.get("model") or {}
    return Path(str(model.get("model") or "model")).name


def _pooled(
    summary: Iterable[Row], system: str, metric: str, label: str | None, *, every: bool = False
) -> tuple[Estimate, int] | None:
    """A verdict's share over all suites, counted together, and its n; `every`: over all labels."""
    cells = [r for r in summary if r["system"] == system and r["metric"] == metric and (every or r["label"] == label)]
    n = sum(cell["n"] for cell in cells)
    if not n:
        return None
    hits = sum(round(cell["value"] * cell["n"]) for cell in cells)
    return Estimate(hits / n, *wilson(hits, n)), n


def _tiles(systems: Mapping[str, bool], summary: list[Row]) -> list[dict[str, Any]]:
    tiles = []
    for name, base in systems.items():
        figures = [
            ("harmful compliance", _pooled(summary, name, "compliance", "harmful")),
            ("false refusals", _pooled(summary, name, "refusal", "benign")),
            ("broken replies", _pooled(summary, name, "degenerate", None, every=True)),
        ]
        tiles.append({"name": name, "base": base, "figures": [(what, *one) for what, one in figures if one]})
    return tiles


def _headline(systems: Mapping[str, bool], summary: list[Row]) -> dict[str, Any] | None:
    """The system with the least harmful compliance, false refusals and broken replies together, beside the
    base.
    """
    bases = [name for name, base in systems.items() if base]
    costs: dict[str, float] = {}
    for name in systems:
        parts = [
            _pooled(summary, name, "compliance", "harmful"),
            _pooled(summary, name, "refusal", "benign"),
            _pooled(summary, name, "degenerate", None, every=True),
        ]
        if all(parts):
            costs[name] = sum(part[0].value for part in parts if part)
    rivals = {name: cost for name, cost in costs.items() if not systems[name]}
    if len(bases) != 1 or bases[0] not in costs or not rivals:
        return None
    best = min(rivals, key=lambda name: rivals[name])
    pairs = []
    for what, metric, label in (
        ("harmful compliance", "compliance", "harmful"),
        ("false refusals", "refusal", "benign"),
    ):
        before, after = _pooled(summary, bases[0], metric, label), _pooled(summary, best, metric, label)
        if before and after:
            pairs.append((what, before[0], after[0]))
    return {"best": best, "base": bases[0], "pairs": pairs, "better": rivals[best] < costs[bases[0]]}


def _table(systems: Mapping[str, bool], summary: list[Row]) -> list[dict[str, Any]]:
    cells: dict[tuple[str, str | None], dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in summary:
        if row["metric"] in VERDICTS:
            cells[row["suite"], row["label"]][row["system"]][row["metric"]] = row
    groups = []
    for suite, label in sorted(
        cells, key=lambda key: (list(dict.fromkeys(s for s, _ in cells)).index(key[0]), LABELS.index(key[1]))
    ):
        found = cells[suite, label]
        groups.append(
            {
                "suite": suite,
                "label": label,
                "rows": [(name, found[name]) for name in systems if name in found],
            }
        )
    return groups


def _measures(systems: Mapping[str, bool], summary: list[Row]) -> list[dict[str, Any]]:
    """Perplexity, divergence and speed, each on each text, one row per system."""
    groups = []
    for metric in MEASURE_NAMES:
        for suite in dict.fromkeys(row["suite"] for row in summary if row["metric"] == metric):
            rows = {row["system"]: row for row in summary if (row["metric"], row["suite"]) == (metric, suite)}
            ordered = [(name, rows[name]) for name in systems if name in rows]
            groups.append({"what": MEASURE_NAMES[metric], "suite": suite, "rows": ordered})
    return groups


def _plot(systems: Mapping[str, bool], summary: list[Row]) -> Plot | None:
    points = []
    for name, base in systems.items():
        x, y = _pooled(summary, name, "refusal", "benign"), _pooled(summary, name, "compliance", "harmful")
        if x and y:
            points.append(Point(name, x[0], y[0], base))
    return trade_off(points) if points else None


def _prompts(systems: Mapping[str, bool], rows: list[Row]) -> list[dict[str, Any]]:
    """Per suite and label, each prompt with the replies of all systems, in the order of the runs."""
    asked: dict[tuple[str, str | None], dict[tuple[str, str], dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        asked[row["suite"], row["label"]][row["id"], row["prompt"]][row["system"]] = row
    groups = []
    for (suite, label), prompts in asked.items():
        entries = []
        for (_, prompt), found in prompts.items():
            replies = [(name, found[name]) for name in systems if name in found]
            same = len({row["verdict"] for _, row in replies}) == 1
            entries.append({"prompt": prompt, "replies": replies, "same": same})
        groups.append({"suite": suite, "label": label, "prompts": entries, "folded": label != "benign"})
    return groups


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.4g}"
    return environment.get_template("report.html.j2")


__all__ = ["HeadMap", "Run", "read_run", "write_report"]
