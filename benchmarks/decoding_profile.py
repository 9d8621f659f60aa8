"""Where the time of a decoding step goes: milliseconds per step of each part, and a picture of it.

    python benchmarks/decoding_profile.py --alignment FOLDER     # of benchmarks/decoding.py; writes docs/decoding.svg

Timers stand around attention, feed-forward, output head, mixing and picking; the rest is what is in between. What an
adapter costs is in the linear layers that it patches: the difference to the bar of the same rows without one. Timers
cost time themselves: compare bars, and take ratios from benchmarks/decoding.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from command import command
from decoding import RESULTS, engine_run, generate_run, merged, prompts_for

import postalign as pa
from postalign.decoding.sampling import Sampler
from postalign.decoding.stream import Stream
from postalign.edits import AdapterGuide, CheckpointGuide, Guidance, HiddenEdit, LowRankPatch, VectorGuide
from postalign.files import write_whole
from postalign.models.anatomy import anatomy

DOCS = Path(__file__).parent.parent / "docs"
PARTS = {
    "attention": "#4c78a8",
    "feed-forward": "#72b7b2",
    "output head": "#f2cf5b",
    "mixing and picking": "#e45756",
    "rest": "#bab0ac",
}


@contextlib.contextmanager
def timers(model: Any, spent: Counter[str]) -> Iterator[None]:
    """Adds up the seconds spent in each part of `PARTS` but the rest."""
    handles, began = [], {}

    def around(module: Any, part: str) -> None:
        def start(*_: Any) -> None:
            began[part] = time.perf_counter()

        def stop(*_: Any) -> None:
            spent[part] += time.perf_counter() - began[part]

        handles.append(module.register_forward_pre_hook(start))
        handles.append(module.register_forward_hook(stop))

    for block in anatomy(model).blocks:
        around(block.self_attn, "attention")
        around(block.mlp, "feed-forward")
    around(anatomy(model).lm_head, "output head")
    originals = (Stream, "_mix", Stream._mix), (Sampler, "__call__", Sampler.__call__), (Sampler, "peek", Sampler.peek)

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            outer, started = began.get("mixing"), time.perf_counter()
            began["mixing"] = started
            try:
                return function(*args, **settings)
            finally:
                began["mixing"] = outer
                if outer is None:
                    spent["mixing and picking"] += time.perf_counter() - started

        return run

    for owner, name, function in originals:
        setattr(owner, name, timed(function))
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
        for handle in handles:
            handle.remove()


def profile(models: list[Any], run: Callable[[], Any], tokens: int, repeats: int) -> dict[str, float]:
    """part -> milliseconds per new token of a row, the least total of `repeats` runs."""
    best: dict[str, float] = {}
    run()
    for _ in range(repeats):
        spent: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(timers(model, spent))
            started = time.perf_counter()
            run()
            total = time.perf_counter() - started
        spent["rest"] = total - sum(spent.values())
        if not best or total < best["total"]:
            best = {"total": total, **{part: spent[part] for part in PARTS}}
    return {part: round(1000 * seconds / tokens, 2) for part, seconds in best.items()}


def picture(bars: dict[str, dict[str, dict[str, float]]], note: str) -> str:
    """Stacked bars as SVG, one panel for each batch size."""
    width, left, row, y, out = 900, 260, 24, 60, []
    x = left
    for part, colour in PARTS.items():
        out.append(
            f'<rect x="{x}" y="14" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="25">{part}</text>'
        )
        x += 30 + 8 * len(part)
    for batch, systems in bars.items():
        scale = (width - left - 90) / max(figures["total"] for figures in systems.values())
        out.append(f'<text x="10" y="{y}" font-weight="bold">batch {batch}, ms per step</text>')
        y += 10
        for name, figures in systems.items():
            x = float(left)
            out.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{name}</text>')
            for part, colour in PARTS.items():
                size = figures[part] * scale
                out.append(f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{row - 5}" fill="{colour}"/>')
                x += size
            out.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{figures["total"]:.1f}</text>')
            y += row
        y += 34
    box = f'viewBox="0 0 {width} {y + 6}" font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    ground = f'<rect width="{width}" height="{y + 6}" fill="white"/>'
    return "\n".join([head, ground, *out, f'<text x="10" y="{y - 6}" fill="#555">{note}</text>', "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alignment", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-fragile")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = pa.load_model(args.model, dtype="float32")
    guidance = pa.Alignment.from_pretrained(args.alignment).guidance
    assert guidance is not None and isinstance(guidance.guide, AdapterGuide)
    patch, lam, n = guidance.guide.patch, guidance.lam, anatomy(model).n_layers
    names = anatomy(model).block_names[2 * n // 3 :]
    upper = LowRankPatch(
        {k: f for k, f in patch.factors.items() if k.startswith(tuple(f"{b}." for b in names))}, patch.scale
    )
    nothing = HiddenEdit(torch.zeros(model.config.hidden_size), 0, 1.0)
    checkpoint = CheckpointGuide("merged")
    checkpoint.model = merged(model, patch)
    guides = {
        "the same rows, no adapter": VectorGuide(nothing),
        "adapter guide": AdapterGuide(patch),
        "adapter guide, upper third": AdapterGuide(upper),
        "checkpoint guide": checkpoint,
    }
    bars: dict[str, dict[str, dict[str, float]]] = {}
    for batch in args.batches.split(","):
        prompts, _ = prompts_for(int(batch))
        runs = {
            "generate": generate_run(model, tokenizer, prompts, args.tokens),
            "engine, no alignment": engine_run(model, tokenizer, prompts, None, args.tokens, False),
        }
        for name, guide in guides.items():
            alignment = pa.Alignment("profile", [Guidance(guide, lam)])
            runs[name] = engine_run(model, tokenizer, prompts, alignment, args.tokens, False)
        bars[batch] = {}
        for name, run in runs.items():
            models = [model, checkpoint.model] if name == "checkpoint guide" else [model]
            bars[batch][name] = profile(models, run, args.tokens, args.repeats)
            print(batch, name, bars[batch][name], flush=True)
    facts = {"command": command(), "threads": args.threads, "tokens": args.tokens, "milliseconds": bars}
    write_whole(RESULTS / "decoding_profile.json", json.dumps(facts, indent=1) + "\n")
    note = f"{args.model}, float32, {args.threads} threads, {args.tokens} new tokens, prompts' pass included"
    write_whole(DOCS / "decoding.svg", picture(bars, note))


if __name__ == "__main__":
    main()
