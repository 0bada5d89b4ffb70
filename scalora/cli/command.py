"""The parser of the ``scalora`` command.

Held by tests/cli/test_command.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

import scalora
from scalora.ablation import command as ablate_command
from scalora.cli import export_command


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``scalora`` or ``python -m scalora``.

    The commands' parsers import nothing that takes long; the libraries come when a command runs.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit status: 0, 1 if a run of ``scalora ablate`` failed, 2 if the input is at fault.
    """
    parser = _Parser(prog="scalora", description=scalora.__doc__)
    parser.add_argument("--version", action="version", version=f"scalora {scalora.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    export_command.add_to(commands)
    ablate_command.add_to(commands)
    parsed = parser.parse_args(arguments)
    if not hasattr(parsed, "run"):
        parser.print_help()
        return 0
    return int(parsed.run(parsed))
