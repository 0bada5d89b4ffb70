"""``--device`` of a command line: a device that is there."""

from __future__ import annotations

import argparse

import torch


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Let a command take ``--device``, a `torch.device`: a GPU where there is one, else the CPU."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="default here: %(default)s")


def device(text: str) -> torch.device:
    """Return the device of that name.

    Raises:
        argparse.ArgumentTypeError: there is none here, or none that has memory.
    """
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from error
    if found.type == "meta":
        raise argparse.ArgumentTypeError("'meta' computes nothing")
    return found
