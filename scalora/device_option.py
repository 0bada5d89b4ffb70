"""``--device`` of a command line: a device that this machine has.

Held by tests/guards/test_wrong_arguments.py.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BEST = "a GPU where there is one, else the CPU"


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Let a command take ``--device``, a `torch.device`; by default the GPU or else the CPU.

    torch is imported when the command line is parsed, not for ``--help``.
    """
    parser.add_argument("--device", type=device, default=_BEST, help="default: %(default)s")


def device(text: str) -> torch.device:
    """Return the device of that name, or the best one here for the option's default.

    Raises:
        argparse.ArgumentTypeError: there is none here, or none that has memory.
    """
    import torch

    if text == _BEST:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from error
    if found.type == "meta":
        raise argparse.ArgumentTypeError("'meta' computes nothing")
    return found
