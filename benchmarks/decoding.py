"""What guided decoding costs: times of the engine against `model.generate`, side by side in one run.

    python benchmarks/decoding.py --out runs/decoding                      # fits a guide and a gate first, some minutes
    python benchmarks/decoding.py --out runs/decoding --alignment FOLDER   # one of safeinfer, with adapter and gate

Systems take turns, one warm-up each, then `--repeats` rounds: a round's ratio is a system's time over that of
transformers' generate in the same round; told are the median ratio and the range of its middle half. All decode the
same prompts greedily for the same number of new tokens, whatever the model would end with. Guided systems must say what
the plain two-pass decoding says, token by token. Figures go to benchmarks/results/decoding.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from command import command, cpu_name
from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

import postalign as pa
from postalign.decoding.engine import Engine
from postalign.edits import AdapterGuide, CheckpointGuide, Guidance, LowRankPatch
from postalign.files import write_whole
from postalign.models.chat import encode

LEFT_OUT = ("engine, no alignment", "two passes, one token at a time", "adapter guide, upper third, behind the gate")
RESULTS = Path(__file__).parent / "results"
Run = Callable[[], list[list[int]]]


def parts(folder: Path | None, model: Any, tokenizer: Any, cache: Path) -> pa.Alignment:
    """An alignment of safeinfer with a hidden edit, an adapter guide for all tokens and a gate."""
    if folder is not None:
        return pa.Alignment.from_pretrained(folder)
    if not (cache / "alignment.json").exists():
        settings = {"guide": "adapter", "guide_tokens": None, "trials": 8, "guide_pairs": 48, "guide_steps": 16}
        tell = lambda stage, done, total: print(f"{stage} {done}/{total}", file=sys.stderr)  # noqa: E731
        pa.fit(
            "safeinfer", model, tokenizer, data=pa.load_data("starter"), config=settings, on_progress=tell
        ).save_pretrained(cache)
    return pa.Alignment.from_pretrained(cache)


def merged(model: Any, patch: LowRankPatch) -> Any:
    """A copy of the model with the patch in its weights: a checkpoint guide of the same opinions as the adapter."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, (a, b) in patch.factors.items():
            other.get_submodule(name).weight += patch.scale * (b.float() @ a.float())
    return other


def engine_run(
    model: Any, tokenizer: Any, prompts: list[str], alignment: Any, tokens: int, one_by_one: bool, rows: int = 0
) -> Run:
    """The engine on all prompts at once, or on so many rows, for exactly `tokens` tokens."""

    def run() -> list[list[int]]:
        with Engine(model, tokenizer, alignment, batch_size=rows or len(prompts)) as engine:
            engine.eos = set()
            if one_by_one:
                engine.speculation.possible = lambda stream: False  # type: ignore[method-assign]
            requests = [engine.submit(prompt, max_new_tokens=tokens) for prompt in prompts]
            while engine.step():
                pass
            return [request.token_ids for request in requests]

    return run


def generate_run(
    model: Any, tokenizer: Any, prompts: list[str], tokens: int, scale: float | None = None, rows: int = 0
) -> Run:
    """transformers' generate; scale: with its classifier-free guidance processor, which runs the model twice."""
    if rows and rows < len(prompts):
        parts = [
            generate_run(model, tokenizer, prompts[i : i + rows], tokens, scale) for i in range(0, len(prompts), rows)
        ]
        return lambda: [reply for part in parts for reply in part()]

    def run() -> list[list[int]]:
        batch = encode(tokenizer, prompts)
        processors = LogitsProcessorList()
        if scale is not None:
            processors.append(
                UnbatchedClassifierFreeGuidanceLogitsProcessor(
                    scale, model, batch.input_ids, unconditional_attention_mask=batch.attention_mask
                )
            )
        out = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id or 0,
            logits_processor=processors,
        )
        return out[:, batch.input_ids.shape[1] :].tolist()

    return run


def prompts_for(count: int) -> tuple[list[str], list[str]]:
    """Prompts of the starter's test split: harmless ones, and four harmless to one harmful."""
    test = pa.load_data("starter").split("test")
    plain = [row.prompt for row in test.benign if row.type == "plain" and len(row.prompt) < 200]
    harmful = [row.prompt for row in test.harmful if len(row.prompt) < 200]
    mixed = [harmful[i // 5] if i % 5 == 4 else plain[i] for i in range(max(count, 5))]
    return plain[:count], mixed


def measure(systems: dict[str, Run], repeats: int) -> dict[str, dict[str, Any]]:
    """system -> seconds of each round and its ratios to the first system's."""
    said = {name: run() for name, run in systems.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    base = next(iter(systems))
    found: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        ratios = sorted(t / b for t, b in zip(times, seconds[base], strict=True))
        quarter = len(ratios) // 4
        found[name] = {
            "ratio": round(statistics.median(ratios), 3),
            "low": round(ratios[quarter], 3),
            "high": round(ratios[-1 - quarter], 3),
            "seconds": round(statistics.median(times), 3),
            "tokens_per_second": round(sum(map(len, said[name])) / statistics.median(times), 1),
        }
    for name in systems:
        found[name]["ids"] = said[name]
    return found


def systems_for(batch: int, args: Any, model: Any, tokenizer: Any, whole: pa.Alignment, other: Any) -> dict[str, Any]:
    guidance = whole.guidance
    assert guidance is not None and isinstance(guidance.guide, AdapterGuide)
    hidden = [edit for edit in whole.edits if not isinstance(edit, Guidance)]
    everywhere = [replace(edit, scope=("last", "generation")) for edit in hidden]  # in every step
    checkpoint = CheckpointGuide("merged")
    checkpoint.model = other
    upper_from = 2 * model.config.num_hidden_layers // 3
    factors = {
        n: f for n, f in guidance.guide.patch.factors.items() if int(n.split("layers.")[1].split(".")[0]) >= upper_from
    }
    upper = AdapterGuide(LowRankPatch(factors, guidance.guide.patch.scale))
    exact = Guidance(guidance.guide, guidance.lam)
    plain, mixed = prompts_for(batch)

    def ours(edits: list, prompts: list[str], gate: Any = None, one_by_one: bool = False) -> Run:
        alignment = pa.Alignment("bench", edits, gate)
        return engine_run(model, tokenizer, prompts, alignment, args.tokens, one_by_one, batch)

    twice = Guidance(checkpoint, guidance.lam)
    found = {
        "generate": generate_run(model, tokenizer, plain, args.tokens),
        "engine, no alignment": engine_run(model, tokenizer, plain, None, args.tokens, False),
        "hidden edit": ours(everywhere, plain),
        "adapter guide": ours([exact], plain),
        "adapter guide, upper third": ours([Guidance(upper, guidance.lam)], plain),
        "checkpoint guide": ours([twice], plain),
        "two passes, one token at a time": ours([twice], plain, one_by_one=True),
        "transformers' guidance (two passes)": generate_run(model, tokenizer, plain, args.tokens, scale=1.5),
    }
    gated = {
        "generate, mixed prompts": generate_run(model, tokenizer, mixed, args.tokens, rows=batch),
        "adapter guide behind the gate": ours([exact], mixed, whole.gate),
        "adapter guide, upper third, behind the gate": ours([Guidance(upper, guidance.lam)], mixed, whole.gate),
    }
    return {"plain": found, "gated": gated}


def queue(model: Any, tokenizer: Any, alignment: Any, count: int, size: int) -> dict[str, float]:
    """New tokens a second of a queue of prompts of 5 to 500 tokens with replies of 8 to 64, and of one where all
    prompts and replies have the mean length: the same work without coming and going."""
    rng, word = random.Random(0), " bread"
    empty = len(encode(tokenizer, [""]).input_ids[0])

    def speed(lengths: list[tuple[int, int]]) -> float:
        with Engine(model, tokenizer, alignment, batch_size=size) as engine:
            engine.eos = set()
            requests = [engine.submit(word * max(1, n - empty), max_new_tokens=new) for n, new in lengths]
            engine.waiting = deque(sorted(engine.waiting, key=lambda request: -len(request.ids)))
            started = time.perf_counter()
            while engine.step():
                pass
            return sum(len(request.token_ids) for request in requests) / (time.perf_counter() - started)

    mixed = [(rng.randint(5, 500), rng.randint(8, 64)) for _ in range(count)]
    means = [(round(statistics.mean(lengths)),) for lengths in zip(*mixed, strict=True)]
    equal = [(means[0][0], means[1][0])] * count
    speeds = {"equal": speed(equal), "mixed": speed(mixed)}
    return {**{name: round(value, 1) for name, value in speeds.items()}, "share": speeds["mixed"] / speeds["equal"]}


def memory(args: Any) -> dict[str, Any]:
    """Peak memory at batch 8 beyond the caches, each system in a process of its own: MB, and over that of generate."""
    found: dict[str, Any] = {}
    for name in ("generate", "adapter guide"):
        words = [*sys.argv[1:], "--memory-of", name]
        told = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(told.splitlines()[-1])
    found["ratio"] = round(found["adapter guide"]["MB"] / found["generate"]["MB"], 3)
    return found


def memory_of(name: str, args: Any, model: Any, tokenizer: Any, whole: pa.Alignment) -> dict[str, float]:
    plain, _ = prompts_for(8)
    batch = encode(tokenizer, plain)
    rows, columns = len(plain), batch.input_ids.shape[1] + args.tokens
    assert whole.guidance is not None
    if name == "generate":
        run = generate_run(model, tokenizer, plain, args.tokens)
    else:
        exact = pa.Alignment("bench", [Guidance(whole.guidance.guide, whole.guidance.lam)])
        run, rows = engine_run(model, tokenizer, plain, exact, args.tokens, False), 2 * rows
    run()
    config = model.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows * columns
    cache *= next(model.parameters()).element_size()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"MB": round((peak - cache) / 1e6, 1), "caches_MB": round(cache / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/decoding"))
    parser.add_argument("--model", default="smollm2-fragile")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--alignment", type=Path)
    parser.add_argument("--batches", default="1,8,32", help="none: only the queue, into decoding_queue.json")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--few-from", type=int, default=32, help="from this batch on leave out the less asked for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queue", type=int, default=0, help="prompts of the queue; 0: no queue")
    parser.add_argument("--queue-rows", type=int, default=16)
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    parser.add_argument("--systems", default="", help="only these, separated by semicolons")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = pa.load_model(args.model, dtype=args.dtype)
    whole = parts(args.alignment, model, tokenizer, args.out / "alignment")
    assert isinstance(whole.guidance and whole.guidance.guide, AdapterGuide), "an alignment with an adapter guide"
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, args, model, tokenizer, whole)))
        return
    other = merged(model, whole.guidance.guide.patch)
    table: dict[str, Any] = {}
    batches = [] if args.batches == "none" else [int(batch) for batch in args.batches.split(",")]
    for batch in batches:
        rows: dict[str, Any] = {}
        for group in systems_for(batch, args, model, tokenizer, whole, other).values():
            names = [n for n in group if not args.systems or n.startswith("generate") or n in args.systems.split(";")]
            names = [n for n in names if batch < args.few_from or n not in LEFT_OUT]
            if len(names) > 1:
                rows |= measure({name: group[name] for name in names}, args.repeats)
        reference = rows.get("two passes, one token at a time", {}).get("ids")
        for name, row in rows.items():
            ids = row.pop("ids")
            if reference is not None and name in ("adapter guide", "checkpoint guide"):
                row["same_tokens"] = ids == reference
            print(
                f"batch {batch:3d}  {name:44s} {row['ratio']:6.3f} [{row['low']:.3f}-{row['high']:.3f}]  "
                f"{row['tokens_per_second']:8.1f} tokens/s  {row.get('same_tokens', '')}",
                flush=True,
            )
        table[str(batch)] = rows
    facts = {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "postalign": pa.__version__},
    }
    result = {"command": command(), "facts": facts, "tokens": args.tokens, "repeats": args.repeats, "batches": table}
    if args.queue:
        kinds = {"no alignment": None, "adapter guide": pa.Alignment("bench", [whole.guidance])}
        asked = args.systems.split(";") if args.systems and not batches else list(kinds)
        result["queue"] = {
            name: queue(model, tokenizer, kinds[name], args.queue, args.queue_rows) for name in asked
        } | {"prompts": args.queue, "rows": args.queue_rows, "dtype": args.dtype}
        print(json.dumps(result["queue"]), flush=True)
    if args.memory:
        result["memory"] = memory(args)
        print(json.dumps(result["memory"]), flush=True)
    if not batches or not args.systems:
        name = "decoding.json" if batches else "decoding_queue.json"
        write_whole(RESULTS / name, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
