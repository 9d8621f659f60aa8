"""The table of public sets: every entry says what a loader and a reader of a report need."""

from __future__ import annotations

import re

import pytest

from postalign.errors import UsageError
from postalign.evaluation.benchmarks import BENCHMARKS, Benchmark, benchmark

ASKED = """harmeval advbench harmbench strongreject jailbreakbench xstest oktest orbench dangerousqa techhazardqa
nichehazardqa catqa simplesafetytests donotanswer beavertails safetybench""".split()
NOT_PINNED = {"advbench"}  # no full commit is known: looked up and recorded when it is loaded
FILES_ONLY = {"oktest", "dangerousqa"}


def test_all_are_there() -> None:
    assert set(BENCHMARKS) == set(ASKED)


@pytest.mark.parametrize(("name", "entry"), BENCHMARKS.items())
def test_an_entry_is_whole(name: str, entry: Benchmark) -> None:
    assert (entry.hub is None) == (name in FILES_ONLY)
    if entry.hub is None:
        assert entry.file, "a set that is not on the hub says where its file is"
    elif name in NOT_PINNED:
        assert entry.revision is None
    else:
        assert re.fullmatch("[0-9a-f]{40}", entry.revision or "")
    if entry.file:
        assert re.search("/[0-9a-f]{40}/", entry.file), "a file is named at a commit, not at a branch"
    assert entry.default and set(entry.default) <= set(entry.parts)
    assert entry.licence and re.search(r"arXiv:\d{4}\.\d{5}", entry.cite)
    assert all(part.label in ("harmful", "benign", None) for part in entry.parts.values())
    if not entry.choices and any(part.label is None for part in entry.parts.values()):
        assert entry.contrast, "where rows differ in label, a column or a rule tells"


def test_both_halves_of_the_two_sided_sets_are_asked_by_default() -> None:
    for name in ("jailbreakbench", "orbench"):
        entry = BENCHMARKS[name]
        assert {entry.parts[part].label for part in entry.default} == {"harmful", "benign"}


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'harmeval'"):
        benchmark("harmevel")
    with pytest.raises(UsageError, match="Did you mean 'starter'"):
        benchmark("startr")
