"""The weights that a model computes with, whichever way they were trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scalora import peft_layers


@torch.no_grad()
def effective_weights(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return the weights that layers compute with, adapter and all, on the model's device.

    The difference of two models' is the whole change, whatever method made it. The model is left as
    it is: LoRA's weights are computed beside it, what has been folded and the carries included;
    other adapters are merged by PEFT into a copy of the model.

    Args:
        model: a model, or a ``PeftModel`` around one.
        layers: their names in the model that the adapter was put on; those with an adapter, or
            without PEFT every linear layer, if not given.

    Returns:
        Layer name -> weight (m, n), out times in, a copy, float32 at least.

    Raises:
        ValueError: a layer that the model does not have, or one that has no weight.
    """
    wrapped = peft_layers.peft_model(model)
    adapted = {} if wrapped is None else _adapted_weights(wrapped)
    if layers is None:
        layers = adapted if wrapped is not None else _linear_layers(model)
    return {
        name: adapted[name] if name in adapted else _plain_weight(model, name) for name in layers
    }


def trainable_parameters(model: nn.Module) -> int:
    """Return how many numbers are trained; those of tied weights count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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
    """The weight (m, n), a copy in float32 at least; some layers store its transpose."""
    stored = layer.get_parameter("weight").detach()
    weight = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
    return weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else weight.flatten(1)
