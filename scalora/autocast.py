"""Arithmetic in the dtypes of its own tensors, wherever a script is under ``torch.autocast``.

Held by tests/optimizer/test_autocast.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off while entered, on every device on which it is on; also a decorator.

    A dtype that was chosen on purpose is computed with: autocast would cast the matrices of a
    product to its own.
    """
    accelerator = torch.accelerator.current_accelerator()
    devices = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
