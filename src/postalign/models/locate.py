"""What a model's name means: a folder, a GGUF file or a hub id, and whether a model is there at all.

Knows folders and the hub's answers; loads nothing. Every failure is one line that names the cure.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import PostalignError, UsageError, nearest
from .builtin import BUILTINS
from .network import within

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_SECONDS = 5


def locate(name: str, revision: str | None, token: str | bool | None) -> tuple[str, dict[str, Any]]:
    """The folder or the hub id that `name` means, after seeing that a model is there, and how to load it."""
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path), {}
    if path.is_file():
        raise UsageError(f"{name} is a file: give the model's folder, a *.gguf file or a hub id.")
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"no such model folder: {name}.{_neighbour(path) or nearest(name, BUILTINS)} Check the path.")
    return name, _check_hub(name, revision, token)


def _check_folder(path: Path) -> None:
    """Raises UsageError for a folder that holds no causal language model."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UsageError(
                f"{path} is an adapter, not a model: merge it into its base model first and give that folder."
            )
        files = sorted(path.glob("*.gguf"))
        cure = f"give the file {files[0]}" if files else "give a folder saved with save_pretrained"
        raise UsageError(f"{path} holds no model (no config.json): {cure}.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path / 'config.json'} cannot be read as JSON: save the model again.") from error
    if not isinstance(config, dict) or not any(p.suffix in (".safetensors", ".bin") for p in path.iterdir()):
        raise UsageError(f"{path} holds no weights (*.safetensors): save or download the model again.")


def _check_hub(name: str, revision: str | None, token: str | bool | None) -> dict[str, Any]:
    """Ask the hub once, for a few seconds at most, whether it has the model.

    Returns the loading options that follow: where the hub is out of reach, only what is in its local cache.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    hint = nearest(name, BUILTINS)
    try:
        url = hf_hub_url(name, "config.json", revision=revision)
        within(HUB_SECONDS, lambda: get_hf_file_metadata(url, token=token, timeout=HUB_SECONDS))
        return {}
    except errors.GatedRepoError as error:
        raise PostalignError(f"{name} is gated: accept its terms on the hub and log in (hf auth login).") from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision!r}: give a branch, tag or commit that it has.") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"no model {name!r} here or on the hub.{hint} Check the name, or log in (hf auth login)."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UsageError(f"{name} has no config.json: it is not a model that transformers can load.") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{name!r} is no name of a model: {first_line(error)}.") from error
    except Exception as error:  # no network, in one of the client's many words for it
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return {"local_files_only": True}
        raise PostalignError(
            f"no folder {name!r}, and the model hub cannot be reached to look for it.{hint} "
            f"Connect to the network, give a local folder, or use a built-in model ({', '.join(BUILTINS)})."
        ) from error


def gguf_file(path: Path) -> Path:
    """`path`, after seeing that it is a GGUF file. Raises UsageError when it is not."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}.{_neighbour(path)} Check the path.")
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UsageError(f"{path} is not a GGUF file: download it again, or give a model folder or a hub id.")
    return path


def _neighbour(path: Path) -> str:
    """The name in the same folder that is closest to a path that does not exist."""
    try:
        return nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return ""


def first_line(error: BaseException) -> str:
    """The first line of an error, at most 300 characters, without the full stop."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    return text if len(text) <= 300 else text[:300] + "..."
