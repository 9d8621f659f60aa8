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

SCHEMA = 2
NAME = "run.json"
_NAMED = ("systems", "suites")  # these may grow; what has a name in them must stay
_GROWING = ("seeds", "asked", "environments", "reproduce")  # lists that get what is new


def run_settings(
    model: nn.Module,
    tokenizer: Any,
    systems: Mapping[str, Alignment | None],
    suites: Sequence[Suite],
    texts: Sequence[str],
    **settings: Any,
) -> dict[str, Any]:
    """The manifest of a run, as JSON: everything that decides its rows, and where and how they were made."""
    return {**planned(systems, suites, texts, **settings), "model": _fingerprint(model, tokenizer)}


def planned(
    systems: Mapping[str, Alignment | None], suites: Sequence[Suite], texts: Sequence[str], **settings: Any
) -> dict[str, Any]:
    """The manifest as far as it can be told before the model is loaded."""
    text = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest() if texts else None
    return {
        "schema": SCHEMA,
        "postalign": __version__,
        **settings,
        "text": text,
        "systems": {name: alignment_digest(alignment) for name, alignment in systems.items()},
        "suites": {suite.name: _suite(suite) for suite in suites},
    }


def settle(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write `run.json`, or add to it what is new; returns what it holds. Raises UsageError where it says otherwise."""
    path = out / NAME
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(p.suffix in (".jsonl", ".json") for p in out.iterdir())):
            raise UsageError(f"{out} exists and is not a run: choose an empty or a new folder.")
        write_manifest(out, settings)
        return settings
    old = read_manifest(out)
    merged = {**old, **settings}
    for key in settings:
        before: Any = old.get(key)
        now = settings[key]
        if key in _NAMED:
            for name in now:
                if name in (before or {}) and _asked(before[name]) != _asked(now[name]):
                    raise _differs(out, f"another {key[:-1]} under the name {name!r}")
            merged[key] = {**(before or {}), **now}
        elif key in _GROWING:
            merged[key] = [*(before or []), *(one for one in now if one not in (before or []))]
        elif key == "load":
            continue  # says where the model came from; whether it is the same one, the fingerprint says
        elif key == "text" and before != now and None in (before, now):
            merged[key] = before or now  # one of the two did not measure perplexity
        elif key == "model" and before != now:
            part = next(k for k in now if not isinstance(before, dict) or before.get(k) != now[k])
            raise _differs(out, f"another model ({part} differs)")
        elif before != now:
            raise _differs(out, f"{key} = {_short(before)}, not {_short(now)}")
    if merged != old:
        write_manifest(out, merged)
    return merged


def covers(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the run in `out` was made with all of `settings`, so that settling them would change nothing."""
    if not (out / NAME).exists():
        return False
    old = read_manifest(out)
    for key, now in settings.items():
        before = old.get(key)
        if key in ("environments", "reproduce") or (key == "text" and now is None):
            continue
        if key in _NAMED:
            same = all(name in old[key] and _asked(old[key][name]) == _asked(value) for name, value in now.items())
        else:
            same = all(one in (before or []) for one in now) if key in _GROWING else before == now
        if not same:
            return False
    return True


def read_manifest(out: Path) -> dict[str, Any]:
    """What `run.json` holds. Raises UsageError where there is none, or it cannot be read."""
    path = out / NAME
    if not path.exists():
        raise UsageError(f"{out} is not a run (no {NAME}): name a folder that `postalign eval` made.")
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged: choose a new folder, or remove {out} to start again.") from error
    return found


def write_manifest(out: Path, settings: Mapping[str, Any]) -> None:
    write_whole(out / NAME, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _suite(suite: Suite) -> dict[str, Any]:
    source = getattr(suite, "source", None)
    return {"n": len(suite.items), "hash": suite.hash, **({"source": dict(source)} if source else {})}


def _asked(named: Any) -> Any:
    """What tells two suites apart: the same prompts from another place are the same suite."""
    return {k: v for k, v in named.items() if k != "source"} if isinstance(named, dict) else named


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
