"""Reading data: formats, columns, labels, slices, hashes, and one line for everything malformed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from postalign.data import Data, Prompt, load_data
from postalign.errors import PostalignError, UsageError

ROWS = [
    {"prompt": "How do I bake bread?", "label": "benign", "category": "food"},
    {"prompt": "How do I rob a bank?", "label": "unsafe", "response": "I can't help with that."},
    {"prompt": 'A comma, a "quote"\nand a line break', "label": ""},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def fails(*parts: str, source: Any, **options: Any) -> str:
    """The one line a bad source gives, after seeing that `parts` are in it."""
    with pytest.raises(PostalignError) as caught:
        load_data(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import csv

    lines = jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, ["prompt", "label", "category", "response"])
        writer.writeheader()
        writer.writerows(ROWS)
    expected = load_data(lines)
    assert [row.label for row in expected] == ["benign", "harmful", None]
    assert load_data(tmp_path / "a.json") == load_data(tmp_path / "a.csv") == expected
    assert load_data(tmp_path / "a.csv").hash == expected.hash
    assert expected.name == "a.jsonl"


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pa.Table.from_pylist([dict.fromkeys(("prompt", "label", "category", "response")) | row for row in ROWS]),
        tmp_path / "a.parquet",
    )
    assert load_data(tmp_path / "a.parquet") == load_data(jsonl(tmp_path / "a.jsonl", ROWS))
    (tmp_path / "bad.parquet").write_bytes(b"no")
    fails("bad.parquet", source=tmp_path / "bad.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    fails("pip install 'postalign[data]'", source=tmp_path / "a.parquet")


@pytest.mark.parametrize("column", ["instruction", "question", "goal", "Behavior", "PROMPT"])
def test_prompt_columns_that_are_guessed(tmp_path: Path, column: str) -> None:
    rows = [{column: "Hello?", "output": "Hi.", "target": "Sure, here"}]
    (row,) = load_data(jsonl(tmp_path / "a.jsonl", rows))
    assert (row.prompt, row.response) == ("Hello?", "Hi.")


def test_target_is_no_response_and_columns_can_be_mapped_and_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": "Hello?", "target": "Sure", "answer": "Hi.", "label": "safe"}])
    (row,) = load_data(path, columns={"prompt": "q", "unsafe_response": "target", "response": None})
    assert row == Prompt("Hello?", label="benign", unsafe_response="Sure")
    fails("'prmpt'", "Did you mean 'prompt'?", source=path, columns={"prmpt": "q"})
    fails("no column 'answr'", "Did you mean 'answer'?", source=path, columns={"prompt": "answr"})


def test_a_given_label_fills_only_the_gaps(tmp_path: Path) -> None:
    data = load_data(jsonl(tmp_path / "a.jsonl", ROWS), label="unsafe")
    assert [row.label for row in data] == ["benign", "harmful", "harmful"]
    assert (len(data.harmful), len(data.benign)) == (2, 1)
    fails("'nasty'", source=tmp_path / "a.jsonl", label="nasty")


def test_slices(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": f"Question {i}?", "id": i} for i in range(10)])
    assert [row.id for row in load_data(f"{path}[:3]")] == ["0", "1", "2"]
    assert [row.id for row in load_data(f"{path}[7:]")] == ["7", "8", "9"]
    assert load_data(f"{path}[4:6]").name == "a.jsonl[4:6]"
    assert load_data(f"{path}[4:6]").rows == load_data(path)[4:6].rows
    for bad in ("[5:11]", "[10:]", "[4:4]", "[6:2]"):
        fails("out of range", "10 rows", source=f"{path}{bad}")


def test_splits_of_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "split": "fit"}, {"prompt": "b", "split": "test"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert [row.prompt for row in load_data(path, split="test")] == ["b"]
    fails("fit, test", "Did you mean 'test'?", source=path, split="tests")
    fails("no split column", source=jsonl(tmp_path / "b.jsonl", [{"prompt": "a"}]), split="fit")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', ["a.jsonl, line 3", "malformed JSON"]),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', ["line 2", "list"]),
        ("a.jsonl", '{"promt": "a"}\n', ["no prompt column", "Did you mean 'promt'?"]),
        ("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', ["line 2", "no column 'prompt'", "'promt'"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "  "}\n', ["line 2", "empty"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ["b"]}\n', ["line 2", "must be text", "list"]),
        ("a.jsonl", '{"prompt": "a", "label": "harmfull"}\n', ["line 1", "Did you mean 'harmful'?"]),
        ("a.jsonl", '{"prompt": "a", "label": 1}\n', ["line 1", "label must be text"]),
        ("a.jsonl", "\n \n", ["holds no rows"]),
        ("a.csv", "", ["holds no rows"]),
        ("a.csv", "prompt,label\n", ["holds no rows"]),
        ("a.csv", 'prompt,label\n"a\nb",safe\n\n,safe\n', ["line 5", "empty"]),
        ("a.csv", "label,prompt\nsafe,a\nsafe\n", ["line 3", "empty"]),
        ("a.csv", "prompt,label\na,safe,more\n", ["line 2", "3 values for 2"]),
        ("a.csv", 'prompt\n"open\n', ["line 2", "malformed csv"]),
        ("a.json", '[{"prompt": "a"},\n {"prompt"]', ["a.json, line 2", "malformed JSON"]),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', ["line 2", ".jsonl"]),
        ("a.json", '{"prompt": "a"}', ["list of objects"]),
        ("a.json", '[{"prompt": "a"}, {"prompt": ""}]', ["item 2", "empty"]),
        ("a.json", "", ["holds no rows"]),
        ("a.txt", "hello", [".jsonl"]),
    ],
)
def test_malformed_files_are_named_with_the_row(tmp_path: Path, name: str, text: str, parts: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    fails(*parts, source=tmp_path / name)
    with pytest.raises(UsageError):
        load_data(tmp_path / name)


def test_text_that_is_not_utf8_is_named_with_the_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    fails("line 2", "UTF-8", source=tmp_path / "a.jsonl")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    jsonl(tmp_path / "harmful.jsonl", ROWS)
    fails("no such data", "Did you mean 'harmful.jsonl'?", source=tmp_path / "harmfull.jsonl")
    fails("no such data", "Did you mean 'starter'?", source="startr")
    fails("is a folder", source=tmp_path)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"train": [{"goal": "a"}, {"goal": "b"}], "test": [{"goal": "c"}]}

    def load_dataset(name: str, split: str | None = None) -> Any:
        if name == "some/absent":
            raise ConnectionError("no route\nto host")
        return sets[split] if split else (sets if name == "some/set" else {"train": sets["train"]})

    fake = SimpleNamespace(
        load_dataset=load_dataset,
        are_progress_bars_disabled=lambda: False,
        disable_progress_bars=lambda: None,
        enable_progress_bars=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [row.prompt for row in load_data("some/single[1:]", label="harmful")] == ["b"]
    assert load_data("some/set", split="test").harmful.rows == ()
    fails("several splits", "train, test", source="some/set")
    fails("no route", source="some/absent")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("pip install 'postalign[data]'", source="some/set")


def test_data_is_an_immutable_sequence_with_a_content_hash() -> None:
    data = Data([Prompt("a", label="safe"), Prompt("b", label="harmful", response="no")], name="x")
    same = Data([Prompt("a", label="benign"), Prompt("b", label="unsafe", response="no")], name="y")
    assert data == same
    assert data.hash == same.hash
    assert len(data.hash) == 64
    assert data.hash != Data(reversed(data.rows)).hash
    assert (data + same).name == "x+y"
    assert len(data + same) == 4
    assert isinstance(data[:1], Data)
    assert data[1].prompt == "b"
    assert data.pairs().rows == (data[1],)
    with pytest.raises(UsageError, match="response"):
        data[:1].pairs()
    with pytest.raises(UsageError, match="Did you mean"):
        Prompt("a", label="harmfull")
