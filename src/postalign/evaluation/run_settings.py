"""What a run was made with: written once, compared when the run is taken up again.

Knows how to name a model, an alignment and a suite so that a change shows; knows nothing of generating or
judging.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import UsageError
from ..files import write_whole
from .suites import Suite

if TYPE_CHECKING:
    from torch import nn

    from ..alignment import Alignment

SCHEMA = 1
_NAMED = ("systems", "suites")  # these may grow; all else must stay


def run_settings(
    model: nn.Module,
    tokenizer: Any,
    systems: Mapping[str, Alignment | None],
    suites: Sequence[Suite],
    texts: Sequence[str],
    **settings: Any,
) -> dict[str, Any]:
    """Everything that decides the rows of a run, as JSON. Batch size is not of it: it changes no reply."""
    text = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest() if texts else None
    return {
        "schema": SCHEMA,
        "postalign": __version__,
        "model": _fingerprint(model, tokenizer),
        **settings,
        "text": text,
        "systems": {name: alignment_digest(alignment) for name, alignment in systems.items()},
        "suites": {suite.name: {"n": len(suite.items), "hash": suite.hash} for suite in suites},
    }


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Write `run.json`, or add to it what is new. Raises UsageError where `settings` say otherwise."""
    path = out / "run.json"
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(p.suffix in (".jsonl", ".json") for p in out.iterdir())):
            raise UsageError(f"{out} exists and is not a run: choose an empty or a new folder.")
        write_whole(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: choose a new folder, or remove {out} to start again.") from error
    merged = dict(settings)
    for key in settings:
        before, now = old.get(key), settings[key]
        if key in _NAMED:
            for name in now:
                if name in (before or {}) and before[name] != now[name]:
                    raise _differs(out, f"another {key[:-1]} under the name {name!r}")
            merged[key] = {**(before or {}), **now}
        elif key == "text" and before != now and None in (before, now):
            merged[key] = before or now  # one of the two did not measure perplexity
        elif key == "model" and before != now:
            part = next(k for k in now if not isinstance(before, dict) or before.get(k) != now[k])
            raise _differs(out, f"another model ({part} differs)")
        elif before != now:
            raise _differs(out, f"{key} = {_short(before)}, not {_short(now)}")
    if merged != old:
        write_whole(path, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")


def alignment_digest(alignment: Alignment | None) -> str | None:
    """sha256 of what an alignment does: its edits and gate, settings and tensors. Saved and loaded, it stays
    the same.
    """
    if alignment is None:
        return None
    digest = hashlib.sha256(alignment.method.encode())
    for part in [*alignment.edits, *([alignment.gate] if alignment.gate is not None else [])]:
        settings, tensors = part.state()
        digest.update(json.dumps(_canonical(settings), sort_keys=True, default=str).encode())
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def head_maps(out: Path, systems: Mapping[str, Alignment | None]) -> None:
    """Keep the indirect effects of the systems that have them in `head_effects.json`, for the report."""
    path = out / "head_effects.json"
    maps: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = {name: head_map(alignment) for name, alignment in systems.items() if alignment is not None}
    new = {name: one for name, one in found.items() if one is not None}
    if new:
        write_whole(path, json.dumps({**maps, **new}) + "\n")


def head_map(alignment: Any) -> dict[str, Any] | None:
    """`{"effects": [layers][heads], "heads": [[layer, head], ...]}` of an alignment, or None where it has no
    such array.
    """
    effects = getattr(alignment, "arrays", {}).get("head_effects")
    if effects is None:
        return None
    heads = [[int(layer), int(head)] for layer, head in alignment.info.get("heads", [])]
    return {"effects": [[round(float(v), 6) for v in row] for row in effects], "heads": heads}


def _fingerprint(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    from ..alignment import fingerprint  # heavy; met when a run starts

    return fingerprint(model, tokenizer)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_canonical(one) for one in value]
        return sorted(items) if all(isinstance(one, str) for one in items) else items
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _differs(out: Path, what: str) -> UsageError:
    return UsageError(f"the run in {out} was made with {what}: give the same again, or another folder.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
