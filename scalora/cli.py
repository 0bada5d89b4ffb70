"""The ``scalora`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import scalora


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``scalora`` and ``python -m scalora``."""
    parser = argparse.ArgumentParser(prog="scalora", description=scalora.__doc__)
    parser.add_argument("--version", action="version", version=f"scalora {scalora.__version__}")
    parser.parse_args(arguments)
    parser.print_help()
