"""Saving a re-based model so that nothing is lost: merged, or as an ordinary adapter."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from scalora import peft_layers
from scalora.files import write_tensors
from scalora.pretrained import Base, weight_changes

_ADAPTER_FILE = "adapter_model.safetensors"
_TOLERANCE = 1e-4


def save_merged(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the model as a plain transformers checkpoint, the adapter merged into its weights.

    The model itself is left as it is: PEFT merges a copy, which needs as much memory again.

    Args:
        model: the fine-tuned PEFT model (or a module around it).
        path: folder, created if need be.

    Raises:
        ValueError: not a PEFT model around a transformers model.
    """
    wrapped = _require_peft_model(model)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    if not hasattr(merged, "save_pretrained"):
        raise ValueError(
            f"{type(merged).__name__} is not a transformers model; save the state_dict of "
            "copy.deepcopy(model).merge_and_unload() yourself."
        )
    merged.save_pretrained(path)


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    rank: int | None = None,
    base: Base | None = None,
    *,
    adapter_name: str | None = None,
) -> dict[str, float]:
    """Write everything learned as one ordinary PEFT LoRA adapter for the pretrained base.

    The change of every layer, what was folded into the base and the adapter together, is cut to
    ``rank`` by an SVD, which is the best that any adapter of that rank can do.  The adapter loads
    with ``PeftModel.from_pretrained`` where this package is not installed.

    Args:
        model: the fine-tuned PEFT model (or a module around it).
        path: folder, created if need be.
        rank: of every layer; None for the smallest that keeps a layer's error at most 1e-4.
        base: the pretrained model, its state dict, or a folder or hub id to load it from; may be
            left out while nothing has been folded.  Pass it after ``model.load_state_dict`` in a
            new process: nothing in the model then says that its base has changed.
        adapter_name: None for the active adapter.

    Returns:
        Layer name -> relative error ``|change - saved|_F / |change|_F``.  Layers that stay plain
        LoRA because their change is not one matrix are saved as they are.

    Raises:
        ValueError: a rank below 1, or a base that is missing or belongs to another model.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    wrapped = _require_peft_model(model)
    name = adapter_name or peft_layers.active_adapter(model)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    for layer, (pair, change) in weight_changes(model, base, name).items():
        matrix = pair.as_matrix(change)
        factors[layer] = _best_factors(matrix, rank)
        P, Q = factors[layer]
        norm = torch.linalg.norm(matrix)
        errors[layer] = float(torch.linalg.norm(matrix - P @ Q.T) / norm) if norm > 0 else 0.0

    tensors, config = peft_layers.adapter_with_factors(wrapped, name, factors)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / _ADAPTER_FILE, tensors, {"format": "pt"})
    config.save_pretrained(str(folder))
    return errors


def _best_factors(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """P (m, k) and Q (n, k) with ``P Q^T`` the best approximation of ``matrix`` (m, n)."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    k = _rank_within_tolerance(sigma) if rank is None else min(rank, len(sigma))
    root = sigma[:k].sqrt()
    return (U[:, :k] * root).float(), (Vh[:k].T * root).float()


def _rank_within_tolerance(sigma: Tensor) -> int:
    """The smallest rank, 1 at least, whose cut leaves a relative error within the tolerance."""
    tail = sigma.double().square().flip(0).cumsum(0).flip(0)
    return max(1, int((tail > tail[0] * _TOLERANCE**2).sum()))


def _require_peft_model(model: nn.Module) -> peft_layers.PeftModel:
    wrapped = peft_layers.peft_model(model)
    if wrapped is None:
        raise ValueError(f"{type(model).__name__} is not a PEFT model, nor a module around one.")
    return wrapped
