"""``python -m miub --model DIR --adapter DIR --text FILE``: the report on a trained adapter.

Held by tests/miub/test_measure_command.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel
from rich.progress import track
from torch import Tensor

from miub.estimators import ESTIMATORS
from miub.monitor import MIUBMonitor
from miub.report.report import MIUBReport
from scalora import load_rebased_weights, peft_layers
from scalora.device_option import add_device_option
from scalora.saving.training_state_file import STATE_FILE
from scalora.transformers_models import model_class


def main(argv: list[str] | None = None) -> int:
    """Load, run the text through the model, print the table; 2 if the input is at fault."""
    args = _parse(argv)
    try:
        report = _report(args)
    except (OSError, ValueError) as error:
        print(f"miub: {error}", file=sys.stderr)
        return 2
    print(report)
    for path, write in ((args.csv, report.to_csv), (args.json, report.to_json)):
        if path:
            write(path)
    if args.plot:
        report.plot(args.plot)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m miub", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the pretrained model: a folder or a hub id")
    add("--adapter", required=True, help="the LoRA adapter: a folder or a hub id")
    add("--text", required=True, type=Path, help="UTF-8; every line that is not empty is a text")
    add("--estimator", default="tempered", choices=sorted(ESTIMATORS), help="default: %(default)s")
    add("--noise", type=float, default=0.01, help="tau of the noise model; default: %(default)s")
    add("--tokens", type=int, default=512, help="drawn from each batch; default: %(default)s")
    add("--batch-size", type=int, default=32, help="texts a batch; default: %(default)s")
    add("--batches", type=int, default=8, help="at most so many; default: %(default)s")
    add("--max-length", type=int, default=128, help="tokens of a text; default: %(default)s")
    add("--dtype", default="auto", help="of the model: auto, float32, bfloat16; default: auto")
    add_device_option(parser)
    add("--seed", type=int, default=0, help="of the draw; default: %(default)s")
    add("--csv", help="write every measurement to this file")
    add("--json", help="write the report to this file")
    add("--plot", help="draw the report to this file, .png or .pdf")
    return parser.parse_args(argv)


def _report(args: argparse.Namespace) -> MIUBReport:
    model, pretrained = _load(args)
    monitor = MIUBMonitor(
        model,
        every=1,
        tokens=args.tokens,
        estimator=args.estimator,
        noise=args.noise,
        reference=pretrained,
        seed=args.seed,
    )
    with monitor, torch.inference_mode():
        for batch in _batches(args):
            if model.config.is_encoder_decoder:
                batch["labels"] = batch["input_ids"]
            model(**batch.to(args.device))
    return monitor.report().averaged()


def _load(args: argparse.Namespace) -> tuple[PeftModel, dict[str, Tensor] | None]:
    """The whole that was trained, and the pretrained weights if some of the base are others."""
    whole = (Path(args.adapter) / STATE_FILE).is_file()
    if not whole and peft_layers.is_without_carry(args.adapter):
        raise ValueError(
            f"{args.adapter} has an adapter to which a carry belongs, and no {STATE_FILE} with it: "
            "measure what `scalora export` or scalora.save_adapter wrote."
        )
    with peft_layers.without_notes():
        config = PeftConfig.from_pretrained(args.adapter)
        base = model_class(config).from_pretrained(args.model, dtype=args.dtype)
        start = {name: weight.clone() for name, weight in base.state_dict().items()}
        model = PeftModel.from_pretrained(base, args.adapter)
    if whole:
        load_rebased_weights(model, args.adapter)
    moved = [pair for pair in peft_layers.all_lora_pairs(model) if _has_moved(pair, start)]
    for pair in moved:
        pair.mark_rebased()
    return model.to(args.device).eval(), start if moved else None


def _has_moved(pair: peft_layers.LoRAPair, start: dict[str, Tensor]) -> bool:
    weight = start.get(f"{pair.name}.weight")
    return (
        weight is not None
        and peft_layers.why_not_dense(pair) is None
        and not torch.equal(pair.base_weight, weight)
    )


def _batches(args: argparse.Namespace) -> Iterator[transformers.BatchEncoding]:
    lines = args.text.read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{args.text} has no text.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    starts = range(0, len(texts), args.batch_size)[: args.batches]
    for start in track(starts, "measuring", disable=not sys.stderr.isatty(), transient=True):
        yield tokenizer(
            texts[start : start + args.batch_size],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=args.max_length,
        )
