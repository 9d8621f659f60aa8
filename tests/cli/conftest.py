"""The command line with a stand-in model: what the verbs pass on and print."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import postalign
from postalign.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `postalign ...`; gives the exit code and both outputs."""

    def run(*argv: Any) -> Outcome:
        code = main([str(part) for part in argv])
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Replace a public name of postalign for one test."""
    return lambda name, value: monkeypatch.setitem(postalign.__dict__, name, value)


@pytest.fixture
def loaded(stand_in: Callable[[str, Any], None]) -> list[tuple[str, dict[str, Any]]]:
    """A stand-in for `load_model`; the list holds its calls."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def load_model(name: str, **options: Any) -> tuple[str, str]:
        calls.append((name, options))
        return "the model", "the tokenizer"

    stand_in("load_model", load_model)
    return calls
