"""The weights that fine-tuning started from, and the change since."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from scalora import peft_layers, sharding, transformers_models
from scalora.peft_layers import LoRAPair

Base = nn.Module | Mapping[str, Tensor] | str | PathLike[str]


def weight_changes(
    model: nn.Module,
    base: Base | None,
    adapter_name: str | None,
    without: Collection[LoRAPair] = (),
) -> dict[str, tuple[LoRAPair, Tensor]]:
    """Layer name -> (layer, everything learned since ``base`` as stored), float32 at least.

    Layers whose change is not one matrix beside the base weight (those that ``why_not_dense`` and
    ``why_no_carry`` name, which stay plain LoRA) are left out.

    Args:
        model: the fine-tuned PEFT model.
        base: the pretrained model, its state dict, or a folder or hub id that it loads from.  None
            is enough while the model's base weights are the pretrained ones (as they stay under a
            carry); else the model's own ``name_or_path`` is tried.
        adapter_name: None for the active adapter.
        without: layers to leave out; a change is as large as the weight.

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
    moved = base is not None or base_has_moved(model, name)
    alone = [pair for pair in pairs if not moved or peft_layers.why_not_dense(pair) is not None]
    changes = {pair.name: (pair, pair.learned_change()) for pair in alone}
    if len(alone) < len(pairs):
        weights = pretrained_weights(model, base)
        changes |= {
            pair.name: (pair, change_since(pair, weights, base_has_moved(model, name)))
            for pair in pairs
            if pair.name not in changes
        }
    return {pair.name: changes[pair.name] for pair in pairs}


def base_has_moved(model: nn.Module, adapter: str) -> bool:
    """Whether part of what was learned is in the base weights."""
    pairs = peft_layers.lora_pairs(model, adapter)
    return any(pair.was_rebased for pair in pairs) or peft_layers.moves_base_at_creation(
        model, adapter
    )


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
    own: Any = peft_layers.base_model(model)
    if isinstance(base, nn.Module):
        # It may be a part of ``base``, as it is of a SentenceTransformer.
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


def full_precision_base(model: nn.Module, base: Base | None) -> nn.Module:
    """A new transformers model, not quantized, with the weights that an adapter was trained on.

    Args:
        model: the PEFT model on a quantized base.
        base: where the weights come from; None for the quantized base itself, dequantized.

    Raises:
        ValueError: not a transformers model, or a base that cannot be loaded or does not fit it.
    """
    own: Any = peft_layers.base_model(model)
    if not hasattr(own, "config"):
        raise ValueError(f"{type(own).__name__} is not a transformers model.")
    if isinstance(base, (str, PathLike)):
        return _loaded_full_precision_base(model, own, str(base))
    config = copy.deepcopy(own.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(own)(config)
    fresh.generation_config = getattr(own, "generation_config", None)
    if base is not None:
        weights = pretrained_weights(model, base)
    else:
        weights = {name: _dequantized_weight(model, name) for name in fresh.state_dict()}
    floats = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
    if floats:
        fresh = fresh.to(max(set(floats), key=floats.count))
    try:
        fresh.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"base does not fit this model: {error}") from error
    return fresh


def _loaded_full_precision_base(model: nn.Module, own: Any, source: str) -> nn.Module:
    recorded = transformers_models.recorded_config(own)
    try:
        loaded, lacking = transformers_models.pretrained_model(type(own), source, recorded)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"base={source!r} could not be loaded: {error}") from error
    if hasattr(loaded.config, "quantization_config"):
        raise ValueError(f"base={source!r} is quantized itself.")
    adapter = peft_layers.active_adapter(model)
    grown = peft_layers.vocabulary_changed(model, adapter)  # written by `save_adapter` then
    embeddings = peft_layers.saved_embeddings(model, adapter, True) if grown else {}
    lacking = {name for name in lacking if not peft_layers.is_saved_with_adapter(model, name)}
    lacking -= set(map(peft_layers.base_weight_name, embeddings))
    if lacking:
        raise ValueError(f"base={source!r} has no weight {min(lacking)!r} that fits this model.")
    return loaded


def _dequantized_weight(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    module = peft_layers.base_layer_at(model, path)
    return peft_layers.dequantized(module) if leaf == "weight" else getattr(module, leaf).detach()


def has_one_change(pair: LoRAPair) -> bool:
    """Whether what the layer has learned is one matrix beside its base weight."""
    return peft_layers.why_not_dense(pair) is None or peft_layers.why_no_carry(pair) is None
