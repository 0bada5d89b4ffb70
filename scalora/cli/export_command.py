"""``scalora export``: a checkpoint of training as an ordinary adapter or a merged model.

Held by tests/cli/test_export.py and test_export_refusals.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalora.saving import Export

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SHOWN = 5

_DESCRIPTION = """\
Write a checkpoint of training, as transformers.Trainer writes it with ScaLoRACallback, as one
ordinary PEFT adapter, or with --merged as a plain transformers model. Neither needs scalora to be
loaded. A checkpoint is any folder with an adapter and scalora.safetensors
(scalora.save_training_state). Its tokenizer is copied."""

_EPILOG = """\
examples:
  scalora export output/checkpoint-500 adapter
  scalora export output/checkpoint-500 adapter --rank 32
  scalora export output/checkpoint-500 merged --merged --dtype bfloat16

A base that was quantized while training is never needed for an adapter. --merged quantizes it as
it was in training and writes it dequantized; --full-precision-base merges onto other weights."""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of ``scalora``."""
    parser = commands.add_parser(
        "export",
        help="write a training checkpoint as an ordinary adapter or a merged model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="the checkpoint's folder")
    add("output", metavar="OUTPUT", help="a new or empty folder; written whole or not at all")
    add(
        "--base",
        metavar="FOLDER_OR_ID",
        help="the pretrained model; default: what the adapter names",
    )
    add(
        "--rank",
        type=int,
        metavar="K",
        help="cut the adapter to this rank; default: all of it, and where increments were folded "
        "into the base the smallest rank with a relative error of at most 1e-4",
    )
    add("--merged", action="store_true", help="write a merged model instead of an adapter")
    add(
        "--full-precision-base",
        metavar="FOLDER_OR_ID",
        help="with --merged: merge onto this base and not onto the one that was quantized",
    )
    add(
        "--dtype",
        choices=_DTYPES,
        help="with --merged: dtype of the weights; default: as in training",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Export, and return the exit status: 0, or 2 if the input is at fault."""
    try:
        with _without_advice():
            export = _export(args)
    except (OSError, ValueError) as error:
        print(f"scalora export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    _print(export)
    return 0


def _export(args: argparse.Namespace) -> Export:
    # Imported here: these libraries take seconds to load, and log while they do.
    import torch

    from scalora.saving import export_checkpoint
    from scalora.transformers_models import without_load_reports

    with without_load_reports():
        return export_checkpoint(
            args.checkpoint,
            args.output,
            base=args.base,
            rank=args.rank,
            merged=args.merged,
            full_precision_base=args.full_precision_base,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
        )


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence other libraries' logs and warnings: the command prints what a user needs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _print(export: Export) -> None:
    """Print the largest errors as a table, and what was written."""
    from rich.console import Console
    from rich.table import Table

    worst = sorted(export.errors.items(), key=lambda item: -item[1])
    table = Table("layer", title="Lost to rounding" if export.merged else "Lost of the change")
    table.add_column("relative error", justify="right")
    for layer, error in worst[:_SHOWN]:
        table.add_row(layer, _shown(error))
    if len(worst) > _SHOWN:
        table.add_row("...", "")
    if worst:
        mean = sum(export.errors.values()) / len(worst)
        table.add_row(f"largest of {len(worst)}", _shown(worst[0][1]), style="bold")
        table.add_row(f"mean of {len(worst)}", _shown(mean), style="bold")
    console = Console(highlight=False)
    console.print(table)
    what = "merged model" if export.merged else f"adapter of rank {export.rank}"
    console.print(
        f"{what}, {export.bytes:,} bytes in {export.folder}", soft_wrap=True, markup=False
    )


def _shown(error: float) -> str:
    return f"{error:.1e}" if error else "0"
