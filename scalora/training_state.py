"""What a resumed run needs beyond adapter and inner optimizer: folded base weights, carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalora import peft_layers
from scalora.files import read_tensors, write_tensors
from scalora.optimizer import ScaLoRA
from scalora.peft_layers import LoRAPair

STATE_FILE = "scalora.safetensors"
_KEYS = ("version", "steps", "rebase_count", "places", "base", "adapter", "tensors")


def save_training_state(optimizer: ScaLoRA, folder: str | PathLike[str]) -> Path:
    """Write the folded base weights or the carries, and the state of re-basing.

    Together with the adapter (``PeftModel.save_pretrained``) and ``optimizer.state_dict()`` that is
    a complete checkpoint.  The file is written whole or not at all.

    Args:
        optimizer: the optimizer in training.
        folder: an existing folder; the file in it is named ``scalora.safetensors``.

    Returns:
        The file's path.
    """
    state = optimizer.rebasing_state()
    tensors: dict[str, Tensor] = {}
    for name, memory in state.pop("layers").items():
        memory |= {f"carry.{key}": value for key, value in (memory.pop("carry") or {}).items()}
        tensors |= {f"{key}:{name}": value for key, value in memory.items() if value is not None}
    pairs = optimizer.rebased_pairs
    folded = _folded(state["places"], pairs)
    tensors |= {f"base:{pair.name}": pair.base_weight for pair in folded}
    state["adapter"] = peft_layers.adapter_checksums(pairs)
    state["tensors"] = peft_layers.checksums(tensors)
    path = Path(folder) / STATE_FILE
    write_tensors(path, tensors, {"scalora": json.dumps(state)})
    return path


@torch.no_grad()
def load_training_state(optimizer: ScaLoRA, folder: str | PathLike[str]) -> None:
    """Restore what `save_training_state` wrote; load the adapter of the same checkpoint first.

    Args:
        optimizer: a new optimizer over the same kind of model, with the same rule and seed.
        folder: the checkpoint's folder.

    Raises:
        ValueError: the file is missing or damaged, or belongs to another model, rank, rule or
            adapter; nothing is changed then.
    """
    path = Path(folder) / STATE_FILE
    tensors, metadata = read_tensors(path)
    state = _state(path, metadata)
    pairs = optimizer.rebased_pairs
    state["layers"] = {pair.name: _memory(tensors, pair.name) for pair in pairs}
    optimizer.check_rebasing_state(state)
    if state["tensors"] != peft_layers.checksums(tensors):
        raise ValueError(f"{path} is damaged: its tensors are not those written with it.")
    if state["adapter"] != peft_layers.adapter_checksums(pairs):
        raise ValueError(
            f"the model's adapter is not the one {path} was saved with: load the adapter of the "
            "same checkpoint first. Nothing was loaded."
        )
    folded = [p for p in pairs if f"base:{p.name}" in tensors or state["places"][p.name] == "dense"]
    for pair in folded:
        _check_weight(path, pair.name, tensors.get(f"base:{pair.name}"), pair.base_weight)
    for pair in folded:
        pair.base_weight.copy_(tensors[f"base:{pair.name}"])
    optimizer.load_rebasing_state(state)


def _folded(places: Mapping[str, str], pairs: Sequence[LoRAPair]) -> list[LoRAPair]:
    """The layers whose base weights take in increments: all but those with a carry that is kept."""
    return [pair for pair in pairs if places[pair.name] == "dense" or pair.was_rebased]


def _memory(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Any]:
    carry = {key: tensors.get(f"carry.{key}:{layer}") for key in ("up", "down", "cut")}
    return {
        "product": tensors.get(f"product:{layer}"),
        "residual": tensors.get(f"residual:{layer}"),
        "carry": None if None in carry.values() else carry,
    }


def _state(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        state = json.loads(metadata["scalora"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} was not written by scalora.save_training_state.") from error
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise ValueError(f"{path} is damaged: its entry {missing[0]!r} is missing.")
    return state


def _check_weight(path: Path, name: str, saved: Tensor | None, present: Tensor) -> None:
    if saved is None:
        raise ValueError(f"{path} lacks the base weight of {name!r}. Nothing was loaded.")
    if saved.shape != present.shape or saved.dtype != present.dtype:
        raise ValueError(
            f"{path} holds a base weight {tuple(saved.shape)} {saved.dtype} for {name!r}, the "
            f"model has {tuple(present.shape)} {present.dtype}. Nothing was loaded."
        )
