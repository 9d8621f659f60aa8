"""One call of the runner at work: it has what is missing generated and measured, and writes each piece down at once.

Knows journals, and how to ask the decoder; knows nothing of judges or tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .costs import COST_KEY, Meter
from .folder import MEASURE_KEY
from .journal import Journal, Row
from .judging import REPLY_KEY, key_of, unfinished
from .likelihood import kl_from_base, perplexity_of, text_losses
from .similarity import rouge_l
from .suites import Item, Suite
from .tables import figure

if TYPE_CHECKING:
    from ..alignment import Alignment

WAVE = 8  # batches whose prompts share the engine's queue; after a kill, an unfinished wave is gone through again
OnProgress = Callable[[str, int, int], None] | None


@dataclass
class Asking:
    """One call of `evaluate` at work on its folder. settings: those that every prompt is asked with."""

    model: Any
    tokenizer: Any
    settings: dict[str, Any]
    on_progress: OnProgress
    out: Path

    def __post_init__(self) -> None:
        self.replies = Journal(self.out / "replies.jsonl", REPLY_KEY)
        self.costs = Journal(self.out / "costs.jsonl", COST_KEY)
        self.figures = Journal(self.out / "measures.jsonl", MEASURE_KEY)
        self.meter = Meter(self.model)

    def check(self, suites: Sequence[Suite]) -> None:
        """Raise UsageError for a prompt that is too long, before hours are spent on the others."""
        known = {(suite, item) for _, suite, _, item in map(key_of, self.replies.rows)}
        for suite in suites:
            new = [item for item in suite.items if (suite.name, item.id) not in known]
            _decoding().check_prompts(
                self.model,
                self.tokenizer,
                [item.prompt for item in new],
                system=self.settings["system"],
                prefills=[_prefill(item) for item in new],
                names=[f"{item.id} of {suite.name}" for item in new],
                max_new_tokens=self.settings["max_new_tokens"],
            )

    def ask(self, name: str, alignment: Alignment | None, suite: Suite, seed: int) -> None:
        """Generate what is missing of one system on one suite, and write each reply down when it ends."""

        def there(numbered: tuple[int, Item]) -> bool:
            return (name, suite.name, seed, numbered[1].id) in self.replies

        items = list(enumerate(suite.items))
        done = sum(map(there, items))
        stage = f"{name} on {suite.name}" + (f", seed {seed}" if self.settings["do_sample"] else "")
        tell = counter(self.on_progress, stage, len(items))
        tell(done)
        for wave, missing in unfinished(items, WAVE * self.settings["batch_size"], there):
            left = {item.id for _, item in missing}
            self.meter.reset()
            replies = _decoding().as_completed(
                self.model,
                self.tokenizer,
                [item.prompt for _, item in wave],
                alignment=alignment,
                prefills=[_prefill(item) for _, item in wave],
                numbers=[number for number, _ in wave],
                seed=seed,
                on_step=self.meter.look,
                **self.settings,
            )
            with closing(replies):
                for index, reply in replies:
                    item = wave[index][1]
                    if item.id not in left:
                        continue
                    self._changed()
                    self.costs.append([_cost(name, suite, item, seed, reply, self.meter.peak)])
                    self.replies.append([_row(name, suite, item, seed, reply)])  # last: with it the row is done
                    left.remove(item.id)
                    done += 1
                    tell(done)
                    if not left:
                        break

    def read(self, name: str, alignment: Alignment | None, texts: list[str], where: str) -> None:
        """Perplexity on plain text."""
        if (name, where, "perplexity") in self.figures:
            return
        tell = counter(self.on_progress, f"{name}: perplexity", len(texts))
        losses = text_losses(self.model, self.tokenizer, texts, alignment, on_progress=tell)
        row = figure(name, where, None, None, len(texts), "perplexity", perplexity_of(losses))
        self._changed()
        self.figures.append([row | {"parts": [[round(loss, 6), count] for loss, count in losses]}])

    def diverge(self, name: str, alignment: Alignment, suite: Suite, seed: int, base: str, most: int) -> None:
        """Divergence from the base on its own replies to benign prompts, taken evenly from the suite."""
        if (name, suite.name, "kl") in self.figures:
            return
        said = {item.id: self.replies.get((base, suite.name, seed, item.id)) for item in suite.items}
        benign = [
            (item, row["response"])
            for item in suite.items
            if item.label == "benign" and not _prefill(item) and (row := said[item.id]) and row["response"].strip()
        ]
        chosen = benign if len(benign) <= most else [benign[i * len(benign) // most] for i in range(most)]
        if not chosen:
            return
        tell = counter(self.on_progress, f"{name} on {suite.name}: divergence", len(chosen))
        prompts = [_messages(item.prompt, self.settings["system"]) for item, _ in chosen]
        replies = [reply for _, reply in chosen]
        value = kl_from_base(self.model, self.tokenizer, prompts, replies, alignment, on_progress=tell)
        self._changed()
        self.figures.append([figure(name, suite.name, "benign", None, len(chosen), "kl", value)])

    def _changed(self) -> None:
        """An older summary is no longer that of these rows: the run counts as unfinished until the end."""
        (self.out / "summary.json").unlink(missing_ok=True)


def _row(name: str, suite: Suite, item: Item, seed: int, reply: Any) -> Row:
    reference, gate = getattr(item, "reference", None), getattr(reply, "gate", None)
    return {
        "system": name,
        "suite": suite.name,
        "seed": seed,
        "id": item.id,
        "label": item.label,
        "kind": item.kind,
        "group": getattr(item, "group", None),
        "wrapper": getattr(item, "wrapper", None),
        "prompt": item.prompt,
        "prefill": _prefill(item) or None,
        "response": reply.text,
        "tokens": len(reply.token_ids),
        "finish": reply.finish,
        "gate": None if gate is None else round(float(gate), 4),
        "rouge_l": None if reference is None else round(rouge_l(reply.text, reference), 6),
    }


def _cost(name: str, suite: Suite, item: Item, seed: int, reply: Any, peak: int) -> Row:
    row = {"system": name, "suite": suite.name, "seed": seed, "id": item.id, "tokens": len(reply.token_ids)}
    return row | {"seconds": round(reply.seconds, 5), "memory": peak}


def _prefill(item: Item) -> str:
    return getattr(item, "prefill", None) or ""


def _messages(prompt: str, system_prompt: str | None) -> Any:
    if system_prompt is None:
        return prompt
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]


def counter(on_progress: OnProgress, stage: str, total: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(stage, done, total)

    return tell


def _decoding() -> Any:
    """Met when first needed: importing postalign stays quick, and tests can stand in for it."""
    from .. import decoding

    return decoding
