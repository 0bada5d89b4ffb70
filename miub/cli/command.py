"""``python -m miub --model DIR --adapter DIR --text FILE``: the report on a trained adapter.

Held by tests/miub/test_measure_command.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from miub import __version__
from scalora.device_option import add_device_option

_DESCRIPTION = """\
Measure how much each LoRA layer of a trained adapter leans on the frozen model: an upper bound on
the mutual information, in nats, between what the frozen weight and what the adapter contribute to
the layer's output, over the tokens of a text. The adapter may be a checkpoint of training with
ScaLoRA."""

# The names of miub.estimators, which take torch to import.
ESTIMATORS = ("club", "gaussian", "infonce", "l1out", "tempered", "vub")


def main(argv: list[str] | None = None) -> int:
    """Load, run the text through the model, print the table.

    Returns:
        The exit status: 0, or 2 if the input is at fault.
    """
    args = _parser().parse_args(argv)
    # These say on import which optional kernels they lack, and what of torch they still use.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Imported here: the libraries behind it take seconds to load.
    from miub.cli.trained_adapter import report_on

    try:
        with warnings.catch_warnings():
            # The libraries' own use of each other is no concern of who runs a command.
            warnings.simplefilter("ignore", FutureWarning)
            report = report_on(args)
    except (OSError, ValueError) as error:
        print(f"miub: {error}", file=sys.stderr)
        return 2
    print(report)
    for path, write in (
        (args.csv, report.to_csv),
        (args.json, report.to_json),
        (args.plot, report.plot),
    ):
        if path:
            write(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m miub",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"miub {__version__}")
    add("--model", required=True, help="the pretrained model: a folder or a hub id")
    add("--adapter", required=True, help="the LoRA adapter: a folder or a hub id")
    add("--text", required=True, type=Path, help="UTF-8; every line that is not empty is a text")
    add("--estimator", default="tempered", choices=ESTIMATORS, help="default: %(default)s")
    add("--noise", type=float, default=0.01, help="tau of the noise model; default: %(default)s")
    add("--tokens", type=int, default=512, help="sampled from each batch; default: %(default)s")
    add("--batch-size", type=int, default=32, help="texts per batch; default: %(default)s")
    add("--batches", type=int, default=8, help="the most batches; default: %(default)s")
    add("--max-length", type=int, default=128, help="tokens per text; default: %(default)s")
    add("--dtype", default="auto", help="of the model: auto, float32, bfloat16; default: auto")
    add_device_option(parser)
    add("--seed", type=int, default=0, help="of the sample; default: %(default)s")
    add("--csv", help="write every measurement to this file")
    add("--json", help="write the report to this file")
    add("--plot", help="draw the report to this file, .png, .pdf or .svg")
    return parser
