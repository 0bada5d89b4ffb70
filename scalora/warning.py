"""Warnings that point at the line of the user's script that they are about.

Held by tests/guards/test_warning.py.
"""

from __future__ import annotations

import sys
import warnings

_BETWEEN = {
    *("scalora", "miub", "torch", "peft", "accelerate", "transformers", "trl"),
    *("lightning", "pytorch_lightning", "contextlib"),
}


def warn(message: str) -> None:
    """Give a `UserWarning` about the nearest line that is in none of the libraries between.

    Torch alone puts up to three of its own frames around an optimizer's step, and a Trainer many
    more.
    """
    warnings.warn(message, UserWarning, stacklevel=_level_of_user())


def _level_of_user() -> int:
    """Return the stack level of the user's own line, as `warnings.warn` in `warn` counts it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _BETWEEN:
            break
        frame, level = frame.f_back, level + 1
    return level
