"""What a release says of itself is the same everywhere, and the files that the package needs are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import postalign

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(postalign.__file__).parent

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not run from a clone")


def test_version_is_one() -> None:
    assert f"version: {postalign.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {postalign.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned() -> None:
    """Every requirement of pyproject.toml has a pin in constraints.txt, on Python 3.10 and on later ones."""
    project = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    project = project.split("dependencies = [", 1)[1]
    wanted = {name.lower() for name in re.findall(r'"([A-Za-z][\w-]*)(?:\[\w+\])?>=', project)}
    assert len(wanted) > 15
    pins: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        found = re.fullmatch(r'([\w-]+)==[\w.]+(?:; python_version (<|>=) "3\.11")?', line)
        if found:
            pins.setdefault(found[1], set()).add(found[2] or "any")
    assert {name: pins.get(name) for name in wanted if pins.get(name) not in ({"any"}, {"<", ">="})} == {}


def test_package_data_is_there() -> None:
    for name in ("py.typed", "evaluation/report.html.j2", "evaluation/trace.html.j2", "evaluation/plain_text.jsonl"):
        assert (PACKAGE / name).is_file()
    for name in ("embedded_judge/weights.safetensors", "embedded_judge/README.md", "rubrics/refusal.yaml"):
        assert (PACKAGE / "evaluation" / name).is_file()
    assert list((PACKAGE / "data" / "starter").glob("*.jsonl"))
