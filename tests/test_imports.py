"""Importing postalign is quick: it needs no heavy library, and so does the command line's help."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "gguf", "pyarrow", "scipy", "sklearn"}


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import postalign; postalign.__version__",
        "import postalign.errors, postalign.files",
        "from postalign.cli import main\nfor v in 'fit', 'generate', 'eval', 'report': main([v, '--help'])",
    ],
    ids=["package", "errors and files", "help of every verb"],
)
def test_light_imports(code: str) -> None:
    assert not loaded_after(code) & HEAVY


def test_every_public_name_is_there() -> None:
    import postalign

    assert set(postalign.__all__) <= set(dir(postalign))
    for name in postalign.__all__:
        assert getattr(postalign, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = postalign.no_such_name
