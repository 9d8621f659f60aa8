"""The folder of built-in models: where it is, whether what lies in it is whole.

Knows files, sizes and digests; knows nothing of models, sources or the network. A cached model is a folder
with a `manifest.json`, written last, that lists every other file with its size and a digest. Small files are
digested in full, big ones by their ends and by blocks spread over them: enough to notice a cut, a hole or a
swapped file in milliseconds, not proof against a forger.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from ..files import write_whole

SCHEMA = 1
MANIFEST = "manifest.json"
SMALL, BLOCK, BLOCKS = 16 << 20, 64 << 10, 64


def cache_root() -> Path:
    """$POSTALIGN_CACHE, or `postalign` in the place where this platform keeps a user's caches."""
    named = os.environ.get("POSTALIGN_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "postalign"


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """List every file of `folder`, with `facts` (where it came from), in its manifest."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "digest": digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_whole(folder / MANIFEST, json.dumps({"schema": SCHEMA, **facts, "files": files}, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None when there is none that can be used."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    usable = isinstance(manifest, dict) and manifest.get("schema") == SCHEMA and isinstance(manifest.get("files"), dict)
    return manifest if usable else None


def whole(folder: Path) -> bool:
    """Whether `folder` holds every file of its manifest, unchanged as far as sizes and digests tell."""
    manifest = read_manifest(folder)
    if not manifest or not manifest["files"]:
        return False
    return all(_unchanged(folder / name, facts) for name, facts in manifest["files"].items())


def _unchanged(path: Path, facts: Any) -> bool:
    try:
        if path.stat().st_size != facts["size"] or digest(path) != facts["digest"]:
            return False
        return path.suffix != ".safetensors" or tensors_fit(path)
    except (OSError, KeyError, TypeError):
        return False


def digest(path: Path) -> str:
    """sha256 of a file up to 16 MiB; of a bigger one, of 64 blocks of 64 KiB spread from its start to its
    end.
    """
    size = path.stat().st_size
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        if size <= SMALL:
            sha.update(handle.read())
        else:
            for block in range(BLOCKS):
                handle.seek(block * (size - BLOCK) // (BLOCKS - 1))
                sha.update(handle.read(BLOCK))
    return sha.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of the whole file."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def tensors_fit(path: Path) -> bool:
    """Whether the header of a safetensors file can be read and its last tensor ends where the file does."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= min(size - 8, 100_000_000):
            return False
        try:
            header = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return bool(ends) and 8 + length + max(ends) == size


def sweep(folder: Path, names: list[str]) -> None:
    """Remove what killed runs left half-written beside the models `names`. Call it under the folder's lock
    only.
    """
    for name in names:
        for left in folder.glob(f".{name}.*"):
            shutil.rmtree(left, ignore_errors=True)
