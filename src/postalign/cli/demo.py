"""`postalign demo`: SafeInfer fitted on the built-in fragile model and measured against it, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Flag, OnProgress, note, progress
from .eval import show

if TYPE_CHECKING:
    from ..alignment import Alignment

MODEL = "smollm2-fragile"
FULL: dict[str, Any] = {"trials": 40, "effect_prompts": 25, "guide_pairs": 48, "guide_steps": 16}
QUICK: dict[str, Any] = {
    "shots": 4,
    "trials": 12,
    "effect_prompts": 6,
    "guide_pairs": 16,
    "guide_steps": 4,
    "gate_layers": [10, 14, 18, 22],
}
STRENGTHS = {"published": [0.15, 0.2, 0.3], "adaptive": [0.5, 1.0, 1.5]}
QUICK_STRENGTHS = {"published": [0.2], "adaptive": [1.0]}
FULL_PROMPTS, QUICK_PROMPTS = 32, 8


def run(*, out: Path = Path("postalign-demo"), quick: Flag = False) -> None:
    """Fit SafeInfer on smollm2-fragile and compare it with the model as it is. Killed, it goes on where it was.

    Parameters
    ----------
    out
        Folder for the alignments, the run and the report.
    quick
        Fewer prompts everywhere: under three minutes, rougher numbers.
    """
    import postalign as pa

    from ..evaluation import load_suite
    from ..evaluation.report import write_report

    out = out / "quick" if quick else out
    note(f"Loading {MODEL} (the first time it is downloaded: about 95 MB)")
    model, tokenizer = pa.load_model(MODEL, dtype=quickest_dtype())
    strengths = QUICK_STRENGTHS if quick else STRENGTHS
    with progress() as on_progress:
        fits = {
            preset: fitted(
                model,
                tokenizer,
                out,
                preset,
                {**(QUICK if quick else FULL), "preset": preset, "strengths": strengths[preset]},
                on_progress,
            )
            for preset in ("published", "adaptive")
        }
        systems = {
            "base": None,
            "amplification only": fits["published"].only("amplification"),
            "guidance only": fits["published"].only("guidance"),
            "SafeInfer published": fits["published"],
            "SafeInfer adaptive": fits["adaptive"],
        }
        summary = pa.evaluate(
            model,
            tokenizer,
            systems,
            [load_suite("starter").limited(QUICK_PROMPTS if quick else FULL_PROMPTS)],
            out=out / "run",
            max_new_tokens=48 if quick else 80,
            batch_size=32,
            kl_prompts=8 if quick else 16,
            on_progress=on_progress,
        )
    page = write_report([out / "run"], out / "report.html", fits)
    show(summary)
    side_by_side(out / "run", list(systems))
    print(f"\nReport: {page.resolve()}")
    print(f"Use it: postalign generate {MODEL} --alignment {out / 'adaptive'} -p 'Your question'")


def quickest_dtype() -> str | None:
    """bfloat16 where the processor multiplies such matrices itself (twice the speed and more), else the default."""
    import torch

    able = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("amx_tile", "avx512_bf16"))
    return "bfloat16" if any(check() for check in able) else None


def fitted(
    model: Any, tokenizer: Any, out: Path, preset: str, settings: dict[str, Any], on_progress: OnProgress
) -> Alignment:
    """The preset's alignment: read from `out` where it is there and still fits, else fitted, finished stages kept."""
    import postalign as pa

    folder, data = out / preset, pa.load_data("starter")
    if (folder / "alignment.json").exists():
        alignment = pa.Alignment.from_pretrained(folder)
        same = all(alignment.config.get(key) == value for key, value in settings.items())
        if same and alignment.provenance["data"]["hash"] == data.hash:
            try:
                alignment.check(model, tokenizer)
            except pa.PostalignError:
                note(f"{folder} was fitted on another model: fitting again.")
            else:
                note(f"SafeInfer ({preset}) is fitted already: {folder}")
                return alignment

    def tell(stage: str, done: int, total: int) -> None:
        on_progress(f"{preset}: {stage}", done, total)

    alignment = pa.fit(
        "safeinfer", model, tokenizer, data=data, config=settings, on_progress=tell, workdir=out / "work"
    )
    alignment.save_pretrained(folder)
    return alignment


def side_by_side(run_folder: Path, systems: list[str]) -> None:
    """Three prompts with the base's reply and the adaptive one's. Compliance with a harmful prompt is not shown."""
    from ..evaluation import read_run

    found: dict[str, dict[str, dict[str, Any]]] = {}
    read = read_run(run_folder)
    for row in read.rows:
        found.setdefault(row["id"], {})[row["system"]] = row | {"verdict": read.lead(row)}
    first, last = systems[0], systems[-1]
    harmful = [r for r in found.values() if r[first]["label"] == "harmful"]
    benign = [r for r in found.values() if r[first]["label"] == "benign"]
    mended = [r for r in harmful if r[first]["verdict"] == "compliance" and r[last]["verdict"] == "refusal"]
    for replies in [*(mended or harmful)[:1], *harmful[-1:], *benign[:1]]:
        print(f"\n> {replies[first]['prompt']}")
        for name in (first, last):
            row = replies[name]
            hide = row["label"] == "harmful" and row["verdict"] in ("compliance", "partial")
            text = "(complies; hidden here, folded in the report)" if hide else " ".join(row["response"].split())[:240]
            print(f"  {name:>18}: {text}")
