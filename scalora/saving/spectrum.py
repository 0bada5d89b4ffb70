"""Singular values and effective rank of everything that was learned, as numbers or a figure."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scalora import peft_layers
from scalora.arguments import check_model
from scalora.autocast import without_autocast
from scalora.plotting import spectra_figure, write_figure
from scalora.saving.pretrained import Base, weight_changes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
@without_autocast()
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
        Layer name -> singular values, descending, (min(m, n),), float32 at least. Layers whose
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

    Raises:
        ValueError: as in `delta_spectrum`.
    """
    check_model(model, "effective_rank")
    spectra = delta_spectrum(model, base, adapter_name=adapter_name)
    return {name: entropy_rank(spectrum) for name, spectrum in spectra.items()}


@torch.no_grad()
def plot_spectrum(
    model: nn.Module,
    base: Base | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    adapter_name: str | None = None,
) -> Figure:
    """Return a figure of the spectrum of what was learned, against the rank where LoRA ends.

    One thin line per layer, a thick one for their mean; singular values are relative to each
    layer's largest. A dashed line marks the adapter's r. The title has the share of the change's
    energy (squared Frobenius norm) beyond that rank, mean of the layers.

    Args:
        model, base, adapter_name: as in `delta_spectrum`.
        path: a file to write the figure to as well; its suffix names the format (.png, .svg, .pdf).

    Returns:
        A figure of matplotlib's, which ``savefig`` writes and a notebook shows.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: as in `delta_spectrum`; or no layer has changed; or a path of no known format.
    """
    check_model(model, "plot_spectrum")
    spectra = delta_spectrum(model, base, adapter_name=adapter_name)
    pairs = peft_layers.lora_pairs(model, adapter_name or peft_layers.active_adapter(model))
    figure = spectra_figure(
        {name: spectrum.tolist() for name, spectrum in spectra.items()},
        {pair.rank for pair in pairs if pair.name in spectra},
    )
    if path is not None:
        write_figure(figure, path)
    return figure


def entropy_rank(spectrum: Tensor) -> float:
    """Return Roy and Vetterli's effective rank of singular values (k,)."""
    total = spectrum.sum()
    if total == 0:
        return 0.0
    share = spectrum / total
    return float(torch.exp(torch.special.entr(share).sum()))
