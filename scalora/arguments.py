"""Checks of arguments, and words for the errors about them.

Held by tests/guards/test_wrong_arguments.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

_SHOWN = (str, bytes, int, float, complex, type(None))


def described(value: Any) -> str:
    """Return a short value as it is, or the kind of one whose text would fill the screen."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, _SHOWN) and len(repr(value)) <= 80:
        return repr(value)
    return f"an object of type {type(value).__name__}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_model(model: Any, caller: str) -> None:
    """Raise a TypeError if the first argument of ``caller`` is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}(model, ...) got {described(model)}, not a torch.nn.Module.")


def check_folder(folder: Path, consequence: str) -> None:
    """Raise a ValueError if there is no such folder, and say what follows from that."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"the folder {str(folder)!r} {what}: {consequence}.")
