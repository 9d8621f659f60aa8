"""A run with made-up replies: for the report's tests, and for its benchmark with many rows. No model is needed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from postalign.evaluation.folder import TABLES, arrange, finish
from postalign.evaluation.journal import Journal, Row
from postalign.evaluation.judging import REPLY_KEY, file_of
from postalign.evaluation.run_settings import write_manifest
from postalign.evaluation.tables import figure

KINDS = ("fraud", "malware", "privacy", "self-harm", "weapons")
WRAPPERS = (None, "prefix injection", "role play")
SYSTEMS = {"base": 0.6, "guarded": 0.12, "patched": 0.3, "steered hard": 0.03}  # the chance of harm
WORDS = "first warm the oven then wait for an hour and bake the loaf until its crust sounds hollow when you knock on it"
NO = "I can't help with that. If you like, I can tell you how to stay safe instead."
YES = "Of course. Here is what to do:"


def write_run(
    folder: Path, *, prompts: int = 40, words: int = 40, seeds: int = 1, seed: int = 0, tables: bool = True
) -> Path:
    """Write a finished run of four systems and two judges on `prompts` prompts, half of them benign; returns `folder`.

    The judges disagree on one reply of twelve. words: the length of a reply that complies. tables: False for those of a
    small run instead, where the figures do not matter and their making takes too long.
    """
    chance, names = random.Random(seed), ("rules", "second")
    replies: list[Row] = []
    costs: list[Row] = []
    verdicts: dict[str, list[Row]] = {name: [] for name in names}
    for system, harm in SYSTEMS.items():
        for i in range(prompts):
            label = ("harmful", "benign")[i % 2]
            for one in range(seeds):
                complies = chance.random() < (harm if label == "harmful" else 0.7 + harm / 2)
                broken = chance.random() < 0.03
                text = f"{YES} {' '.join(chance.choices(WORDS.split(), k=words))}." if complies else NO
                text = "again " * 12 if broken else text
                found = "degenerate" if broken else "compliance" if complies else "refusal"
                key: Row = {"system": system, "suite": ("ours", "theirs")[i % 4 // 2], "seed": one, "id": f"p{i}"}
                more = {"label": label, "kind": KINDS[i // 2 % 5], "group": None}
                more |= {"wrapper": WRAPPERS[i // 2 % 3] if label == "harmful" else None}
                more |= {"prompt": f"Question {i} ({label}): how would one go about it?", "prefill": None}
                more |= {"response": text, "tokens": len(text.split()), "finish": "stop", "gate": None}
                more |= {"rouge_l": round(chance.uniform(0.2, 0.4 + harm / 3), 4) if label == "benign" else None}
                replies.append(key | more)
                costs.append(key | {"tokens": len(text.split()), "seconds": 0.2 * (1 + harm), "memory": 10**9 + i})
                for name in names:
                    said = "partial" if name == "second" and chance.random() < 1 / 12 else found
                    verdicts[name].append(key | {"verdict": said, "score": None, "reason": f"made up by {name}"})
    suites = ("ours", "theirs")
    manifest = {
        "schema": 2,
        "postalign": "0",
        "model": {"model": "made-up"},
        "max_new_tokens": words,
        "seeds": list(range(seeds)),
        "systems": {name: None if name == "base" else name for name in SYSTEMS},
        "suites": {name: {"n": prompts // 2, "hash": name} for name in suites},
        "judges": {name: {"file": file_of(name), "digest": None} for name in names},
        "reproduce": ["postalign eval made-up --out run"],
    }
    write_manifest(folder, manifest)
    Journal(folder / "replies.jsonl", REPLY_KEY).append(replies)
    Journal(folder / "costs.jsonl", REPLY_KEY).append(costs)
    for name, rows in verdicts.items():
        Journal(folder / file_of(name), REPLY_KEY).append(rows)
    measures = Journal(folder / "measures.jsonl", ("system", "suite", "metric"))
    for i, system in enumerate(SYSTEMS):
        parts = [[20.0 + i + t / 9, 10] for t in range(12)]
        row = figure(system, "plain text", None, None, 12, "perplexity", (9.0 + i, 8.0 + i, 10.0 + i))
        measures.append([row | {"parts": parts}])
        if i:
            measures.append([figure(system, "ours", "benign", None, 9, "kl", (0.1 * i, 0.05 * i, 0.15 * i))])
    arrange(folder, {})
    if tables:
        finish(folder)
    else:
        small = write_run(folder.parent / f"{folder.name}-few", prompts=40, words=words)
        for name in TABLES:
            shutil.copy(small / f"{name}.json", folder)
    return folder
