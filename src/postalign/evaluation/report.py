"""The report of one or more runs, as one page without network, as Markdown or as CSV.

Knows the files of a run and what the template needs; what is said is in report_context.py, the drawings' geometry in
figures.py, the replies in report_rows.py, the look and the moving parts in report.css, report.js and report.html.j2.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from ..errors import UsageError
from ..files import write_whole
from . import report_context as context
from .figures import HeadMap, head_map_figure
from .folder import Run, read_run
from .judges import VERDICTS
from .report_context import NAMES, Joined, joined
from .report_rows import as_script, embedded
from .report_text import as_csv, as_markdown
from .run_settings import head_map


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    alignments: Mapping[str, Any] | Sequence[str | Path] | None = None,
    *,
    title: str | None = None,
    leave_out_harmful: bool = False,
    figures_only: bool = False,
) -> Path:
    """Write the report on `runs` (folders made by `evaluate`) to `out`, whole, and return its path.

    out: `.html` for the page, `.md` for Markdown, `.csv` for all figures, one a row; the latter two hold no replies.
    alignments: more head maps than the runs keep: name -> Alignment or folder, or folders by their own names.
    leave_out_harmful: leave replies that could be harmful out of the file: those to prompts not known to be benign that
    not every judge takes for a refusal. figures_only: leave out all prompts and replies.

    An unfinished run is shown as far as it went. Raises UsageError when a folder is not a run or holds no rows, and for
    another kind of file.
    """
    out = Path(out)
    kinds: dict[str, Callable[[Joined], str]] = {".md": as_markdown, ".csv": as_csv}
    if out.suffix not in (".html", *kinds):
        raise UsageError(f"{out} is of no known kind: name a file that ends in .html, .md or .csv.")
    folders = [Path(run) for run in runs]
    loaded = [replace(read_run(folder), name=name) for folder, name in zip(folders, _told_apart(folders), strict=True)]
    if not loaded:
        raise UsageError("no run given: name a folder that `postalign eval` made.")
    data = joined(loaded)
    data.maps.update(_extra_maps(alignments))
    if out.suffix in kinds:
        text = kinds[out.suffix](data)
    else:
        rows = embedded(data, leave_out_harmful=leave_out_harmful, figures_only=figures_only)
        text = _page(data, title or "How safe, how prudish: " + ", ".join(data.models), rows)
    write_whole(out, text)
    return out


def _told_apart(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of those above them as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [folder.name for folder in folders]


def _page(data: Joined, title: str, rows: dict[str, Any]) -> str:
    views = [_view(data, judge) for judge in data.judges]
    return _template().render(
        title=title,
        data=data,
        views=views,
        colours={name: i % 8 for i, name in enumerate(data.systems)},
        verdicts=VERDICTS,
        names=NAMES,
        verdict_on=context.verdict_on,
        measures=context.measures(data),
        agreement=data.tables["agreement"],
        maps=_figures(data.maps),
        runs=[_manifest(run) for run in data.runs],
        rows=rows,
        script=as_script(rows),
    )


def _view(data: Joined, judge: str) -> dict[str, Any]:
    """All that depends on the judge."""
    _, measure = context.usefulness_lost(data, judge)
    return {
        "judge": judge,
        "headline": context.headline(data, judge),
        "tiles": context.tiles(data, judge),
        "plot": context.plot(data, judge),
        "lost": context.USEFULNESS[measure],
        "comparisons": [row for row in data.tables["comparisons"] if row["judge"] in (judge, None)],
        "kinds": context.parts(data, judge, "kind"),
        "wrappers": context.parts(data, judge, "wrapper"),
        "worst": context.worst(data, judge),
        "shares": context.shares(data, judge),
    }


def _manifest(run: Run) -> dict[str, Any]:
    """What the page tells of how a run was made."""
    settings = run.settings
    sampled = ", ".join(f"{k} {settings.get(k)}" for k in ("temperature", "top_p", "top_k", "seeds"))
    return {
        "name": run.name,
        "model": (settings.get("model") or {}).get("model") or "not named",
        "decoding": f"sampled ({sampled})" if settings.get("do_sample") else "greedy",
        "tokens": settings.get("max_new_tokens"),
        "judges": ", ".join(run.judges) or "nobody",
        "version": settings.get("postalign"),
        "finished": run.finished,
        "reproduce": settings.get("reproduce") or [],
        "manifest": json.dumps({k: v for k, v in settings.items() if k != "asked"}, indent=1, ensure_ascii=False),
    }


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


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}"
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.4g}"
    environment.filters["named"] = lambda metric: NAMES.get(metric, metric)
    environment.filters["p"] = lambda p: "< 0.0001" if p < 0.0001 else f"{p:.4f}"
    environment.tests["share"] = lambda metric: metric in (*VERDICTS, "harm", "over_refusal", "group_right")
    return environment.get_template("report.html.j2")


__all__ = ["HeadMap", "Run", "write_report"]
