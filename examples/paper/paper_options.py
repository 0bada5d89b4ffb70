"""The command line that both scripts share: rows, and what may be changed without a new file."""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import paper_configuration
from paper_configuration import BASES, PROTOCOLS, Configuration


def parse(
    description: str | None, benchmark: str, tasks: Iterable[str], argv: list[str] | None
) -> tuple[argparse.Namespace, list[Configuration]]:
    """Return the arguments and the rows as they change them; exit with a message if bad."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rows", type=Path, nargs="+", help="files of configurations/, one for each row")
    add("--data", required=True, help="folder of the benchmark's files" + HUB[benchmark])
    add("--output", type=Path, default=Path(f"{benchmark}.json"), help="default: %(default)s")
    add("--tasks", nargs="+", choices=list(tasks), default=list(tasks), help="default: all")
    add("--seeds", type=int, nargs="+", help="instead of the rows'")
    add("--lr", type=float, nargs="+", help="learning rates, instead of the rows'")
    add("--steps", type=int, help="instead of the rows' epochs: to try it out")
    add("--model", help="folder or hub id, instead of the rows'")
    add("--interval", type=int, help="of re-basing, instead of the rows' that re-base")
    add("--base", choices=BASES, help="what the pretrained weights are stored in")
    if benchmark == "commonsense":
        add("--protocol", choices=PROTOCOLS, help="how tasks are asked, instead of the rows'")
    args = parser.parse_args(argv)
    try:
        rows = [_changed(paper_configuration.load(path), args) for path in args.rows]
        _check(rows, benchmark)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return args, rows


HUB = {"glue": ", or 'hub': the package datasets fetches them", "commonsense": ""}


def _changed(row: Configuration, args: argparse.Namespace) -> Configuration:
    changes: dict[str, Any] = {
        "seeds": args.seeds,
        "learning_rates": args.lr,
        "steps": args.steps,
        "model": args.model,
        "interval": args.interval if row.method == "scalora" else None,
        "base": args.base,
        "protocol": vars(args).get("protocol"),
    }
    return replace(row, **{name: value for name, value in changes.items() if value is not None})


def _check(rows: list[Configuration], benchmark: str) -> None:
    for row in rows:
        if row.benchmark != benchmark:
            raise ValueError(f"{row.row}: a row of {row.benchmark}, not of {benchmark}")
    names = [row.row for row in rows]
    if len({*names}) < len(names):
        raise ValueError("two rows have the same name")


def changes(args: argparse.Namespace) -> str:
    """Say what was changed, for the table: its numbers are not those of the rows as they are."""
    named = ("seeds", "lr", "steps", "model", "interval", "base", "protocol")
    found = {name: vars(args)[name] for name in named if vars(args).get(name) is not None}
    if "model" in found:
        found["model"] = Path(found["model"]).name
    return ", ".join(f"--{name} {_text(value)}" for name, value in found.items())


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
