"""The pretrained weights that fine-tuning started from, and everything learned since.

Held by tests/saving/test_saving.py and tests/saving/test_spectrum.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from scalora import peft_layers, sharding
from scalora.peft_layers import LoRAPair
from scalora.storage import storage_address

Base = nn.Module | Mapping[str, Tensor] | str | PathLike[str]
"""A pretrained model: itself, its state dict, or a folder or hub id that it loads from."""


def weight_changes(
    model: nn.Module,
    base: Base | None,
    adapter_name: str | None,
    without: Collection[LoRAPair] = (),
) -> dict[str, tuple[LoRAPair, Tensor]]:
    """Return layer name -> (layer, everything learned since ``base``), for each layer.

    A change has the shape of the stored weight, in float32 at least.  Layers whose change is not
    one matrix beside the base weight (`has_one_change`) are left out; they stay plain LoRA.

    Args:
        model: the fine-tuned PEFT model.
        base: the pretrained model.  None is enough while the model's base weights are the
            pretrained ones, as they stay under a carry; otherwise the model's own ``name_or_path``
            is tried.
        adapter_name: None for the active adapter.
        without: layers to leave out, since each change takes as much memory as its weight.

    Raises:
        ValueError: no such adapter, no layer with such a change, or a base whose weights do not
            fit the model's layers.
    """
    sharding.require_whole(model, "measuring the change of weights")
    name = adapter_name or peft_layers.active_adapter(model)
    every = peft_layers.lora_pairs(model, name)
    if not every:
        raise ValueError(f"the model has no LoRA adapter named {name!r}.")
    pairs = [pair for pair in every if has_one_change(pair)]
    if not pairs:
        reason = peft_layers.why_not_dense(every[0])
        raise ValueError(f"the change of {every[0].name!r} cannot be measured: {reason}.")
    pairs = [pair for pair in pairs if pair not in without]
    moved = base_has_moved(model, name)
    compare = moved or base is not None
    against_base = [p for p in pairs if compare and peft_layers.why_not_dense(p) is None]
    weights = pretrained_weights(model, base) if against_base else {}
    return {
        pair.name: (
            pair,
            change_since(pair, weights, moved) if pair in against_base else pair.learned_change(),
        )
        for pair in pairs
    }


def base_has_moved(model: nn.Module, adapter: str) -> bool:
    """Return whether part of what an adapter's training learned is in the base weights."""
    if any(pair.was_rebased for pair in peft_layers.lora_pairs(model, adapter)):
        return True
    return peft_layers.moves_base_at_creation(model, adapter)


def change_since(pair: LoRAPair, weights: Mapping[str, Tensor], moved: bool = True) -> Tensor:
    """Return everything a layer learned since ``weights``, shaped as stored, float32 at least.

    Args:
        pair: the layer.
        weights: name -> weight, of `pretrained_weights`.
        moved: whether the layer's own base weight may differ from the pretrained one.  Then
            ``weights`` must not hold the model's own tensors.

    Raises:
        ValueError: weights that lack the layer's, or whose shape does not fit it.
    """
    start = _weight_of(pair, weights)
    effective = pair.effective_weight()
    if start is None:
        raise ValueError(f"base has no weight for the layer {pair.name!r}.")
    if start.shape != effective.shape:
        raise ValueError(
            f"base is another model: the weight of {pair.name!r} is {tuple(start.shape)} there and "
            f"{tuple(effective.shape)} here."
        )
    own = pair.base_weight
    if moved and storage_address(start) == storage_address(own):
        raise ValueError(
            f"base is the model itself: its weight of {pair.name!r} is not the pretrained one any "
            "more. Pass a copy made before get_peft_model, or a folder or hub id."
        )
    # Rounded as the model's own weight was: what that rounding lost was not learned.
    return effective - start.detach().to(effective.device, own.dtype).to(effective.dtype)


def _weight_of(pair: LoRAPair, weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return the layer's entry; a headless base names it without the head's prefix ("bert.")."""
    key = f"{pair.name}.weight"
    while key not in weights and "." in key:
        key = key.partition(".")[2]
    return weights.get(key)


def pretrained_weights(model: nn.Module, base: Base | None) -> dict[str, Tensor]:
    """Return name -> pretrained weight.

    Args:
        model: the fine-tuned PEFT model.
        base: the pretrained model; None to load the one that the model's ``name_or_path`` names.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    own: Any = peft_layers.base_model(model)
    if isinstance(base, nn.Module):
        # The adapted model may be a part of ``base``, as it is of a SentenceTransformer.
        alike = (module for module in base.modules() if type(module) is type(own))
        base = next(alike, base).state_dict()
    if isinstance(base, Mapping):
        return {peft_layers.base_weight_name(name): weight for name, weight in base.items()}
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


def has_one_change(pair: LoRAPair) -> bool:
    """Return whether what the layer learned is one matrix beside its base weight."""
    return peft_layers.why_not_dense(pair) is None or peft_layers.why_no_carry(pair) is None
