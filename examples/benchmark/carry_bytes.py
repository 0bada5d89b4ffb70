"""Bytes that training keeps of one layer, and the rank of plain LoRA that takes as many."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import scalora
from examples.benchmark.table import markdown
from scalora.ablation.memory import bytes_of_model, state_bytes

_SIZE, _RANK = 1024, 8
_RULE = {"rule": "leak", "interval": 1}
_CARRY = {**_RULE, "accumulator": "carry"}
_CASES: dict[str, dict[str, Any] | None] = {
    "plain LoRA": None,
    "ScaLoRA, dense": {**_RULE, "accumulator": "dense"},
    **{f"carry of {c} columns": {**_CARRY, "carry_rank": c} for c in (16, 32, 64, 128, 256)},
    "carry of 64, rule='exact'": {**_CARRY, "rule": "exact", "carry_rank": 64},
}


def run(device: torch.device) -> str:
    """Return the table of a layer, 1024 x 1024, r = 8, under AdamW in float32.

    Every number but the base weight's is counted: factors, gradients, moments, carry and whatever
    else is kept for a layer from one step to the next.  A carry is beside a base in NF4.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return "Not run: bitsandbytes is not installed."
    measured = {name: _bytes(_RANK, options, device) for name, options in _CASES.items()}
    column = _bytes(_RANK + 1, None, device) - measured["plain LoRA"]
    rows = [
        [name, f"{found / 1024:.1f}", f"{found / (2 * _SIZE):.0f}", f"{found / column:.1f}"]
        for name, found in measured.items()
    ]
    header = ["training", "KiB", "bytes / (m + n)", "plain LoRA of the same bytes: r"]
    what = f"{_SIZE} x {_SIZE}, r = {_RANK}, AdamW in float32"
    note = f"{what}; a carry is beside NF4; calibration is over."
    return markdown(header, rows) + "\n\n" + note


def _bytes(rank: int, options: dict[str, Any] | None, device: torch.device) -> int:
    """Return the bytes that training adds for one layer more: what a model has once cancels."""
    return _bytes_of_model(2, rank, options, device) - _bytes_of_model(1, rank, options, device)


def _layer(quantized: bool) -> nn.Module:
    """Return a layer to adapt, which is quantized once it is moved to its device."""
    if not quantized:
        return nn.Linear(_SIZE, _SIZE, bias=False)
    from bitsandbytes.nn import LinearNF4

    return LinearNF4(_SIZE, _SIZE, bias=False, compute_dtype=torch.float32)


def _bytes_of_model(
    layers: int, rank: int, options: dict[str, Any] | None, device: torch.device
) -> int:
    """Return the bytes that four steps of training have added to a model of such layers."""
    quantized = options is not None and options["accumulator"] == "carry"
    base: Any = nn.Sequential(*(_layer(quantized) for _ in range(layers))).to(device)
    base.is_loaded_in_4bit = quantized  # as transformers says it to PEFT
    pretrained = bytes_of_model(base)
    names = [str(layer) for layer in range(layers)]
    model: PeftModel = get_peft_model(base, LoraConfig(r=rank, target_modules=names))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-3)
    if options is not None:
        optimizer = scalora.ScaLoRA(optimizer, model, **options)
    for _ in range(4):
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return state_bytes(model, optimizer, pretrained)
