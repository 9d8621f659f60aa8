"""One question to the network with an end in sight. Knows time and threads; knows no host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises, or TimeoutError after `seconds`.

    A library's own timeout does not cover a name lookup that hangs; here the hanging thread is left behind.
    """
    outcome: list[tuple[bool, Any]] = []

    def attempt() -> None:
        try:
            outcome.append((True, work()))
        except Exception as error:  # handed to the caller below
            outcome.append((False, error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    done, value = outcome[0]
    if not done:
        raise value
    return value
