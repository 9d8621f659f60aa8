"""A stage is done once for the same inputs; what was not finished leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postalign.errors import PostalignError
from postalign.methods.stages import Stages, read_texts, text_tensor

RESULT = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3, dtype=torch.int16)}


class Work:
    """Counts how often it was done."""

    def __init__(self, result: dict[str, Tensor] | None = None, fails: type[BaseException] | None = None):
        self.result, self.fails, self.done = result or RESULT, fails, 0

    def __call__(self) -> dict[str, Tensor]:
        self.done += 1
        if self.fails is not None:
            raise self.fails
        return self.result


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_done_once(tmp_path: Path) -> None:
    work, stages = Work(), Stages(tmp_path / "new" / "folder")
    assert same(stages("means", {"x": 1, "y": [2, None]}, work), RESULT)
    assert same(stages("means", {"y": [2, None], "x": 1}, work), RESULT)
    assert same(Stages(str(tmp_path / "new" / "folder"))("means", {"x": 1, "y": [2, None]}, work), RESULT)
    assert work.done == 1


@pytest.mark.parametrize("other", [("means", {"x": 2}), ("means", {"x": 1, "y": 0}), ("effects", {"x": 1})])
def test_other_inputs_or_another_name_are_other_work(tmp_path: Path, other: tuple[str, Any]) -> None:
    first, second, stages = Work(), Work({"a": torch.ones(1)}), Stages(tmp_path)
    stages("means", {"x": 1}, first)
    assert same(stages(*other, second), {"a": torch.ones(1)})
    assert same(stages("means", {"x": 1}, first), RESULT)
    assert (first.done, second.done) == (1, 1)


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work, stages = Work(), Stages(None)
    stages("means", {}, work)
    stages("means", {}, work)
    assert work.done == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_interrupted_work_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    stages, work = Stages(tmp_path), Work()
    with pytest.raises(error):
        stages("means", {}, Work(fails=error))
    assert not any(tmp_path.iterdir())
    assert same(stages("means", {}, work), RESULT)
    assert work.done == 1


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_killed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    stages, work = Stages(tmp_path), Work()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, step, _raise(KeyboardInterrupt()))
        stages("means", {}, work)
    assert not any(tmp_path.iterdir())
    assert same(stages("means", {}, work), RESULT)
    assert work.done == 2


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _raise(OSError(28, "No space left on device")))
    with pytest.raises(PostalignError, match=r"No space left on device\. Free space"):
        Stages(tmp_path)("means", {}, Work())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"\x00" * 4, b"{}", None])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    stages, work = Stages(tmp_path), Work()
    stages("means", {}, work)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    assert same(stages("means", {}, work), RESULT)
    assert same(stages("means", {}, work), RESULT)
    assert work.done == 2


def test_texts(tmp_path: Path) -> None:
    texts = ["", "two\nlines", 'ünï "quoted" 😀 \\ ☃', " space "]
    kept = Stages(tmp_path)("replies", {}, lambda: {"replies": text_tensor(texts)})
    assert kept["replies"].dtype == torch.uint8
    assert read_texts(kept["replies"]) == texts
    assert read_texts(Stages(tmp_path)("replies", {}, Work())["replies"]) == texts
    assert read_texts(text_tensor([])) == []
