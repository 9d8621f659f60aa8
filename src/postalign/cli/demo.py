"""`postalign demo`: SafeInfer fitted on the built-in fragile model and measured against it, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Flag, note, progress
from .eval import show

if TYPE_CHECKING:
    from ..alignment import Alignment

MODEL = "smollm2-fragile"
FULL = {
    "trials": 40,
    "effect_prompts": 25,
    "guide_pairs": 64,
    "guide_steps": 16,
    "strengths": [0.15, 0.2, 0.3, 0.4],
}
QUICK = {
    "shots": 4,
    "trials": 12,
    "effect_prompts": 6,
    "guide_pairs": 16,
    "guide_steps": 4,
    "strengths": [0.3],
    "strength": 0.3,
    "gate_layer": 18,
}
FULL_PROMPTS, QUICK_PROMPTS = 32, 8


def run(*, out: Path = Path("postalign-demo"), quick: Flag = False) -> None:
    """Fit SafeInfer on smollm2-fragile and compare it with the model as it is. Killed, it goes on where it was.

    Parameters
    ----------
    out
        Folder for the alignment, the run and the report.
    quick
        Fewer prompts everywhere: under three minutes, rougher numbers.
    """
    import postalign as pa

    from ..evaluation import load_suite
    from ..evaluation.report import write_report

    out = out / "quick" if quick else out
    model, tokenizer = pa.load_model(MODEL)
    settings: dict[str, Any] = QUICK if quick else FULL
    with progress() as on_progress:
        alignment = fitted(model, tokenizer, out, settings, on_progress)
        systems = ablations(alignment)
        suite = load_suite("starter").limited(QUICK_PROMPTS if quick else FULL_PROMPTS)
        summary = pa.evaluate(
            model,
            tokenizer,
            systems,
            [suite],
            out=out / "run",
            max_new_tokens=48 if quick else 96,
            batch_size=32,
            kl_prompts=8 if quick else 24,
            on_progress=on_progress,
        )
    page = write_report([out / "run"], out / "report.html", {"safeinfer": alignment})
    show(summary)
    side_by_side(out / "run", list(systems))
    print(f"\nReport: {page.resolve()}")
    print(f"Alignment: {(out / 'safeinfer').resolve()}")
    print(f"Use it: postalign generate {MODEL} --alignment {out / 'safeinfer'} -p 'Your question'")


def fitted(model: Any, tokenizer: Any, out: Path, settings: dict[str, Any], on_progress: Any) -> Alignment:
    """The demo's alignment: read from `out` where it is there and still fits, else fitted (from its finished stages)."""
    import postalign as pa

    folder, data = out / "safeinfer", pa.load_data("starter")
    if (folder / "alignment.json").exists():
        alignment = pa.Alignment.from_pretrained(folder)
        same = all(alignment.config.get(k) == v for k, v in settings.items() if k != "strength")
        if same and alignment.provenance["data"]["hash"] == data.hash:
            try:
                alignment.check(model, tokenizer)
                note(f"SafeInfer is fitted already: {folder}")
                return alignment
            except pa.PostalignError:
                note(f"{folder} was fitted on another model: fitting again.")
    alignment = pa.fit(
        "safeinfer",
        model,
        tokenizer,
        data=data,
        config=settings,
        on_progress=on_progress,
        workdir=out / "work",
    )
    alignment.save_pretrained(folder)
    return alignment


def ablations(alignment: Alignment) -> dict[str, Alignment | None]:
    """The demo's systems: all of them are parts of the one alignment."""
    return {
        "base": None,
        "amplification only": alignment.only("amplification"),
        "guidance only": alignment.only("guidance"),
        "SafeInfer published": alignment.only("amplification", "guidance"),
        "SafeInfer adaptive": alignment,
    }


def side_by_side(run_folder: Path, systems: list[str]) -> None:
    """Three prompts with the base's reply and the adaptive one's. A compliant reply to a harmful prompt is not shown."""
    from ..evaluation.report import read_run

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_run(run_folder).rows:
        found.setdefault(row["id"], {})[row["system"]] = row
    first, last = systems[0], systems[-1]
    harmful = [r for r in found.values() if r[first]["label"] == "harmful"]
    benign = [r for r in found.values() if r[first]["label"] == "benign"]
    mended = [r for r in harmful if r[first]["verdict"] == "compliance" and r[last]["verdict"] == "refusal"]
    for replies in [*(mended or harmful)[:1], *harmful[-1:], *benign[:1]]:
        print(f"\n> {replies[first]['prompt']}")
        for name in (first, last):
            row = replies[name]
            hide = row["label"] == "harmful" and row["verdict"] == "compliance"
            text = "(complies; hidden here, folded in the report)" if hide else " ".join(row["response"].split())[:240]
            print(f"  {name:>18}: {text}")
