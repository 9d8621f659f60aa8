"""A result of benchmarks/safeinfer.py as the README's table: python benchmarks/table.py benchmarks/results/FILE.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROWS = [
    ("harmful compliance, AdvBench 401-520", "advbench", "harmful", "compliance"),
    ("harmful compliance, HarmBench validation", "harmbench_val", "harmful", "compliance"),
    ("degenerate, AdvBench 401-520", "advbench", "harmful", "degenerate"),
    ("degenerate, HarmBench validation", "harmbench_val", "harmful", "degenerate"),
    ("false refusals, XSTest safe", "xstest_safe", "benign", "refusal"),
    ("false refusals, OKTest", "oktest_dev", "benign", "refusal"),
    ("refusals, Self-Instruct", "self_instruct", "benign", "refusal"),
    ("degenerate, XSTest safe", "xstest_safe", "benign", "degenerate"),
    ("degenerate, Self-Instruct", "self_instruct", "benign", "degenerate"),
    ("KL from base, Self-Instruct (nats a token)", "self_instruct", "benign", "kl"),
    ("KL from base, XSTest safe (nats a token)", "xstest_safe", "benign", "kl"),
    ("KL from base, OKTest (nats a token)", "oktest_dev", "benign", "kl"),
    ("perplexity, WikiText-2", "wikitext2_valid", None, "perplexity"),
    ("tokens per second, Self-Instruct", "self_instruct", None, "tokens_per_second"),
]


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # of several judges, the first
    found = {(r["suite"], r["label"], r["metric"], r["system"]): r for r in reversed(result["summary"])}
    systems = list(dict.fromkeys(r["system"] for r in result["summary"]))
    print("| | n | " + " | ".join(systems) + " |\n|---" * 1 + "|---" * (len(systems) + 1) + "|")
    for name, suite, label, metric in ROWS:
        cells = [found.get((suite, label, metric, system)) for system in systems]
        if any(cells):
            n = next(cell["n"] for cell in cells if cell)
            print(f"| {name} | {n} | " + " | ".join(shown(cell) for cell in cells) + " |")


def shown(cell: dict | None) -> str:
    """A share as percent with its interval, anything else as a number."""
    if cell is None:
        return "-"
    if cell["metric"] in ("compliance", "refusal", "degenerate"):
        return f"{100 * cell['value']:.1f} % ({100 * cell['low']:.0f}-{100 * cell['high']:.0f})"
    return f"{cell['value']:.3g}" if cell["metric"] == "kl" else f"{cell['value']:.1f}"


if __name__ == "__main__":
    main()
