"""Whose line a warning is about."""

from __future__ import annotations

import sys

_BETWEEN = {
    *("scalora", "miub", "torch", "peft", "accelerate", "transformers", "trl"),
    *("lightning", "pytorch_lightning", "contextlib"),
}


def level_of_caller() -> int:
    """The stack level, as `warnings.warn` counts it where this is called, of a user's own line.

    That is the nearest that is in none of the libraries between: torch alone puts up to three of
    its own frames around an optimizer's step, and a Trainer many more.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _BETWEEN:
            break
        frame, level = frame.f_back, level + 1
    return level
