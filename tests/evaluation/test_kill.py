"""A run that is killed at random again and again ends with the bytes of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

KILLS, MOST_LIVES = 20, 80
ROOT = Path(__file__).parents[2]


@pytest.fixture(name="process")
def process_fixture() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.evaluation.lives"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def life(process: subprocess.Popen[str], out: Path, seconds: float | None) -> tuple[int, float]:
    """Let a child work on `out`, killed after `seconds` (None: not at all): (how it ended, how long it lived)."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{out}\n")
    process.stdin.flush()
    child, began = int(process.stdout.readline()), time.monotonic()
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline()), time.monotonic() - began


def contents(out: Path) -> dict[str, bytes]:
    """All files of a run but those of the costs, hidden ones too."""
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith("costs") and p.name != ".lock"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed children are forked, which this system cannot")
def test_killed_twenty_times_it_ends_with_the_same_bytes(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    assert life(process, tmp_path / "first", None)[0] == 0
    ended, whole = life(process, tmp_path / "whole", None)
    expected = contents(tmp_path / "whole")
    assert ended == 0 and expected == contents(tmp_path / "first")
    assert len(expected["replies.jsonl"].splitlines()) == 2 * 2 * (26 + 7)
    chance, kills, run, halfway = random.Random(5), 0, 0, set()
    for _ in range(MOST_LIVES):
        out = tmp_path / f"run{run}"
        ended, _ = life(process, out, chance.uniform(0.05, 0.5) * whole)
        kills += ended == signal.SIGKILL
        assert ended in (0, signal.SIGKILL)
        replies = out / "replies.jsonl"
        halfway.add(replies.read_bytes().count(b"\n") if replies.exists() else 0)
        if ended == 0 or kills == KILLS:
            assert life(process, out, None)[0] == 0
            assert contents(out) == expected
            if kills == KILLS:
                break
            run += 1
    assert kills == KILLS
    assert len(halfway - {0, 2 * 2 * (26 + 7)}) >= 5, "the kills came too early or too late to say anything"
    assert json.loads(expected["run.json"])["asked"][-1] == ["pushed", "few", 1]
