"""The ``scalora`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

import scalora
from scalora.ablation import command as ablate_command
from scalora.saving import export_command


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``scalora`` and ``python -m scalora``; 2 if the input is at fault."""
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
