"""A result of benchmarks/safepatching.py as the README's table:

    python benchmarks/safepatching_table.py benchmarks/results/safepatching_smollm2-fragile.json

A row for each system; a preset's is the mean over its seeds, with the lowest and the highest.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

COLUMNS = [
    ("AdvBench compliance", "advbench", "compliance"),
    ("HarmBench compliance", "harmbench_val", "compliance"),
    ("degenerate, Adv", "advbench", "degenerate"),
    ("degenerate, Harm", "harmbench_val", "degenerate"),
    ("XSTest safe refused", "xstest_safe", "refusal"),
    ("OKTest refused", "oktest_dev", "refusal"),
    ("Self-Instruct refused", "self_instruct", "refusal"),
    ("degenerate, Self-Instruct", "self_instruct", "degenerate"),
    ("ROUGE-L", "instructions", "rouge_l"),
    ("perplexity", "perplexity", ""),
]


def main() -> None:
    systems = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["systems"]
    base = systems["base"]["figures"]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, system in systems.items():
        groups[re.sub(r", seed \d+$", "", name)].append(system)
    print("| | " + " | ".join(title for title, _, _ in COLUMNS) + " | changed weights |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name, members in groups.items():
        cells = [spread([value(one["figures"], base, *column[1:]) for one in members], column[2]) for column in COLUMNS]
        patches = [one["patch"]["share"] for one in members if "patch" in one]
        cells.append(f"{100 * statistics.mean(patches):.1f} %" if patches else "-")
        print(f"| {name} ({len(members)}) | " + " | ".join(cells) + " |")


def value(figures: dict[str, Any], base: dict[str, Any], suite: str, what: str) -> float:
    """A share in per cent; perplexity and similarity as a ratio to the base's."""
    if suite == "perplexity":
        return figures[suite] / base[suite]
    if what == "rouge_l":
        return figures[suite][what] / base[suite][what]
    return 100 * figures[suite][what] / figures[suite]["n"]


def spread(values: list[float], what: str) -> str:
    digits = 1 if what in ("compliance", "refusal", "degenerate") else 3
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
