"""What training did to the weights, and how much the change leans on the pretrained ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from miub import MIUBMonitor
from scalora.ablation.record import LayerSpectrum
from scalora.ablation.task import Task
from scalora.saving.spectrum import entropy_rank

SPECTRUM_LENGTH = 256
"""The most singular values of the mean spectrum that are kept."""


@torch.no_grad()
def spectra_of_change(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Layer name -> singular values, descending, (min(m, n),), float32, of what was learned.

    Args:
        before: layer name -> pretrained weight (m, n); may hold other layers as well.
        after: layer name -> effective weight (m, n).
    """
    return {
        name: torch.linalg.svdvals(
            weight.detach().float() - before[name].to(weight.device, torch.float32)
        ).cpu()
        for name, weight in after.items()
    }


def summary_of(spectrum: Tensor, rank: int) -> LayerSpectrum:
    """Summarise singular values (k,), descending.

    A layer that did not change has rank 0, and nothing of its change is outside the top r.
    """
    energy = spectrum.double().square()
    total = energy.sum()
    if total == 0:
        return LayerSpectrum(effective_rank=0.0, stable_rank=0.0, energy_top_r=1.0)
    return LayerSpectrum(
        effective_rank=entropy_rank(spectrum.double()),
        stable_rank=float(total / energy.max()),
        energy_top_r=float(energy[:rank].sum() / total),
    )


def mean_spectrum(spectra: Mapping[str, Tensor]) -> list[float]:
    """Mean over the layers that changed of their singular values over the largest.

    As long as the shortest of the spectra, so that every place is the mean of as many.
    """
    changed = [spectrum / spectrum[0] for spectrum in spectra.values() if spectrum[0] > 0]
    if not changed:
        return []
    length = min(SPECTRUM_LENGTH, *(len(spectrum) for spectrum in changed))
    mean = torch.stack([spectrum[:length] for spectrum in changed]).mean(0)
    return [float(f"{value:.5g}") for value in mean.tolist()]


@torch.no_grad()
def miub_of_layers(
    model: nn.Module, task: Task, reference: Mapping[str, Tensor], seed: int
) -> dict[str, float] | None:
    """MIUB, nats, of every layer that the monitor knows, mean over the probes; None: it knows none.

    Args:
        model: the trained model, in evaluation mode.
        task: for its loss and probes.
        reference: the pretrained state dict, for layers that folded increments into their base.
        seed: of the tokens that are drawn.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with MIUBMonitor(model, every=1, reference=reference, seed=seed) as monitor:
                for batch in task.probes():
                    task.loss(model, batch)
            report = monitor.report().averaged()
        except ValueError:  # no LoRA layer, or none whose two paths can be told apart or sampled
            return None
    return {row.layer: row.value for row in report}
