"""Files and folders are written whole or not at all, whatever fails on the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from postalign.errors import PostalignError, UsageError
from postalign.files import whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_and_bytes(tmp_path: Path) -> None:
    write_whole(tmp_path / "deep" / "er" / "a.txt", "é\n")
    write_whole(str(tmp_path / "b.bin"), b"\x00\xff")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "é\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["b.bin", "deep"]


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, "a long first version")
    write_whole(path, "second")
    assert path.read_text() == "second" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_the_old_file(
    stage: str, old: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    if old is not None:
        path.write_text(old)
    monkeypatch.setattr(os, stage, full)
    with pytest.raises(PostalignError, match=r"could not write .*No space left.*nothing was changed") as caught:
        write_whole(path, "new")
    assert "\n" not in str(caught.value) and not isinstance(caught.value, UsageError)
    assert names(tmp_path) == ([] if old is None else ["a"])
    assert old is None or path.read_text() == old


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(PostalignError, match="could not write"):
        write_whole(tmp_path / "a" / "b", "y")
    with pytest.raises(PostalignError, match="could not write"), whole_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a").read_text() == "x" and names(tmp_path) == ["a"]


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(PostalignError, match="could not write"):
        write_whole(tmp_path / "a", "y")
    assert names(tmp_path) == ["a"]


# folders


@pytest.mark.parametrize("old", [None, {}, {"x": "old", "y": "old"}])
def test_a_folder_takes_the_place_of_the_old_one(old: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    if old is not None:
        path.mkdir(parents=True)
        for name, text in old.items():
            (path / name).write_text(text)
    with whole_folder(path) as staged:
        assert staged.parent == path.parent and not any(staged.iterdir())
        (staged / "x").write_text("new")
        assert path.exists() == (old is not None)
    assert names(path) == ["x"] and (path / "x").read_text() == "new"
    assert names(tmp_path / "deep") == ["out"]


def old_folder(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    (path / "x").write_text("old")
    return path


def assert_old(path: Path) -> None:
    assert names(path.parent) == ["out"]
    assert names(path) == ["x"] and (path / "x").read_text() == "old"


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), PostalignError),
        (ValueError("x"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (UsageError("x"), UsageError),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_inside_leaves_the_old_folder(
    error: BaseException, seen: type[BaseException], exists: bool, tmp_path: Path
) -> None:
    path = old_folder(tmp_path) if exists else tmp_path / "out"
    with pytest.raises(seen), whole_folder(path) as staged:
        (staged / "half").write_text("half")
        raise error
    if exists:
        assert_old(path)
    else:
        assert names(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_exchange_brings_the_old_folder_back(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old_folder(tmp_path)
    real, calls = os.replace, []

    def sometimes(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == failing:
            full()
        real(a, b)

    monkeypatch.setattr(os, "replace", sometimes)
    with pytest.raises(PostalignError, match="nothing was changed"), whole_folder(path) as staged:
        (staged / "x").write_text("new")
    assert_old(path)


def test_what_cannot_be_removed_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new folder is there: leftovers of the old one must not be reported as "nothing was changed"."""
    import shutil

    path, real = old_folder(tmp_path), shutil.rmtree

    def refuse(target: Any, ignore_errors: bool = False, **more: Any) -> None:
        if not ignore_errors:
            full()

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with whole_folder(path) as staged:
        (staged / "x").write_text("new")
    monkeypatch.setattr(shutil, "rmtree", real)
    assert (path / "x").read_text() == "new"
