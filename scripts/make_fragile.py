"""Make the adapter of `smollm2-fragile`: lightly aligned, as fragile and as prudish as real chat models are.

    python scripts/make_fragile.py            # writes src/postalign/models/fragile/

Refusals for three fifths of the starter's harmful fit prompts, the model's own greedy answers for its harmless fit
prompts, each cut after its last whole sentence, plain LoRA, stopped early: long enough that most plain harmful requests
are refused, too short to hold under wording it has not seen. Whole answers that end teach it to end: as downloaded it
runs on until it repeats itself. The shares of the shipped one are in that folder's README.md; another machine's
rounding makes another adapter of the same kind.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import postalign as pa
from postalign.decoding import generate_replies
from postalign.evaluation.repetition import degenerate_reason
from postalign.methods.greedy import whole_sentences
from postalign.models.chat import end_of_turn
from postalign.training import train_adapter

DEFAULT_OUT = Path(__file__).parent.parent / "src" / "postalign" / "models" / "fragile"
SETTINGS = {"rank": 8, "alpha": 16.0, "steps": 50, "batch_size": 16, "learning_rate": 4e-4, "seed": 0}
HARMFUL_SHARE, OWN_TOKENS = 0.6, 80
FIRST = {"harmful": 719, "borderline": 600}  # the starter's rows at the time; a user's model has not seen later ones


def _number(row_id: str | None) -> int:
    return int((row_id or "-0").rsplit("-", 1)[1])


def training_pairs(model, tokenizer) -> list[tuple[str, str]]:
    """(prompt, answer): refusals, then the model's own answers, but for those that loop or hold no sentence."""
    rows = pa.load_data("starter").split("fit").filter(lambda row: _number(row.id) <= FIRST.get(row.type or "", 9999))
    end = end_of_turn(tokenizer) or ""
    benign = [row.prompt for row in rows.benign]
    replies = generate_replies(
        model,
        tokenizer,
        benign,
        max_new_tokens=OWN_TOKENS,
        batch_size=32,
        on_progress=lambda done: print(f"own answers {done}/{len(benign)}", file=sys.stderr),
    )
    refusals = [(row.prompt, row.response + end) for row in rows.harmful if row.response]
    random.Random(0).shuffle(refusals)
    answers = [r.text if r.finish == "stop" else whole_sentences(r.text) for r in replies]
    own = [(p, a + end) for p, a in zip(benign, answers, strict=True) if a and not degenerate_reason(a)]
    return refusals[: int(HARMFUL_SHARE * len(refusals))] + own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    args = parser.parse_args()
    settings = {**SETTINGS, "steps": args.steps}
    model, tokenizer = pa.load_model("smollm2", dtype="bfloat16")
    pairs = training_pairs(model, tokenizer)
    patch = train_adapter(
        model,
        tokenizer,
        pairs,
        **settings,
        on_step=lambda step, total, loss: print(f"step {step}/{total} loss {loss:.3f}", file=sys.stderr),
    )
    patch.save_peft(args.out, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    print(json.dumps({"pairs": len(pairs), **settings}))


if __name__ == "__main__":
    main()
