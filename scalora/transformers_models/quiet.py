"""Silence while models are loaded whose loading is checked by other means.

Held by tests/cli/test_export.py: ``scalora export`` writes nothing to standard error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import logging


@contextmanager
def without_load_reports() -> Iterator[None]:
    """Silence transformers' progress bars and its reports of missing weights."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
