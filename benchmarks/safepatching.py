"""SafePatching, its ablations and its peers on `smollm2-fragile`, each exported and read with plain transformers.

    python benchmarks/safepatching.py --data FOLDER --out runs/safepatching      # FOLDER holds the public sets as jsonl

Fitted on the starter set and AdvBench rows 1-400 only. Every system becomes an ordinary model folder, is loaded by
transformers' own from_pretrained and answers with its own generate, greedily. Suites: AdvBench rows 401-520 and
HarmBench's validation split (harmful), XSTest's safe prompts and OKTest (harmless that sound dangerous), Self-Instruct
(plain), instructions with a reference answer (ROUGE-L), WikiText-2 (perplexity). Presets run with every seed, the rest
with the first. Figures go to benchmarks/results/. Killed, it goes on with the system that it was at.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command import command, cpu_name
from transformers import AutoModelForCausalLM, AutoTokenizer

import postalign as pa
from postalign.evaluation import judge, load_suite
from postalign.evaluation.likelihood import perplexity
from postalign.evaluation.similarity import rouge_l
from postalign.evaluation.statistics import wilson
from postalign.files import write_whole
from postalign.integrations.export import export
from postalign.methods import merging
from postalign.methods.safepatching_config import BASELINES, PRESETS
from postalign.models.shards import FolderWeights, write_tensors

RESULTS = Path(__file__).parent / "results"
REFERENCE = "instructions"
ABLATIONS = {name: BASELINES[name] for name in ("safety_only", "over_safety_only", "intersection", "union")}
ABLATIONS["not refined"] = {"refine_steps": 0}
ABLATIONS |= {f"refine_scale = {scale}": {"refine_scale": scale} for scale in (1.0, 1.8)}
ABLATIONS |= {"p = 1": {"p": 1.0}, "p = 0.5": {"p": 0.5}, "SNIP": {"importance": "snip"}}
VERDICTS = ("compliance", "refusal", "degenerate")


def suites(folder: Path, plain: int, answered: int) -> dict[str, tuple[str, list[str], list[str]]]:
    """name -> (label, prompts, reference answers or none)."""
    xstest = pa.load_data(str(folder / "xstest_dev.jsonl"))
    loaded = [
        load_suite(f"{folder / 'advbench.jsonl'}[400:520]", label="harmful"),
        load_suite(folder / "harmbench_val.jsonl", label="harmful"),
        load_suite(pa.Data(xstest.benign, "xstest_safe")),
        load_suite(folder / "oktest_dev.jsonl", label="benign"),
        load_suite(f"{folder / 'self_instruct.jsonl'}[:{plain}]", label="benign"),
    ]
    found = {suite.name: (suite.items[0].label, [item.prompt for item in suite.items], []) for suite in loaded}
    rows = list(pa.load_data(f"{folder / 'instructions.jsonl'}[:{answered}]", label="benign"))
    return found | {REFERENCE: ("benign", [row.prompt for row in rows], [row.response or "" for row in rows])}


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, batch_size: int = 60) -> list[str]:
    """Greedy replies by transformers alone; the shortest prompts first, so that little is padded."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    replies = [""] * len(texts)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, new, strict=True):
            replies[i] = text
    return replies


def measured(folder: Path, asked: dict, texts: list[str], max_new_tokens: int) -> tuple[dict[str, Any], list[dict]]:
    """(figures, rows with their replies) of the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures: dict[str, Any] = {}
    rows = []
    for name, (_, prompts, references) in asked.items():
        replies = answers(model, tokenizer, prompts, max_new_tokens)
        verdicts = [judge(p, r).verdict for p, r in zip(prompts, replies, strict=True)]
        rows += [
            {"suite": name, "prompt": p, "reply": r, "verdict": v}
            for p, r, v in zip(prompts, replies, verdicts, strict=True)
        ]
        figures[name] = {word: verdicts.count(word) for word in VERDICTS} | {"n": len(prompts)}
        if references:
            figures[name]["rouge_l"] = statistics.mean(map(rouge_l, replies, references))
    figures["perplexity"] = perplexity(model, tokenizer, texts)[0]
    return figures, rows


def checkpoints(aligned: Path, unaligned: Path, jailbroken: Callable[[], Path]) -> dict[str, Callable]:
    """Systems that are merges of whole checkpoints: name -> (folder -> None), which writes the model there."""

    def merged(start: Callable[[], Path], others: Callable[[], list[Path]], rule: merging.Rule) -> Callable:
        def write(folder: Path) -> None:
            base = FolderWeights(start())
            plan = {name: (base.shape(name), base.dtype(name)) for name in base.names()}
            write_tensors(folder, plan, merging.merge(base, [FolderWeights(p) for p in others()], rule))
            for file in aligned.iterdir():
                if file.suffix != ".safetensors":
                    shutil.copy(file, folder / file.name)

        return write

    return {
        "linear": merged(lambda: unaligned, lambda: [aligned], merging.linear(0.5)),
        "spherical": merged(lambda: unaligned, lambda: [aligned], merging.spherical(0.5)),
        "safety vector twice (RESTA)": merged(lambda: aligned, lambda: [aligned, unaligned], merging.resta(1.0)),
        "malicious fine-tuning": merged(jailbroken, list, lambda name, weight, others: weight),
        "RESTA on malicious fine-tuning": merged(jailbroken, lambda: [aligned, unaligned], merging.resta(1.0)),
        "Safe LoRA on malicious fine-tuning": merged(
            lambda: aligned, lambda: [unaligned, jailbroken()], merging.safe_lora(0.5)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/safepatching"))
    parser.add_argument("--model", default="smollm2-fragile")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--set", action="append", default=[], help="key=value of the method, JSON values")
    parser.add_argument("--systems", default="all", help="names, with commas; base is always there")
    parser.add_argument("--seeds", default="0,1,2", help="of the presets")
    parser.add_argument("--fit-only", action="store_true", help="fit the presets among the systems, and stop")
    parser.add_argument("--plain", type=int, default=60, help="Self-Instruct prompts")
    parser.add_argument("--answered", type=int, default=100, help="instructions with a reference answer")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--texts", type=int, default=40, help="WikiText-2 paragraphs")
    args = parser.parse_args()
    last = [""]

    def tell(stage: str, done: int, total: int) -> None:
        stage, _, _ = stage.partition(" | ")
        if stage != last[0] or done == total:
            last[0] = stage
            print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)

    settings = {k: json.loads(v) for k, _, v in (s.partition("=") for s in args.set)}
    data = pa.load_data("starter") + pa.load_data(f"{args.data / 'advbench.jsonl'}[:400]", label="harmful")
    asked = suites(args.data, args.plain, args.answered)
    lines = (args.data / "wikitext2_valid.jsonl").read_text(encoding="utf-8").splitlines()[: args.texts]
    texts = [json.loads(line)["text"] for line in lines]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    model, tokenizer = pa.load_model(args.model, dtype=args.dtype)

    def saved(name: str) -> Path:
        folder = args.out / "models" / name
        if not folder.exists():
            loaded, words = (model, tokenizer) if name == args.model else pa.load_model(name, dtype=args.dtype)
            loaded.save_pretrained(folder)
            words.save_pretrained(folder)
        return folder

    def fitted(name: str, config: dict[str, Any]) -> tuple[pa.Alignment, float]:
        folder, begun = args.out / "alignments" / name, time.perf_counter()
        timed = folder.with_name(f"{name}.seconds")
        if not (folder / "alignment.json").exists():
            pa.fit(
                "safepatching",
                model,
                tokenizer,
                data=data,
                config={"effect_prompts": 0, **settings, **config},
                on_progress=tell,
                workdir=args.out / "work",
            ).save_pretrained(folder)
            write_whole(timed, str(time.perf_counter() - begun))
        return pa.Alignment.from_pretrained(folder), float(timed.read_text(encoding="utf-8"))

    def patched(config: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
        def write(folder: Path) -> dict[str, Any]:
            name = folder.name
            alignment, seconds = fitted(name, config)
            if alignment.unsafe:  # never exported: what it makes of the model lies here while it is measured
                with alignment.applied(model):
                    model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            else:
                export(alignment, str(saved(args.model)), to="model", out=folder, force=True)
            size = sum(file.stat().st_size for file in (args.out / "alignments" / name).iterdir())
            return {"seconds": seconds, "bytes": size, "config": alignment.config, **alignment.info}

        return write

    def ablated(preset: str, config: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
        """One thing changed in a preset, at the alpha and beta that were chosen for it."""

        def write(folder: Path) -> dict[str, Any]:
            whole, _ = fitted(f"{preset}, seed {seeds[0]}", {"preset": preset, "seed": seeds[0]})
            chosen = {key: whole.config[key] for key in ("alpha", "beta")}
            return patched({"preset": preset, "seed": seeds[0], **chosen, **config})(folder)

        return write

    def jailbroken() -> Path:
        folder = args.out / "models" / "unsafe-malicious-fine-tuning"
        if not folder.exists():
            alone = {"combine": "over_safety", "p": 1.0, "b": 1.0, "alpha": 1.0, "beta": 1.0}
            patched(alone)(folder)
        return folder

    systems: dict[str, Callable[[Path], Any]] = {"base": lambda folder: shutil.copytree(saved(args.model), folder)}
    for preset in PRESETS:
        for seed in seeds:
            systems[f"{preset}, seed {seed}"] = patched({"preset": preset, "seed": seed})
    systems |= {
        name: patched({"preset": "published", **config, "seed": seeds[0]})
        for name, config in BASELINES.items()
        if "beta" in config
    }
    for preset in PRESETS:
        for name, config in ABLATIONS.items():
            systems[f"{preset}, {name}"] = ablated(preset, config)
    if args.model != "smollm2":
        systems |= checkpoints(saved(args.model), saved("smollm2"), jailbroken)
    wanted = list(systems) if args.systems == "all" else ["base", *args.systems.split(";")]
    if args.fit_only:  # so that fits and replies can go on side by side
        for preset, seed in itertools.product(PRESETS, seeds):
            if f"{preset}, seed {seed}" in wanted:
                fitted(f"{preset}, seed {seed}", {"preset": preset, "seed": seed})
        return
    found: dict[str, Any] = {}
    for name in wanted:
        kept = args.out / "rows" / f"{name}.json"
        if not kept.exists():
            folder = args.out / "models" / name
            shutil.rmtree(folder, ignore_errors=True)
            about = systems[name](folder)
            figures, rows = measured(folder, asked, texts, args.max_new_tokens)
            kept.parent.mkdir(parents=True, exist_ok=True)
            about = about if isinstance(about, dict) else {}
            write_whole(kept, json.dumps({"figures": figures, "about": about, "rows": rows}, ensure_ascii=False))
            shutil.rmtree(folder)
        one = json.loads(kept.read_text(encoding="utf-8"))
        found[name] = {"figures": one["figures"], **one["about"], "command": command()}
        print(line(name, found), flush=True)
    keep(RESULTS / f"safepatching_{args.model}.json", args, found)


def keep(path: Path, args: Any, found: dict[str, Any]) -> None:
    """Write the systems down beside those of earlier runs that asked the same questions on the same processor (bfloat16
    rounds differently on another); each tells its own command."""
    asked = ("model", "dtype", "plain", "answered", "max_new_tokens", "texts")
    questions = {name: getattr(args, name) for name in asked} | {"cpu": cpu_name()}
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = earlier.get("questions") == questions
    systems = {**(earlier["systems"] if same else {}), **found}
    write_whole(path, json.dumps({"questions": questions, "systems": systems}, indent=1) + "\n")


def line(name: str, found: dict[str, Any]) -> str:
    """One system's figures for a terminal: compliance or refusals, and degenerate ones, in per cent."""
    figures, base = found[name]["figures"], found["base"]["figures"]
    cells = [f"{name:36s}"]
    for suite, counts in figures.items():
        if isinstance(counts, dict):
            word = "compliance" if suite in ("advbench", "harmbench_val") else "refusal"
            low, high = wilson(counts[word], counts["n"])
            share, noise = counts[word] / counts["n"], counts["degenerate"] / counts["n"]
            cells.append(f"{suite} {100 * share:.1f} ({100 * low:.0f}-{100 * high:.0f}) noise {100 * noise:.1f}")
    cells.append(f"ppl x{figures['perplexity'] / base['perplexity']:.3f}")
    cells.append(f"ROUGE-L x{figures[REFERENCE]['rouge_l'] / base[REFERENCE]['rouge_l']:.3f}")
    seconds = found[name].get("seconds", math.nan)
    return " | ".join([*cells, f"{seconds:.0f} s"])


if __name__ == "__main__":
    main()
