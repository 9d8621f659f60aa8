"""Exit codes, one-line errors and arguments common to the verbs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postalign import __version__
from postalign.cli.common import guarded, load_alignments, progress, read_config, readable
from postalign.errors import PostalignError, UsageError


def test_version_and_help(command: Callable[..., Any]) -> None:
    assert command("--version").out.strip() == __version__
    shown = command("--help")
    assert shown.code == 0
    for verb in ("eval", "fit", "generate", "report"):
        assert verb in shown.out


def test_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "postalign", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["genrate"], "generate"),
        (["fit", "safeinfer", "--oot", "x"], "--out"),
        (["generate", "--max-new-token", "3", "-p", "x"], "--max-new-tokens"),
        (["generate", "--top-k", "many", "-p", "x"], "--top-k"),
        (["fit", "safeinfer"], "--out"),
        (["fit"], "METHOD"),
        (["report"], "RUNS"),
        (["generate", "one", "two", "-p", "x"], "two"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(command: Callable[..., Any], argv: list[str], said: str) -> None:
    code, out, err = command(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PostalignError("no such\nthing"), 1, "error: no such thing\n"),
        (UsageError("not so"), 2, "error: not so\n"),
        (KeyboardInterrupt(), 1, "error: interrupted; run the same command again to go on\n"),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero (-v gives the traceback)\n"),
    ],
)
def test_failures(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    def fail() -> None:
        raise error

    assert guarded(fail, verbose=False) == code
    assert capsys.readouterr().err == line
    assert guarded(fail, verbose=True) == code
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and type(error).__name__ in told


def test_verbose_anywhere_gives_the_traceback(command: Callable[..., Any], stand_in: Callable[..., None]) -> None:
    def load_model(name: str, **options: Any) -> None:
        raise PostalignError(f"no model {name}: name another.")

    stand_in("load_model", load_model)
    for argv in (["-v", "generate", "m", "-p", "x"], ["generate", "m", "-p", "x", "--verbose"]):
        code, _, err = command(*argv)
        assert code == 1
        assert "Traceback" in err and err.endswith("error: no model m: name another.\n")
    assert command("generate", "m", "-p", "x").err == "error: no model m: name another.\n"


def test_model_options_reach_load_model(command: Callable[..., Any], stand_in: Callable[..., None]) -> None:
    calls: list[Any] = []

    def load_model(name: str, **options: Any) -> None:
        calls.append((name, options))
        raise PostalignError("enough.")

    stand_in("load_model", load_model)
    command("generate", "-p", "x")
    command("generate", "big", "--dtype", "bfloat16", "--device-map", "auto", "--trust-remote-code", "-p", "x")
    plain = {"dtype": None, "device_map": None, "revision": None, "trust_remote_code": False}
    assert calls[0] == ("smollm2", plain)
    assert calls[1] == (
        "big",
        {**plain, "dtype": "bfloat16", "device_map": "auto", "trust_remote_code": True},
    )


def test_read_config(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("heads: 4\nguide: none\nsearch: {trials: 3}\n")
    config = read_config(file, ["heads=6", "lambda=0.5", "scope=[last, generation]", "search.seed=1", "name=a=b"])
    assert config == {
        "heads": 6,
        "guide": "none",
        "lambda": 0.5,
        "scope": ["last", "generation"],
        "search": {"trials": 3, "seed": 1},
        "name": "a=b",
    }


@pytest.mark.parametrize("setting", ["heads", "=3", "a=[", "heads.more=1"])
def test_bad_setting(setting: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("heads: 4\n")
    with pytest.raises(UsageError, match="--set"):
        read_config(file, [setting])


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "just words"])
def test_bad_config_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"c\.yaml"):
        read_config(file, [])
    with pytest.raises(UsageError, match="absent"):
        read_config(tmp_path / "absent.yaml", [])


def test_empty_config_file_is_no_settings(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# nothing yet\n")
    assert read_config(file, []) == {}


def test_alignments_need_names_of_their_own(stand_in: Callable[..., None]) -> None:
    class Fake:
        @staticmethod
        def from_pretrained(folder: Path) -> str:
            return f"read from {folder}"

    stand_in("Alignment", Fake)
    assert load_alignments([Path("x/a"), Path("x/b/")]) == {"a": "read from x/a", "b": "read from x/b"}
    for folders in (["x/a", "y/a"], ["x/base"]):
        with pytest.raises(UsageError, match="rename"):
            load_alignments([Path(folder) for folder in folders])


def test_progress_without_a_terminal_is_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as on_progress:
        for i in range(3):
            on_progress("first", i, 3)
        on_progress("second", 0, 0)
    assert capsys.readouterr() == ("", "first (3)\nsecond\n")


def test_progress_on_a_terminal_shows_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress() as on_progress:
        for i in range(4):
            on_progress("effects of heads", i, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "effects of heads" in err and "3/3" in err


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (1500, "1.5 kB"), (7_340_000, "7.3 MB"), (2e9, "2.0 GB")])
def test_readable(size: float, text: str) -> None:
    assert readable(size) == text
