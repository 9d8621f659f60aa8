"""`postalign trace`: what it passes on, prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postalign.evaluation.trace import trace
from tests.decoding.tools import parts
from tests.decoding.twin import PROMPTS

from .conftest import Outcome


@pytest.fixture
def folder(tmp_path: Path, stand_in: Callable[[str, Any], None], tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """A saved alignment, and a stand-in for the model's loading."""
    parts("amplification+adapter+gate", tiny_llama, tiny_tokenizer).save_pretrained(tmp_path / "made")
    stand_in("load_model", lambda name, **options: (tiny_llama, tiny_tokenizer))
    return tmp_path / "made"


def test_json_is_the_trace(folder: Path, command: Callable[..., Outcome], tiny_llama: Any, tiny_tokenizer: Any) -> None:
    import postalign as pa

    argv = ["trace", "tiny", "--alignment", folder, "-p", PROMPTS[0], "--max-new-tokens", 4, "--top", 2, "--json"]
    outcome = command(*argv)
    assert outcome.code == 0
    alignment = pa.Alignment.from_pretrained(folder)
    expected = trace(tiny_llama, tiny_tokenizer, PROMPTS[0], alignment, max_new_tokens=4, top=2)
    assert json.loads(outcome.out) == json.loads(json.dumps(expected.to_dict()))


def test_terminal(folder: Path, command: Callable[..., Outcome], tiny_llama: Any, tiny_tokenizer: Any) -> None:
    said = []
    for prompt in PROMPTS:  # the gate opens for some of them
        outcome = command("trace", "tiny", "--alignment", folder, "-p", prompt, "--max-new-tokens", 3)
        assert outcome.code == 0
        said.append(outcome.out)
        lines = [line.split() for line in outcome.out.splitlines()]
        assert sum(bool(words) and words[0].rstrip("▶*") in ("1", "2", "3") for words in lines) >= 3
    opened = [text for text in said if "Gate: open" in text]
    closed = [text for text in said if "Gate: closed" in text]
    assert opened and closed and len(opened) + len(closed) == len(said)
    assert all("mixed in at 3 of 3 tokens" in text for text in opened)
    assert all("Changed: 0 of 3 tokens" in text and "▶" not in text for text in closed)
    assert any("▶" in text and "the first is number" in text for text in opened)


def test_page(folder: Path, command: Callable[..., Outcome], tmp_path: Path) -> None:
    page = tmp_path / "deep" / "trace.html"
    outcome = command("trace", "tiny", "--alignment", folder, "-p", PROMPTS[0], "--max-new-tokens", 3, "--html", page)
    assert outcome.code == 0 and outcome.out == "" and str(page) in outcome.err
    assert PROMPTS[0] in page.read_text()


def test_wrong_use(command: Callable[..., Outcome]) -> None:
    assert command("trace", "tiny").code == 2
    outcome = command("trace", "tiny", "-p", "Hi", "--top", 0)
    assert outcome.code == 2 and "at least 1" in outcome.err
