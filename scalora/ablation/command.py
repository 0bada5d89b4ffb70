"""``scalora ablate``: methods side by side on a task.

What ``--help`` needs is imported here and is light; the rest is imported by the command as it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from scalora.ablation import defaults

LOG_WIDTH = 140

_DESCRIPTION = """\
Train methods on a task at several learning rates and seeds and report, side by side, what they
learn, what they forget, what kind of change they make and what they cost. Every method gets as many
learning rates; its best is chosen on the validation split, and the test split is reported."""

_EPILOG = """\
examples:
  scalora ablate --task domain-shift --methods lora,full-adapted,scalora:interval=10
  scalora ablate --task regression --suite rules --learning-rates 1e-3,3e-3 --search-seeds 1
  scalora ablate --task mine.py:MyTask --jobs 4 --output results
  scalora ablate --engine slurm --slurm timeout_min=60 --slurm slurm_partition=gpu --device cuda
  scalora ablate --report-only --output results

DIR gets results.md, results.html (one file, pictures included), results.json, and pictures as PNG
and SVG. A command that was killed goes on where it stopped; runs that failed are tried again. The
exit status is 1 if a run failed and 2 if the input is at fault."""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of ``scalora``."""
    parser = commands.add_parser(
        "ablate",
        help="methods side by side on a task: tables, pictures, a page and a JSON file",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what is compared").add_argument
    add(
        "--task",
        type=_names,
        default=["domain-shift"],
        metavar="NAME[,NAME...]",
        help="an embedded task or path/to/file.py:Class; default: domain-shift",
    )
    add("--methods", type=_names, metavar="SPEC[,SPEC...]", help="name[:option=value]*")
    add("--suite", metavar="NAME", help=f"methods that belong together; default: {defaults.SUITE}")
    add("--learning-rates", type=_rates, metavar="LR[,LR...]", help="default: the task's")
    add("--seeds", type=_positive, metavar="N", help=f"seeds 0 to N - 1; default: {defaults.SEEDS}")
    add(
        "--search-seeds",
        type=_positive,
        metavar="N",
        help="only N seeds run every learning rate, the others each method's best; default: all",
    )
    add("--steps", type=_positive, metavar="N", help="training steps; default: the task's")
    add("--rank", type=_positive, metavar="R", help="of the adapters; default: the task's")
    add("--short", action="store_true", help="a quick look: fewer steps, every other learning rate")
    add(
        "--smoke",
        action="store_true",
        help=f"{defaults.SMOKE_STEPS} steps, 1 seed, 2 learning rates: whether everything runs",
    )
    for option, what in (
        ("--model", "pretrained model"),
        ("--data", "training data"),
        ("--source", "data that the model was pretrained on"),
    ):
        add(option, metavar="FILE_OR_ID", help=f"the {what}, for tasks that take one")
    add = parser.add_argument_group("how it is run").add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one here")
    add(
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="runs at a time, each with its share of the cores; default: 1",
    )
    add(
        "--engine",
        choices=("local", "inline", "slurm"),
        default="local",
        help="processes on this machine, this process itself, or a SLURM cluster (submitit)",
    )
    add(
        "--slurm",
        action="append",
        type=_assignment,
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of submitit's executor: timeout_min, gpus_per_node, slurm_partition, ...",
    )
    add("--output", type=Path, default=Path("ablation"), metavar="DIR", help="default: ./ablation")
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="what tasks prepare; default: $SCALORA_CACHE or the user's cache folder",
    )
    add(
        "--report-only",
        action="store_true",
        help="tables and pictures again of the runs in DIR: those of its last command, or with "
        "--methods or --suite those that are asked for",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    # Libraries warn of matters of their own while they are imported.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return _plan_and_run(args)
    except KeyboardInterrupt:
        print("scalora ablate: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        logging.disable(before)


def _plan_and_run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from scalora.ablation.plan import read_plan, write_plan
    from scalora.ablation.planning import engine_of, plans_of
    from scalora.ablation.report.report import report
    from scalora.ablation.sweep import recorded, run_plans

    # A log has no width of its own, and its tables are not to be cut to a terminal's.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    cache = args.cache or default_cache()
    try:
        if args.report_only:
            plans = plans_of(args) if args.methods or args.suite else read_plan(args.output)
        else:
            plans = plans_of(args)
            engine = engine_of(args)
            cache.mkdir(parents=True, exist_ok=True)
            write_plan(plans, args.output)
    except (OSError, ValueError) as error:
        print(f"scalora ablate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.report_only:
        records = recorded(plans, args.output)
    else:
        records = run_plans(plans, engine, args.output, cache, console)
    succeeded = report(plans, records, args.output, console)
    console.print(f"results in {args.output}", soft_wrap=True, markup=False)
    return 0 if succeeded else 1


def default_cache() -> Path:
    """Return $SCALORA_CACHE, or a folder in the user's cache folder."""
    own = os.environ.get("SCALORA_CACHE")
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else users / "scalora"


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("it names nothing")
    return list(dict.fromkeys(names))


def _rates(text: str) -> list[float]:
    try:
        rates = sorted({float(rate) for rate in _names(text)})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError("learning rates have to be positive")
    return rates


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _assignment(text: str) -> tuple[str, int | str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return key, int(value) if value.isdecimal() else value
