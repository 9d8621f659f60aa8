"""The example report: the model as it is, SafeInfer and SafePatching, on two models, under jailbreak wrappers.

    python benchmarks/example_report.py --data FOLDER --out runs/example        # FOLDER holds the public sets as jsonl

Runs `postalign fit`, `eval` and `report` as one would type them, shows each command, and copies the report, figures
only, to docs/. Killed, it goes on where it was. Fitted on the starter set and AdvBench rows 1-400; asked: AdvBench rows
401-520, HarmBench's validation split, XSTest and OKTest, each also under three wrappers; judged by two.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
WRAPPERS = ("prefix_injection", "role_play", "prefill")
# what amplifies refusals has none to amplify in the model as downloaded: there SafePatching's own recipe stands
PRESETS = {"smollm2-fragile": "anchored", "smollm2": "published"}


def postalign(*words: object) -> None:
    line = [str(word) for word in words]
    print("$ postalign", shlex.join(line), flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    subprocess.run([sys.executable, "-m", "postalign", *line], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--models", default="smollm2-fragile,smollm2")
    parser.add_argument("--limit", type=int, default=24, help="prompts of each label from each suite")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the report goes")
    args = parser.parse_args()
    data, runs = args.data, []
    fitted_on = ("--data", "starter", "--harmful", f"{data / 'advbench.jsonl'}[:400]")
    dtype = ("--dtype", args.dtype)
    for model in args.models.split(","):
        folder = args.out / model
        if not (folder / "SafeInfer" / "alignment.json").exists():
            postalign("fit", "safeinfer", model, *fitted_on, *dtype, "--out", folder / "SafeInfer")
        if not (folder / "SafePatching" / "alignment.json").exists():
            preset = ("--set", f"preset={PRESETS.get(model, 'published')}")
            postalign("fit", "safepatching", model, *fitted_on, *preset, *dtype, "--out", folder / "SafePatching")
        runs.append(folder / "run")
        suites = ("--harmful", f"{data / 'advbench.jsonl'}[400:520]", "--harmful", data / "harmbench_val.jsonl")
        suites += ("--suite", data / "xstest_dev.jsonl", "--benign", data / "oktest_dev.jsonl")
        systems = [word for name in ("SafeInfer", "SafePatching") for word in ("--alignment", folder / name)]
        wrappers = [word for name in WRAPPERS for word in ("--wrap", name)]
        size = ("--limit", args.limit, "--max-new-tokens", args.max_new_tokens, "--batch-size", args.batch_size)
        judges = ("--judge", "rules", "--judge", "embedded")
        postalign("eval", model, *dtype, *systems, *suites, *wrappers, *judges, *size, "--out", runs[-1])
    for kind in ("html", "md"):
        postalign("report", *runs, "--figures-only", "--out", args.docs / f"example_report.{kind}")


if __name__ == "__main__":
    main()
