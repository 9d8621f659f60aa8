"""The two kinds of failure a user sees: each message is one line that names the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PostalignError(Exception):
    """The work could not be done (exit code 1)."""

    exit_code = 1


class UsageError(PostalignError):
    """The request itself is wrong: an unknown name, a value out of range, a malformed file (exit code 2)."""

    exit_code = 2


def nearest(name: str, names: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `names`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
