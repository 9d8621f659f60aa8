"""Rows survive a kill; a half-written last one does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from postalign.errors import PostalignError
from postalign.evaluation.journal import Journal


def test_rows_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "rows.jsonl", ("id",))
    journal.append([{"id": 1, "text": "zwei\nZeilen \u2028"}, {"id": 2, "text": "ü"}])
    again = Journal(journal.path, ("id",))
    assert again.rows == journal.rows
    assert (2,) in again and (3,) not in again


@pytest.mark.parametrize(
    "tail", [b'{"id": 3, "te', b'{"id": 3, "text": "whole"}', b'{"id": 3, "te\n', b"\x00\x00\x00", b'"x"\n']
)
def test_a_half_written_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path, ("id",)).append([{"id": 1}, {"id": 2}])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    journal = Journal(path, ("id",))
    assert [row["id"] for row in journal.rows] == [1, 2]
    assert path.read_bytes() == whole
    journal.append([{"id": 3}])
    assert [row["id"] for row in Journal(path, ("id",)).rows] == [1, 2, 3]


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id"\n{"id": 3}\n')
    with pytest.raises(PostalignError, match="row 2 is damaged"):
        Journal(path, ("id",))


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    journal = Journal.__new__(Journal)
    journal.path, journal.key, journal.rows, journal._seen = tmp_path / "rows.jsonl", ("id",), [], {}
    with pytest.raises(PostalignError, match="finished rows are kept"):
        journal.append([{"id": 1}])


def test_rows_are_put_in_order_on_disk(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path / name, ("id",)) for name in ("a.jsonl", "b.jsonl"))
    first.append([{"id": 1, "text": "ü"}, {"id": 2}])
    second.append([{"id": 2}])
    second.append([{"id": 1, "text": "ü"}])
    assert first.path.read_bytes() != second.path.read_bytes()
    for journal in (first, second):
        journal.arrange(lambda row: row["id"])
    assert first.path.read_bytes() == second.path.read_bytes()
    assert Journal(second.path, ("id",)).get((1,)) == {"id": 1, "text": "ü"}
    assert second.get((3,)) is None
