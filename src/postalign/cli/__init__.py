"""The command line: one verb, one file. A module here with a function `run` is a verb of the module's name; one with an
`app` has verbs of its own below it.

Knows how arguments become calls and failures become one line and an exit code; all work is done below.
Verb modules import heavy libraries inside `run`, so that `postalign --help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated

from cyclopts import App, Parameter

from .. import __version__
from .common import guarded

app = App(
    name="postalign",
    version=__version__,
    help="Make a chat model safer after training, and measure what that costs. Begin with: postalign demo",
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # ours to answer: exit code 1, and how to go on
)
for _module in iter_modules(__path__, prefix=f"{__name__}."):
    _verb = import_module(_module.name)
    _run = getattr(_verb, "run", None) or getattr(_verb, "app", None)
    if _run is not None:
        app.command(_run, name=_module.name.rpartition(".")[2])


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: Annotated[bool, Parameter(name=["--verbose", "-v"], negative=())] = False,
) -> int:
    """Run one command.

    Parameters
    ----------
    verbose
        Show warnings, and the traceback of an error.
    """
    return guarded(lambda: app(tokens, exit_on_error=False, print_error=False), verbose)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 when done, 1 when the work failed, 2 for wrong use."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: app.meta(tokens, exit_on_error=False, print_error=False), verbose=False)
