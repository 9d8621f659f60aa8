"""Silence while something loads: transformers' and the hub client's bars, reports and warnings, put back
afterwards.

Knows the libraries' own switches; changes nothing for good, also when the work raises.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, load reports or warnings inside the block; every switch is set back at its end."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.set_verbosity(logging.CRITICAL)
            hub_logging.set_verbosity(logging.CRITICAL)
            logging.disable_progress_bar()
            disable_progress_bars()
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
