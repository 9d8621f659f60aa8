"""Files that are written whole or not at all.

Everything is written beside its destination and renamed there, so that a kill, a full disk or an exception
leaves the old file (or none), never half a new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import PostalignError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` atomically. Raises PostalignError when the disk refuses."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
            temporary = Path(handle.name)
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` to fill; it takes the place of `path` only if the block succeeds."""
    path = Path(path)
    staged: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        staged.chmod(0o755)
        yield staged
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old.")) / "old"
            try:
                os.replace(path, old)
                os.replace(staged, path)
            finally:
                if old.exists() and not path.exists():
                    os.replace(old, path)  # the new folder did not get there: the old one comes back
                shutil.rmtree(old.parent, ignore_errors=True)
        else:
            os.replace(staged, path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def _refused(path: Path, error: OSError) -> PostalignError:
    reason = error.strerror or str(error)
    return PostalignError(f"could not write {path}: {reason}. Free space or choose another place; nothing was changed.")
