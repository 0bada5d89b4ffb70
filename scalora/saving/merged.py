"""The trained model, written as a plain transformers model without an adapter.

Held by tests/saving/test_merged_ties.py.
"""

from __future__ import annotations

import copy
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scalora import peft_layers, sharding, transformers_models
from scalora.arguments import check_model
from scalora.autocast import without_autocast
from scalora.files import folder_written_whole
from scalora.guards.watches import check_factors
from scalora.saving.adapter import factors_beside, save_adapter, write_factors
from scalora.saving.pretrained import Base, pretrained_weights

MODEL_CONFIG = "config.json"
"""Name of the file without which nothing loads a model's other files."""
_MODEL_FILES = ("model.safetensors*", "model-*-of-*.safetensors")


@without_autocast()
def save_merged(model: nn.Module, path: str | PathLike[str], base: Base | None = None) -> None:
    """Write the model as a plain transformers checkpoint, the adapter merged into its weights.

    The model itself is left as it is: a copy is merged, which needs as much memory again.  An
    adapted weight that was tied to another is no longer tied in what is written, since each has its
    own change.  What was written is loaded and compared before it is put in place.

    A quantized base would lose most of the adapter to rounding, so what is written is in full
    precision: the quantized base's own weights, dequantized, which gives the model's own answers;
    or ``base``.

    Args:
        model: the fine-tuned model (or a module around it): a PeftModel, or one with adapters by
            ``add_adapter``.  Of a ``SentenceTransformer`` all parts are written.
        path: a folder, created if need be.  It gets all files or none, and keeps others.  With
            several processes (DDP) call this in one of them.
        base: for a quantized model: the pretrained one in full precision (a model, a state dict, a
            folder or a hub id) to merge onto instead.

    Raises:
        ValueError: not a PEFT model around a transformers model, a base for one that is not
            quantized, or a model that would not load as it is; the folder is as it was then.
        OSError: the files cannot be written; what was in the folder is still there.
    """
    check_model(model, "save_merged")
    merged = merged_model(model, base)
    whole = _with_its_surroundings(model, merged)
    with folder_written_whole(Path(path), MODEL_CONFIG, _MODEL_FILES) as staged:
        transformers_models.write_model(whole, staged)


def merged_model(model: nn.Module, base: Base | None = None) -> nn.Module:
    """Return the model that `save_merged` writes, with its arguments and errors."""
    adapted = peft_layers.one_adapted_model(model)
    check_factors(adapted)
    sharding.require_whole(adapted, "merging")
    own = peft_layers.base_model(adapted)
    if not hasattr(own, "save_pretrained"):
        raise ValueError(
            f"{type(own).__name__} is not a transformers model: write its adapter with "
            "scalora.save_adapter, or merge a copy (PEFT's merge_and_unload, or merge() of every "
            "layer) and save its state_dict yourself."
        )
    peft_layers.check_mergeable(adapted)
    if any(map(peft_layers.is_quantized, peft_layers.all_lora_pairs(adapted))):
        apart = _in_full_precision(adapted, base)
    elif base is not None:
        raise ValueError("this model is not quantized and has its own base: leave base out.")
    else:
        apart = peft_layers.copied(adapted)
    peft_layers.untie_adapted_weights(apart)
    with transformers_models.keeping_ties(apart):
        merged = peft_layers.merge_and_unload(apart)
    transformers_models.settle_ties(merged)
    return merged


def _with_its_surroundings(model: nn.Module, merged: nn.Module) -> nn.Module:
    """Return the merged model in a copy of the module around it, if that one saves its parts.

    A ``SentenceTransformer`` does; wrappers such as DDP have no ``save_pretrained``, and the merged
    model is returned alone.
    """
    adapted = peft_layers.one_adapted_model(model)
    if adapted is model or not hasattr(type(model), "save_pretrained"):
        return merged
    return copy.deepcopy(model, {id(adapted): merged})


def _in_full_precision(model: nn.Module, base: Base | None) -> nn.Module:
    """Return the model with its adapter and carry on a base that is not quantized."""
    adapter = peft_layers.active_adapter(model)
    with tempfile.TemporaryDirectory() as folder:
        if base is None:  # onto the model's own base, which holds what was folded
            factors = factors_beside(peft_layers.lora_pairs(model, adapter), None)
            write_factors(model, Path(folder), adapter, factors, {}, keep_dora=True)
        else:
            save_adapter(model, folder, base=base, adapter_name=adapter)
        target = _full_precision_base(model, base)
        return peft_layers.PeftModel.from_pretrained(target, folder)


def _full_precision_base(model: nn.Module, base: Base | None) -> nn.Module:
    """Return a new transformers model, not quantized, to put an adapter on.

    Args:
        model: one of `peft_layers.adapted_models`, on a quantized base.
        base: where the weights come from; None for the quantized base itself, dequantized.

    Raises:
        ValueError: not a transformers model, or a base that cannot be loaded or does not fit it.
    """
    own: Any = peft_layers.base_model(model)
    if not hasattr(own, "config"):
        raise ValueError(f"{type(own).__name__} is not a transformers model.")
    if isinstance(base, (str, PathLike)):
        return _loaded_base(model, own, str(base))
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


def _loaded_base(model: nn.Module, own: Any, source: str) -> nn.Module:
    """Return the base that ``source`` holds, with all weights that the adapter's files lack."""
    recorded = transformers_models.recorded_config(own)
    try:
        loaded, lacking = transformers_models.pretrained_model(type(own), source, recorded)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"base={source!r} could not be loaded: {error}") from error
    if hasattr(loaded.config, "quantization_config"):
        raise ValueError(f"base={source!r} is quantized itself.")
    adapter = peft_layers.active_adapter(model)
    grown = peft_layers.vocabulary_changed(model, adapter)  # `save_adapter` writes both then
    embeddings = peft_layers.saved_embeddings(model, adapter, True) if grown else {}
    lacking = {name for name in lacking if not peft_layers.is_saved_with_adapter(model, name)}
    lacking -= set(map(peft_layers.base_weight_name, embeddings))
    if lacking:
        raise ValueError(f"base={source!r} has no weight {min(lacking)!r} that fits this model.")
    return loaded


def _dequantized_weight(model: nn.Module, name: str) -> Tensor:
    """Return a weight or buffer of the base by its name, dequantized if it is quantized."""
    path, _, leaf = name.rpartition(".")
    module = peft_layers.base_layer_at(model, path)
    return peft_layers.dequantized(module) if leaf == "weight" else getattr(module, leaf).detach()
