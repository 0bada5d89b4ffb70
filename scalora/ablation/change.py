"""The whole change of the weights, its spectrum, and how much it leans on the pretrained ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from miub import MIUBMonitor
from scalora import peft_layers
from scalora.ablation.record import LayerSpectrum
from scalora.ablation.task import Task
from scalora.saving.spectrum import entropy_rank

SPECTRUM_LENGTH = 256
"""The most singular values of the mean spectrum that are kept."""


@torch.no_grad()
def effective_weights(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return the weights that layers compute with, adapter and all, on the model's device.

    The difference between two models is the whole change, whatever method made it. The model is
    not changed: LoRA's weights, frozen increments included, are computed beside it; PEFT merges
    other adapters into a copy of the model.

    Args:
        model: a model, or a ``PeftModel`` around one.
        layers: names of layers in the model that the adapter was put on. If not given: those with
            an adapter, or without PEFT every linear layer.

    Returns:
        Layer name -> weight (m, n) = (out, in), a copy, float32 at least.

    Raises:
        ValueError: the model has no such layer, or the layer has no weight.
    """
    wrapped = peft_layers.peft_model(model)
    adapted = {} if wrapped is None else _adapted_weights(wrapped)
    if layers is None:
        layers = adapted if wrapped is not None else _linear_layers(model)
    return {
        name: adapted[name] if name in adapted else _plain_weight(model, name) for name in layers
    }


def trainable_parameters(model: nn.Module) -> int:
    """Return the count of trained numbers; tied weights count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def spectra_of_change(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return, by layer name, the singular values (min(m, n),) of the change, descending, float32.

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
    """Summarise singular values (k,), descending; a layer that did not change has rank 0.

    Args:
        spectrum: singular values of one layer's change.
        rank: r of the adapters.
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
    """Return singular values over the largest, mean over the layers that changed.

    The mean is as long as the shortest spectrum, so that every place is over the same layers.
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
    """Return, by layer, MIUB in nats, mean over the probes; None: the monitor knows no layer.

    Args:
        model: the trained model, in evaluation mode.
        task: for its loss and probes.
        reference: the pretrained state dict, for layers that folded increments into their base.
        seed: seed of the sample of tokens.
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


def _adapted_weights(model: PeftModel) -> dict[str, Tensor]:
    pairs = peft_layers.all_lora_pairs(model)
    if pairs:
        return {pair.name: pair.as_matrix(pair.effective_weight()).clone() for pair in pairs}
    names = list(model.base_model.targeted_module_names)
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: _matrix(merged.get_submodule(name)) for name in names}


def _plain_weight(model: nn.Module, name: str) -> Tensor:
    try:
        layer = peft_layers.base_layer_at(model, name)
        return _matrix(layer)
    except AttributeError as error:
        raise ValueError(f"the model has no layer {name!r} with a weight.") from error


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]


def _matrix(layer: nn.Module) -> Tensor:
    """Return a copy of the weight (m, n), float32 at least; some layers store its transpose."""
    stored = layer.get_parameter("weight").detach()
    weight = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
    return weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else weight.flatten(1)
