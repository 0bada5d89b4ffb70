"""Singular values and effective rank of everything that was learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalora.arguments import check_model
from scalora.saving.pretrained import Base, weight_changes


@torch.no_grad()
def delta_spectrum(
    model: nn.Module, base: Base | None = None, *, adapter_name: str | None = None
) -> dict[str, Tensor]:
    """Return the singular values of every LoRA layer's whole change: folded, carried and adapter.

    Args:
        model: the fine-tuned PEFT model.
        base: the pretrained model, its state dict, or a folder or hub id to load it from; not
            needed while nothing has been folded.
        adapter_name: None for the active adapter.

    Returns:
        Layer name -> singular values, descending, (min(m, n),), float32 at least.  Layers whose
        change is not one matrix (grouped convolutions, for example) are left out.

    Raises:
        ValueError: ``base`` is needed and missing, or belongs to another model.
    """
    check_model(model, "delta_spectrum")
    return {
        name: torch.linalg.svdvals(pair.as_matrix(change))
        for name, (pair, change) in weight_changes(model, base, adapter_name).items()
    }


def effective_rank(
    model: nn.Module, base: Base | None = None, *, adapter_name: str | None = None
) -> dict[str, float]:
    """Return the effective rank of every LoRA layer's whole change.

    The effective rank (Roy and Vetterli 2007) is ``exp(-sum p_i log p_i)`` with
    ``p_i = sigma_i / sum sigma``.  It is at most the rank, and equal to it where all nonzero
    singular values are equal.  It is 0 for a layer that did not change.

    Args:
        model, base, adapter_name: as in `delta_spectrum`.
    """
    check_model(model, "effective_rank")
    spectra = delta_spectrum(model, base, adapter_name=adapter_name)
    return {name: entropy_rank(spectrum) for name, spectrum in spectra.items()}


def entropy_rank(spectrum: Tensor) -> float:
    """Return Roy and Vetterli's effective rank of singular values (k,)."""
    total = spectrum.sum()
    if total == 0:
        return 0.0
    share = spectrum / total
    return float(torch.exp(torch.special.entr(share).sum()))
