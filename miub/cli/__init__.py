"""The ``python -m miub`` command."""

from miub.cli.command import main

__all__ = ["main"]
