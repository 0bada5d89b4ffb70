"""The report on a trained adapter: load it, run a text through it, measure.

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

from miub.monitor import MIUBMonitor
from miub.report.report import MIUBReport
from scalora import load_rebased_weights, peft_layers
from scalora.saving import STATE_FILE
from scalora.transformers_models import model_class, without_load_reports


def report_on(args: argparse.Namespace) -> MIUBReport:
    """Return the report that the command's options ask for.

    Raises:
        ValueError: a text without lines, an adapter without its carry, or a model and an adapter
            that do not fit.
        OSError: a file that is not there.
    """
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
    """Return the model with all that was learned, and the pretrained weights if its base moved."""
    whole = (Path(args.adapter) / STATE_FILE).is_file()
    if not whole and peft_layers.is_without_carry(args.adapter):
        raise ValueError(
            f"{args.adapter} has an adapter to which a carry belongs, and no {STATE_FILE} with it: "
            "measure what `scalora export` or scalora.save_adapter wrote."
        )
    with peft_layers.without_notes(), without_load_reports():
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
