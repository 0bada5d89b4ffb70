"""Bytes of a Trainer's checkpoint, file by file."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import scalora
from examples.benchmark.demo_model import demo_model
from examples.benchmark.table import markdown

_INTERVAL, _COLUMNS, _RANK = 8, 64, 8
_FILES = ("adapter_model.safetensors", "optimizer.pt", "scalora.safetensors")
_DEFAULT: dict[str, Any] = {"interval": _INTERVAL, "calibration": _INTERVAL}
_CARRY: dict[str, Any] = {"rule": "exact", "accumulator": "carry", "carry_rank": _COLUMNS}
# What is written, the options, and after how many steps.
_CASES: list[tuple[str, dict[str, Any], int]] = [
    ("rule='none'", {"rule": "none"}, 2),
    ("default, calibrating, nothing frozen yet", _DEFAULT, _INTERVAL - 1),
    ("default, every layer re-based", _DEFAULT, _INTERVAL + 1),
    ("the same, base in bfloat16", _DEFAULT, _INTERVAL + 1),
    ("the same, rounding='compensated'", {**_DEFAULT, "rounding": "compensated"}, _INTERVAL + 1),
    (f"exact, carry with {_COLUMNS} columns", _CARRY, _COLUMNS // _RANK + 1),
]
_IN_BFLOAT16 = ("bfloat16", "compensated")


def run(device: torch.device) -> str:
    """Return the table for the demo's model; its gradients are random, which changes no size."""
    sizes = [_sizes(name, options, steps, device) for name, options, steps in _CASES]
    header = ["", *_FILES]
    rows = [
        [name, *(f"{size:,}" for size in row)]
        for (name, *_), row in zip(_CASES, sizes, strict=True)
    ]
    model = demo_model(device).get_base_model()
    base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    note = (
        f"bytes. The model has {base:,} parameters beside the adapter: {4 * base:,} bytes in "
        f"float32, {2 * base:,} in bfloat16."
    )
    return markdown(header, rows) + "\n\n" + note


def _sizes(name: str, options: dict[str, Any], steps: int, device: torch.device) -> list[int]:
    model = demo_model(device)
    if any(word in name for word in _IN_BFLOAT16):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = scalora.ScaLoRA(torch.optim.AdamW(trainable, lr=1e-3), model, **options)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as name_of_folder:
        warnings.filterwarnings("ignore", message="save_pretrained writes the adapter alone")
        for _ in range(steps):
            for parameter in trainable:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        folder = Path(name_of_folder)
        model.save_pretrained(folder)
        scalora.save_training_state(optimizer, folder)
        optimizer.state_is_in_file = True  # as `scalora.ScaLoRACallback` says
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return [(folder / file).stat().st_size for file in _FILES]
