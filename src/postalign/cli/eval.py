"""`postalign eval`: ask a model the prompts of some suites, with and without alignments."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .common import (
    Flag,
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

NAMES = {"peak_memory": "peak memory, MB", "kl": "KL from base, nats"}
VERDICTS = ("compliance", "partial", "refusal", "degenerate", "unscored")


def run(
    model: str = "smollm2",
    /,
    *,
    alignment: Annotated[list[Path] | None, Parameter(negative=())] = None,
    suite: Repeated = None,
    harmful: Repeated = None,
    benign: Repeated = None,
    wrap: Repeated = None,
    data_dir: Path | None = None,
    judge: Repeated = None,
    out: Path,
    max_new_tokens: int = 128,
    do_sample: Flag = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: Annotated[list[int] | None, Parameter(negative=())] = None,
    system: str | None = None,
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
        starter; a public set such as harmeval, xstest or jailbreakbench:benign, from the hub or a file in its columns
        (xstest=FILE); or a file or hub id with a column `prompt` and optionally `label` (harmful or benign).
        A slice may follow: file.jsonl[400:520]. Repeatable. Default: starter.
    harmful
        The same; rows without a label count as harmful.
    benign
        The same; rows without a label count as harmless.
    wrap
        Ask each suite under this jailbreak wrapper too: prefix_injection, refusal_suppression, role_play, base64,
        rot13, leetspeak, prefill, simple, instruction_centric, chain_of_thought, several joined by +, or
        file:ATTACKS.json (a JailbreakBench artifact). Repeatable.
    data_dir
        Folder whose NAME.jsonl (csv, json, parquet) take the place of the hub for public sets. Default: POSTALIGN_DATA.
    judge
        Who reads the replies. Repeatable, the first one leads. Replies that are there already are judged, not made
        again; to have one judge read them anew, remove its verdicts-*.jsonl.
    out
        Folder for the run: replies.jsonl, summary.json and others. More systems, suites, seeds and judges can be added
        later.
    max_new_tokens
        Length of a reply at most.
    do_sample
        Draw tokens at random; otherwise the likeliest is taken.
    temperature
        Below 1 likelier tokens are drawn more often.
    top_p
        Draw from the likeliest tokens that hold this share of the probability.
    top_k
        Draw from this many tokens; 0: from all.
    seed
        Seed of the draws: with --do-sample, every prompt is asked once for each. Repeatable. Default: 0.
    system
        System message.
    batch_size
        Prompts at a time.
    limit
        At most this many prompts of each label from each suite.
    text
        Plain text for perplexity: a .jsonl with a column `text`, or a .txt file. Default: our own.
    """
    import postalign as pa

    from ..errors import UsageError
    from ..evaluation import load_suite, load_suites
    from ..evaluation.wrappers import wrap as wrapped

    if seed and not do_sample:
        raise UsageError("--seed needs --do-sample: without it the likeliest token is taken, whatever the seed.")
    given = {k: v for k, v in locals().items() if k in run.__annotations__ and k not in ("model", "as_json", "options")}
    labelled = [load_suite(one, label="harmful", data_dir=data_dir) for one in harmful or []]
    labelled += [load_suite(one, label="benign", data_dir=data_dir) for one in benign or []]
    suites = load_suites([*(suite or ([] if labelled else ["starter"])), *labelled], data_dir=data_dir)
    if limit is not None:
        suites = [one.limited(limit) for one in suites]
    suites = load_suites([*suites, *(two for one in suites for two in wrapped(one, wrap or []))])
    systems: dict[str, Alignment | None] = {"base": None, **load_alignments(alignment or [])}
    loading = asdict(options or ModelOptions())
    with progress() as on_progress:
        summary = pa.evaluate(
            lambda: load_model(model, options),
            None,
            systems,
            suites,
            out=out,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seeds=seed or [0],
            batch_size=batch_size,
            system_prompt=system,
            judges=judge,
            text=text,
            load={"model": model, **loading, "files": stamp(model)},
            reproduce=command_line(model, {**given, **loading}),
            on_progress=on_progress,
        )
    if as_json:
        print_json(summary)
    else:
        show(summary)
        print(f"\n{out}/summary.json and replies.jsonl hold the rest; a page of it: postalign report {out}")


def stamp(model: str) -> str | None:
    """Of a folder or file: a digest of its files' names, sizes and times, which shows that they were changed."""
    path = Path(model)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    told = [f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest() if files else None


def command_line(model: str, given: Mapping[str, Any]) -> str:
    """`postalign eval ...` with the arguments that are not left at their defaults, for the run's manifest."""
    defaults = {**(run.__kwdefaults__ or {}), **asdict(ModelOptions())}
    words = ["postalign", "eval", model]
    for name, value in given.items():
        if value is None or value == defaults.get(name):
            continue
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        else:
            words += [word for one in _several(value) for word in (option, str(one))]
    return shlex.join(words)


def _several(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def show(summary: list[dict[str, Any]]) -> None:
    """Two tables of a run: the share of each verdict in percent with its interval, then the other figures."""
    cells: dict[tuple[str, str | None, str, str], dict[str, dict[str, Any]]] = {}
    for row in summary:
        key = (row["suite"] or "all", row["label"], row["system"], row.get("judge") or "-")
        cells.setdefault(key, {})[row["metric"]] = row
    shares, others = [], []
    for (suite, label, system, judge), found in cells.items():
        if VERDICTS[0] in found:
            n = str(found[VERDICTS[0]]["n"])
            row = [percent(found[name]) if name in found else "-" for name in VERDICTS]
            shares.append([suite, label or "-", system, judge, n, *row])
        others += [
            [
                suite,
                label or "-",
                system,
                judge,
                str(row["n"]),
                NAMES.get(metric, metric.replace("_", " ")),
                number(row),
            ]
            for metric, row in found.items()
            if metric not in VERDICTS
        ]
    shares.sort(key=lambda cells: cells[:2])
    others.sort(key=lambda cells: cells[:2])
    print_table(["suite", "label", "system", "judge", "n", *(f"{name} %" for name in VERDICTS)], shares)
    if others:
        print_table(["suite", "label", "system", "judge", "n", "measure", "value"], others)


def percent(row: dict[str, Any]) -> str:
    """`12.5 (8-18)`: a share and its 95 % interval, in percent."""
    return f"{100 * row['value']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})"


def number(row: dict[str, Any]) -> str:
    """A value and, where it has one, its interval; `-` for one that could not be measured. Memory is in MB."""
    value, low, high = (
        None if v is None else v / 1e6 if row["metric"] == "peak_memory" else v
        for v in (row["value"], row["low"], row["high"])
    )
    if value is None:
        return "-"
    interval = "" if low is None else f" ({low:.4g} to {high:.4g})"
    return f"{value:.4g}{interval}"
