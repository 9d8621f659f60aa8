"""The runner: every system answers every prompt, each reply is judged, and a kill loses one chunk at most.

A run is a folder: `run.json` (what was run on what), `rows.jsonl` (one line per system, suite and prompt,
appended as they come), `measures.jsonl` (perplexity and divergence, likewise), `summary.json` and
`head_effects.json` (written whole at the end). Knows nothing of how replies are made, nor of how a report
looks.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files import write_whole
from .journal import Journal, Row
from .judges import VERDICTS, Judge, judge_name, safely
from .judges import judge as rule_judge
from .likelihood import kl_from_base, perplexity
from .run_settings import head_maps, run_settings, settle
from .statistics import wilson
from .suites import Item, Suite, load_suites, load_texts

if TYPE_CHECKING:
    from torch import nn

    from ..alignment import Alignment
    from ..data.records import Data

ROW_KEY, MEASURE_KEY = ("system", "suite", "id"), ("system", "suite", "metric")
MEASURES = ("perplexity", "kl")
OnProgress = Callable[[str, int, int], None] | None


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    systems: Mapping[str, Alignment | None],
    suites: Iterable[str | Path | Suite | Data] = ("starter",),
    *,
    out: str | Path,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    system_prompt: str | None = None,
    judge: Judge | None = None,
    measures: Sequence[str] = MEASURES,
    text: str | Path | None = None,
    kl_prompts: int = 48,
    on_progress: OnProgress = None,
) -> list[Row]:
    """Run `systems` on `suites`, write the run to the folder `out`, and return the rows of its
    `summary.json`.

    systems: name -> alignment, None for the model as it is (call that one `base`). suites: see `load_suite`.
    Replies are greedy, at most `max_new_tokens` long. judge: default the rule judge; one that fails gives
    `unscored`. measures: any of `perplexity` (on `text`, default the shipped paragraphs) and `kl` (from the
    system that is None, on its replies to the first `kl_prompts` benign prompts of each suite; left out where
    no system is None). on_progress(stage, done, total).

    Called again with the same `out` it goes on where it was: finished rows are kept, further systems and
    suites may be added. Raises UsageError when the model, a system, a suite or a setting of the same name is
    not what it was.
    """
    if not systems:
        raise UsageError("no system given: pass for instance {'base': None}.")
    unknown = set(measures) - set(MEASURES)
    if unknown:
        raise UsageError(f"no measure {sorted(unknown)[0]!r}: choose from {', '.join(MEASURES)}.")
    if batch_size < 1 or max_new_tokens < 1:
        raise UsageError("batch_size and max_new_tokens must be 1 or more.")
    out, asked = Path(out), load_suites(suites)
    texts = load_texts(text) if "perplexity" in measures else []
    for alignment in systems.values():
        if alignment is not None:
            alignment.check(model, tokenizer)
    judge = judge or rule_judge
    settings = {
        "max_new_tokens": max_new_tokens,
        "system_prompt": system_prompt,
        "judge": judge_name(judge),
        "kl_prompts": kl_prompts,
    }
    settle(out, run_settings(model, tokenizer, systems, asked, texts, **settings))
    run = _Run(model, tokenizer, judge, max_new_tokens, batch_size, system_prompt, on_progress, out)
    run.open()
    for name, alignment in systems.items():
        for suite in asked:
            run.ask(name, alignment, suite)
    base = next((name for name, alignment in systems.items() if alignment is None), None)
    for name, alignment in systems.items():
        if texts:
            run.read(name, alignment, texts, Path(text).stem if text is not None else "plain text")
        if "kl" in measures and base is not None and alignment is not None:
            for suite in asked:
                run.diverge(name, alignment, suite, base, kl_prompts)
    summary = summarize(run.rows.rows, run.figures.rows)
    text_of_it = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(out / "summary.json", text_of_it + "\n")
    head_maps(out, systems)
    return summary


@dataclass
class _Run:
    """One call of `evaluate` at work on its folder."""

    model: Any
    tokenizer: Any
    judge: Judge
    max_new_tokens: int
    batch_size: int
    system_prompt: str | None
    on_progress: OnProgress
    out: Path

    def open(self) -> None:
        self.rows = Journal(self.out / "rows.jsonl", ROW_KEY)
        self.figures = Journal(self.out / "measures.jsonl", MEASURE_KEY)

    def ask(self, name: str, alignment: Alignment | None, suite: Suite) -> None:
        """Generate, judge and write down what is missing of one system on one suite, a batch at a time."""
        total = len(suite.items)
        missing = [item for item in suite.items if (name, suite.name, item.id) not in self.rows]
        tell = self._counter(f"{name} on {suite.name}", total)
        tell(total - len(missing))
        for begin in range(0, len(missing), self.batch_size):
            chunk = missing[begin : begin + self.batch_size]
            replies = _engine().generate_replies(
                self.model,
                self.tokenizer,
                [item.prompt for item in chunk],
                alignment=alignment,
                system=self.system_prompt,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
            self._changed()
            pairs = zip(chunk, replies, strict=True)
            self.rows.append(_row(name, suite, item, reply, self.judge) for item, reply in pairs)
            tell(total - len(missing) + begin + len(chunk))

    def read(self, name: str, alignment: Alignment | None, texts: list[str], where: str) -> None:
        """Perplexity on plain text."""
        if (name, where, "perplexity") in self.figures:
            return
        tell = self._counter(f"{name}: perplexity", len(texts))
        value = perplexity(self.model, self.tokenizer, texts, alignment, on_progress=tell)
        self._changed()
        self.figures.append([_figure(name, where, None, len(texts), "perplexity", value)])

    def diverge(self, name: str, alignment: Alignment, suite: Suite, base: str, most: int) -> None:
        """Divergence from the base on its own replies to benign prompts, taken evenly from the suite."""
        mine = (row for row in self.rows.rows if (row["system"], row["suite"]) == (base, suite.name))
        said = {row["id"]: row["response"] for row in mine}
        benign = [item for item in suite.items if item.label == "benign" and said[item.id].strip()]
        chosen = benign if len(benign) <= most else [benign[i * len(benign) // most] for i in range(most)]
        if not chosen or (name, suite.name, "kl") in self.figures:
            return
        tell = self._counter(f"{name} on {suite.name}: divergence", len(chosen))
        prompts = [_messages(item.prompt, self.system_prompt) for item in chosen]
        replies = [said[item.id] for item in chosen]
        value = kl_from_base(self.model, self.tokenizer, prompts, replies, alignment, on_progress=tell)
        self._changed()
        self.figures.append([_figure(name, suite.name, "benign", len(chosen), "kl", value)])

    def _changed(self) -> None:
        """An older summary is no longer that of these rows: the run counts as unfinished until the end."""
        (self.out / "summary.json").unlink(missing_ok=True)

    def _counter(self, stage: str, total: int) -> Callable[[int], None]:
        def tell(done: int) -> None:
            if self.on_progress is not None:
                self.on_progress(stage, done, total)

        return tell


def summarize(rows: Iterable[Row], measures: Iterable[Row] = ()) -> list[Row]:
    """The rows of `summary.json`: shares of each verdict with Wilson's 95 % intervals, speed, and the
    measures.

    Columns: system, suite, label, n, metric, value, low, high; low and high are None where no interval is
    known. Tokens per second are those of the whole loop: all new tokens over the time that their batches
    took.
    """
    cells: dict[tuple[str, str, str | None], list[Row]] = defaultdict(list)
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["system"], row["suite"], row["label"]].append(row)
        runs[row["system"], row["suite"]].append(row)
    summary = []
    for (system, suite, label), part in cells.items():
        n = len(part)
        for verdict in VERDICTS:
            hits = sum(row["verdict"] == verdict for row in part)
            summary.append(_figure(system, suite, label, n, verdict, (hits / n, *wilson(hits, n))))
    for (system, suite), part in runs.items():
        seconds = sum(row["seconds"] for row in part)
        speed = sum(row["tokens"] for row in part) / seconds if seconds > 0 else None
        summary.append(_figure(system, suite, None, len(part), "tokens_per_second", (speed, None, None)))
    return summary + list(measures)


def _row(name: str, suite: Suite, item: Item, reply: Any, judge: Judge) -> Row:
    return {
        "system": name,
        "suite": suite.name,
        "id": item.id,
        "label": item.label,
        "prompt": item.prompt,
        "response": reply.text,
        "verdict": safely(judge, item.prompt, reply.text).verdict,
        "tokens": len(reply.token_ids),
        "seconds": round(reply.seconds, 4),
    }


def _figure(system: str, suite: str, label: str | None, n: int, metric: str, estimate: Sequence[float | None]) -> Row:
    numbers = [None if v is None or not math.isfinite(v) else round(v, 6) for v in estimate]
    row = {"system": system, "suite": suite, "label": label, "n": n, "metric": metric}
    return row | dict(zip(("value", "low", "high"), numbers, strict=True))


def _messages(prompt: str, system_prompt: str | None) -> Any:
    if system_prompt is None:
        return prompt
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]


def _engine() -> Any:
    """Met when first needed: importing postalign stays quick, and tests can stand in for it."""
    from ..decoding import engine

    return engine
