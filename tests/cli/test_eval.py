"""`postalign eval` and `postalign report`: what they pass on and print."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postalign.cli.eval import show, stamp


def figure(system: str, label: str | None, metric: str, value: float | None, n: int = 40) -> dict[str, Any]:
    share = metric in ("compliance", "refusal", "partial", "degenerate", "unscored")
    low, high = (value / 2, value * 2) if share and value is not None else (None, None)
    row = {"system": system, "suite": "mine", "label": label, "n": n, "metric": metric}
    return {**row, "value": value, "low": low, "high": high}


SUMMARY = [
    *(figure("base", "harmful", m, v) for m, v in [("compliance", 0.375), ("refusal", 0.5), ("degenerate", 0.1)]),
    figure("base", "harmful", "unscored", 0.025),
    figure("base", None, "tokens_per_second", 31.4159),
    figure("base", None, "perplexity", None),
]


@pytest.fixture
def evaluated(stand_in: Callable[..., None], loaded: list[Any]) -> list[dict[str, Any]]:
    """Stand-ins for load_model, Alignment and evaluate; the list holds the calls of evaluate."""
    calls: list[dict[str, Any]] = []

    class Fake:
        @staticmethod
        def from_pretrained(folder: Path) -> str:
            return f"alignment {folder.name}"

    def evaluate(model: Any, tokenizer: Any, systems: Any, suites: Any, **settings: Any) -> list[dict[str, Any]]:
        calls.append({"model": model, "systems": systems, "suites": suites, **settings})
        return SUMMARY

    stand_in("Alignment", Fake)
    stand_in("evaluate", evaluate)
    return calls


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"prompt {i}", "label": ("harmful", "safe")[i % 2]} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_eval(command: Callable[..., Any], evaluated: list[Any], suite: Path, tmp_path: Path) -> None:
    argv = ["eval", "m", "--alignment", tmp_path / "a", "--alignment", tmp_path / "b", "--suite", suite]
    done = command(*argv, "--limit", 2, "--max-new-tokens", 9, "--batch-size", 3, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    call = evaluated[0]
    assert call["systems"] == {"base": None, "a": "alignment a", "b": "alignment b"}
    assert [one.name for one in call["suites"]] == ["mine"]
    assert sorted(item.label for item in call["suites"][0].items) == [
        "benign",
        "benign",
        "harmful",
        "harmful",
    ]
    assert (call["out"], call["max_new_tokens"], call["batch_size"]) == (tmp_path / "run", 9, 3)
    assert "37.5 (19-75)" in done.out and "base" in done.out and "run" in done.out


def test_eval_wraps_each_suite(command: Callable[..., Any], evaluated: list[Any], suite: Path, tmp_path: Path) -> None:
    (tmp_path / "oktest.csv").write_text("prompt\nHow do I kill time?\n")
    argv = [
        "eval",
        "--suite",
        suite,
        "--benign",
        "oktest",
        "--data-dir",
        tmp_path,
        "--limit",
        1,
        "--out",
        tmp_path / "r",
    ]
    done = command(*argv, "--wrap", "role_play", "--wrap", "prefill+base64")
    assert done.code == 0, done.err
    suites = {one.name: one for one in evaluated[0]["suites"]}
    wraps = ("", "+role_play", "+prefill+base64")
    assert set(suites) == {f"{name}{wrap}" for name in ("mine", "oktest") for wrap in wraps}
    assert [len(one.items) for one in suites.values()] == [2, 1, 2, 2, 1, 1]
    assert {item.label for item in suites["oktest+role_play"].items} == {"benign"}
    assert all(item.prefill and item.wrapper == "prefill+base64" for item in suites["mine+prefill+base64"].items)
    code, _, err = command(*argv, "--wrap", "roleplay")
    assert code == 2 and "Did you mean 'role_play'" in err


def test_eval_passes_on_sampling_and_judges(
    command: Callable[..., Any], evaluated: list[Any], loaded: list[Any], suite: Path, tmp_path: Path
) -> None:
    given = ["--do-sample", "--temperature", 0.7, "--top-p", 0.9, "--top-k", 40, "--seed", 1, "--seed", 2]
    more = ["--judge", "rules", "--judge", "other", "--system", "Be kind."]
    done = command("eval", "m", "--suite", suite, "--out", tmp_path / "run", *given, *more, "--dtype", "bfloat16")
    assert done.code == 0, done.err
    call = evaluated[0]
    sampling = {name: call[name] for name in ("do_sample", "temperature", "top_p", "top_k", "seeds")}
    assert sampling == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seeds": [1, 2]}
    assert (call["judges"], call["system_prompt"]) == (["rules", "other"], "Be kind.")
    assert call["load"] == {
        "model": "m", "dtype": "bfloat16", "device_map": None, "revision": None, "trust_remote_code": False,
        "files": None,
    }  # fmt: skip
    assert not loaded, "the model is loaded when it is needed"
    call["model"]()
    assert loaded[0][0] == "m" and loaded[0][1]["dtype"] == "bfloat16"


def test_eval_writes_down_how_to_do_it_again(
    command: Callable[..., Any], evaluated: list[Any], suite: Path, tmp_path: Path
) -> None:
    argv = ["eval", "m", "--suite", suite, "--suite", "starter", "--out", tmp_path / "a run", "--limit", 2]
    argv += ["--do-sample", "--seed", 3, "--judge", "rules", "--dtype", "bfloat16"]
    command(*argv)
    again = shlex.split(evaluated[0]["reproduce"])
    assert again[0] == "postalign"
    command(*again[1:])
    first, second = ({k: v for k, v in call.items() if not callable(v)} for call in evaluated)
    assert first == second
    assert "--temperature" not in again and "--json" not in again


def test_a_changed_folder_of_weights_shows(tmp_path: Path) -> None:
    assert stamp("smollm2") is None
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w.safetensors").write_bytes(b"1")
    before = stamp(str(tmp_path / "m"))
    assert before and before == stamp(str(tmp_path / "m"))
    (tmp_path / "m" / "w.safetensors").write_bytes(b"12")
    assert stamp(str(tmp_path / "m")) != before


def test_seeds_without_sampling_are_wrong_use(
    command: Callable[..., Any], evaluated: list[Any], suite: Path, tmp_path: Path
) -> None:
    done = command("eval", "--suite", suite, "--out", tmp_path / "r", "--seed", 1)
    assert done.code == 2 and "--do-sample" in done.err and not evaluated


def test_eval_json(command: Callable[..., Any], evaluated: list[Any], suite: Path, tmp_path: Path) -> None:
    assert json.loads(command("eval", "--suite", suite, "--out", tmp_path / "r", "--json").out) == SUMMARY


def test_eval_refuses_before_the_model_is_loaded(
    command: Callable[..., Any], evaluated: list[Any], loaded: list[Any], suite: Path, tmp_path: Path
) -> None:
    same_names = ["--alignment", tmp_path / "x" / "a", "--alignment", tmp_path / "y" / "a"]
    for argv in (
        same_names,
        ["--alignment", tmp_path / "base"],
        ["--limit", 0],
        ["--suite", tmp_path / "no.jsonl"],
    ):
        code, _, err = command("eval", "--suite", suite, "--out", tmp_path / "r", *argv)
        assert code == 2, argv
        assert err.startswith("error: ") and err.count("\n") == 1
    assert command("eval", "--suite", suite).code == 2, "--out is asked for"
    assert not loaded and not evaluated


def test_table_shows_what_is_missing_as_missing(capsys: pytest.CaptureFixture[str]) -> None:
    show(SUMMARY)
    shares, others = capsys.readouterr().out.split("measure")
    assert "2.5 (1-5)" in shares
    assert "31.42" in others
    assert others.split("perplexity")[1].split()[0] == "-"


def test_a_run_from_before_partial_is_shown_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    show(SUMMARY)
    assert "partial %" in capsys.readouterr().out
    show([*SUMMARY, figure("base", "harmful", "partial", 0.125)])
    assert "12.5 (6-25)" in capsys.readouterr().out


def test_report(command: Callable[..., Any], evaluated: list[Any], monkeypatch: Any, tmp_path: Path) -> None:
    from postalign import evaluation

    calls: list[Any] = []
    monkeypatch.setattr(evaluation, "write_report", lambda runs, out, **more: calls.append((runs, out, more)))
    runs = [tmp_path / "r1", tmp_path / "r2"]
    done = command("report", *runs, "--out", tmp_path / "page.html", "--alignment", tmp_path / "a")
    assert done == (0, f"{tmp_path / 'page.html'}\n", "")
    plain = {"alignments": {"a": "alignment a"}, "leave_out_harmful": False, "figures_only": False}
    assert calls == [(runs, tmp_path / "page.html", plain)]
    assert command("report", runs[0], "--leave-out-harmful", "--out", tmp_path / "page.md").code == 0
    assert calls[1][2] == {"alignments": {}, "leave_out_harmful": True, "figures_only": False}


def test_report_of_what_is_no_run(command: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = command("report", tmp_path / "r3", "--out", tmp_path / "page.html")
    assert code == 2 and "r3" in err and err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
