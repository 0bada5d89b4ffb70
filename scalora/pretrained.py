"""The weights that fine-tuning started from, and the change since."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from scalora import peft_layers
from scalora.peft_layers import LoRAPair

Base = nn.Module | Mapping[str, Tensor] | str | PathLike[str]


def weight_changes(
    model: nn.Module, base: Base | None, adapter_name: str | None
) -> dict[str, tuple[LoRAPair, Tensor]]:
    """Layer name -> (layer, everything learned since ``base`` as stored), float32 at least.

    Layers whose change is not one matrix beside the base weight (those that ``why_not_rebased``
    names, which stay plain LoRA) are left out.

    Args:
        model: the fine-tuned PEFT model.
        base: the pretrained model, its state dict, or a folder or hub id that it loads from.  None
            is enough while the model's base weights are the pretrained ones; else the model's own
            ``name_or_path`` is tried.
        adapter_name: None for the active adapter.

    Raises:
        ValueError: no such adapter, no layer with such a change, or a base whose weights do not
            fit the model's layers.
    """
    name = adapter_name or peft_layers.active_adapter(model)
    every = peft_layers.lora_pairs(model, name)
    if not every:
        raise ValueError(f"the model has no LoRA adapter named {name!r}.")
    pairs = [pair for pair in every if peft_layers.why_not_rebased(pair) is None]
    if not pairs:
        reason = peft_layers.why_not_rebased(every[0])
        raise ValueError(f"the change of {every[0].name!r} cannot be measured: {reason}.")
    moved = any(pair.was_rebased for pair in pairs)
    moved = moved or peft_layers.moves_base_at_creation(model, name)
    if base is None and not moved:
        return {
            pair.name: (pair, pair.effective_weight() - _wide(pair.base_weight)) for pair in pairs
        }
    weights = pretrained_weights(model, base)
    return {pair.name: (pair, change_since(pair, weights, moved)) for pair in pairs}


def change_since(pair: LoRAPair, weights: Mapping[str, Tensor], moved: bool = True) -> Tensor:
    """Everything the layer has learned since ``weights``, as stored, float32 at least.

    Args:
        pair: the layer.
        weights: name -> weight, of `pretrained_weights`.
        moved: whether the layer's own base weight may differ from the pretrained one; then the
            latter must not be the former.

    Raises:
        ValueError: weights that lack the layer's, or whose shape does not fit it.
    """
    key = f"{pair.name}.weight"
    # A headless base names its weights without the head's prefix ("bert.").
    start = weights.get(key)
    while start is None and "." in key:
        key = key.partition(".")[2]
        start = weights.get(key)
    effective = pair.effective_weight()
    if start is None:
        raise ValueError(f"base has no weight for the layer {pair.name!r}.")
    if start.shape != effective.shape:
        raise ValueError(
            f"base is another model: the weight of {pair.name!r} is {tuple(start.shape)} there and "
            f"{tuple(effective.shape)} here."
        )
    own = pair.base_weight
    if moved and peft_layers.storage_address(start) == peft_layers.storage_address(own):
        raise ValueError(
            f"base is the model itself: its weight of {pair.name!r} is not the pretrained one any "
            "more. Pass a copy made before get_peft_model, or a folder or hub id."
        )
    # Rounded as the model's own was: what was lost on the way to half precision was not learned.
    return effective - start.detach().to(effective.device, own.dtype).to(effective.dtype)


def pretrained_weights(model: nn.Module, base: Base | None) -> dict[str, Tensor]:
    """Name -> weight of a base that is given as a model, a state dict, a folder or a hub id.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    if isinstance(base, nn.Module):
        base = base.state_dict()
    if isinstance(base, Mapping):
        return {peft_layers.base_weight_name(name): weight for name, weight in base.items()}
    own: Any = peft_layers.base_model(model)
    source = base if base is not None else getattr(own, "name_or_path", "")
    if not source or not hasattr(own, "from_pretrained"):
        raise ValueError(
            "this model's base weights are not the pretrained ones any more (increments have been "
            "folded into them, or init_lora_weights changed them), and those are needed to tell "
            "what was learned: pass base= (a model, a state dict, a folder or a hub id)."
        )
    try:
        pretrained = type(own).from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"base={source!r} could not be loaded: {error}. Pass base=.") from error
    return dict(pretrained.state_dict())


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
